"""Ends vLLM's cores when the process that started them is gone. A script of its own, standard library only.

    python -I -S _orphans.py PARENT_PID CORE_PID ...

A process that ends by SIGTERM or SIGKILL runs none of its clean-up, and vLLM's core does not notice that it is alone:
it and its workers stay, with their memory (0.32). A core ends its workers on SIGTERM; when it is killed outright, they
end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

_POLL_S = 0.25
_GRACE_S = 15.0


def main(arguments: list[str]) -> None:
    """Wait for the parent's end, then for that of the cores."""
    parent, *cores = map(int, arguments)
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        cores = [core for core in cores if _sent(core, number)]
        until = time.monotonic() + _GRACE_S
        while cores and time.monotonic() < until:
            time.sleep(_POLL_S)
            cores = [core for core in cores if _sent(core, 0)]


def _sent(process: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)
        return True
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
