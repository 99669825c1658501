"""One server process with all its children: started in its own session, and stopped as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from vllm_embed import _watchdog
from vllm_embed._serverlog import LogTail

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vllm_embed._launch import Launch

__all__ = ["ServerProcess", "stop"]

_GRACE_S = 4.0
"""From SIGTERM to SIGKILL. An idle vLLM 0.32 on CPU takes 0.5; one that compiles its model does not listen."""
_POLL_S = 0.05


class ServerProcess:
    """A replica's process group. Ctrl-C in the terminal does not reach it; it is stopped by `stop` or by our death."""

    def __init__(self, launch: Launch, log_path: Path) -> None:
        self.port = launch.port
        self.log = LogTail(log_path)
        self.started = time.monotonic()
        # -I -S: neither this package's folder, nor PYTHONPATH, nor site-packages; the command has them again.
        watchdog = (sys.executable, "-I", "-S", _watchdog.__file__, str(os.getpid()), str(_GRACE_S))
        with log_path.open("ab") as output:
            self.popen = subprocess.Popen(  # noqa: S603 - the command is the caller's
                [*watchdog, *launch.command],
                env=launch.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._swept = False

    def poll(self) -> int | None:
        """The exit status, None while it runs. Nothing of a group whose leader ended is left running."""
        code = self.popen.poll()
        if code is not None:
            self.kill()
        return code

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            self.popen.terminate()

    def kill(self) -> None:
        """SIGKILL for what is left of the group, once: later its number may belong to others."""
        if not self._swept:
            self._swept = True
            with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, only zombies left
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


def stop(processes: Iterable[ServerProcess]) -> None:
    """Stop them all, at the latest after 5 seconds, at once when interrupted (a second Ctrl-C)."""
    processes = list(processes)
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_S + 1.0
        while any([process.poll() is None for process in processes]) and time.monotonic() < deadline:  # noqa: C419
            time.sleep(_POLL_S)
    finally:
        for process in processes:
            process.kill()
