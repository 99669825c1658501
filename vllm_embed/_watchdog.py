"""Lets one command live no longer than the process that asked for it. A script of its own, standard library only.

    python -I -S _watchdog.py PARENT_PID GRACE_S COMMAND [ARGUMENT ...]

It leads the session and process group that the command and its children live in. When the parent is gone, or on
SIGTERM, the command gets SIGTERM and, `GRACE_S` seconds later, the whole group SIGKILL. SIGTERM comes first because
vLLM's API server stops its EngineCore and workers on it; killed outright it leaves them behind (0.32).

The parent is watched by its process id. Linux's parent-death signal belongs to the *thread* that spawned, so a server
started in a short-lived thread would be stopped by it; and macOS has none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the command to its end; the result is its exit status, 128 + n for signal n."""
    parent, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: signals.append(received))
    if os.getppid() != parent:
        return 1
    try:
        # One thread, so preexec_fn is safe here; in the parent it would not be.
        child = subprocess.Popen(command, preexec_fn=_terminate_with_us())  # noqa: S603, PLW1509
    except OSError as exc:
        print(f"{type(exc).__name__}: cannot start {command[0]!r}: {exc.strerror}", file=sys.stderr)  # noqa: T201
        return 127
    deadline = None
    while (code := child.poll()) is None:
        if deadline is None and (signals or os.getppid() != parent):
            child.terminate()
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(0, signal.SIGKILL)
        time.sleep(_POLL_S)
    if os.getppid() != parent:  # nobody else will sweep up what the command left behind
        os.killpg(0, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _terminate_with_us() -> Callable[[], None] | None:
    """Ask for SIGTERM in the command should this watchdog be killed alone. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    watchdog = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != watchdog:
            os._exit(1)

    return prepare


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
