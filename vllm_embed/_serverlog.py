"""What a vLLM log says: how far the start has come, and why it failed."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LogTail", "ended", "phase", "reason"]

_LONGEST_REASON = 600
_READ_BYTES = 128 * 1024  # an engine that fails writes about 30 KB; an old error is no reason

_PHASES = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"non-default args", "reading the model's configuration"),
        (r"Fetching \d+ files|Downloading ", "downloading the model"),
        (r"Resolved architecture: (\w+)", "starting the engine for {}"),
        (r"Starting to load model", "loading the weights"),
        (r"checkpoint shards: +(\d+%) Completed", "loading the weights: {}"),
        (r"Warming up model|Start compiling|Dynamo bytecode transform", "compiling and warming up"),
        (r"Capturing CUDA graph", "capturing CUDA graphs"),
        (r"Starting vLLM (?:API )?server", "starting the HTTP server"),
    )
)
"""Lines of vLLM 0.24 to 0.33, in the order in which they come."""

_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]+\] ?)?")
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception))(?:: (.*))?$")
_USAGE = re.compile(r"^\S+: error: (.+)$")
_ECHOES = re.compile("See root cause above|See stack trace|EngineDeadError|CancelledError|RuntimeError: cancelled")
"""Errors that only report that another process failed; the reason stands further up."""
_KILLED = re.compile(r"^Worker proc \S+ died unexpectedly")
"""All that is said of a worker that had no time to say more."""


def phase(line: str) -> str | None:
    """What a line says the server is doing, in a few words; None for the many lines that say nothing of it."""
    for pattern, text in _PHASES:
        if found := pattern.search(line):
            return text.format(*found.groups())
    return None


def reason(log: str) -> str:
    """Why the server failed: the last error that is not the echo of an earlier one, else the last lines.

    Args:
        log: the server's output, tracebacks with their `(EngineCore pid=1) ERROR ... [core.py:1]` prefixes included.

    Returns:
        One line such as "ValueError: ...", at most 600 characters. Empty for an empty log.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    found = killed = ""
    for index, line in enumerate(lines):
        if _ECHOES.search(line):
            continue
        if _KILLED.match(line):
            killed = line
        elif usage := _USAGE.match(line):
            found = usage[1]
        elif raised := _RAISED.match(line):
            kind, text = raised[1], raised[2] or ""
            if kind == "ValidationError":  # pydantic's own: its first line only counts, the next one says what
                kind, text = "ValueError", _validation(lines[index + 1 : index + 3]) or text
            found = f"{kind}: {text}".removesuffix(": ")
    found = found or killed
    if not found:
        found = " | ".join([line.strip() for line in lines if line.strip()][-3:])
    return found if len(found) <= _LONGEST_REASON else found[: _LONGEST_REASON - 3] + "..."


def _validation(lines: list[str]) -> str:
    text = next((line.strip() for line in lines if "error, " in line), " ".join(line.strip() for line in lines))
    return re.sub(r" ?\[type=.*", "", text).removeprefix("Value error, ").removeprefix("Assertion failed, ")


def ended(code: int) -> str:
    """How a process ended, in words, from the exit status that the watchdog reports."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exited with status {code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


class LogTail:
    """One server's log file, from the place where it ended when this object was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._position = path.stat().st_size if path.exists() else 0
        self._rest = ""

    def new_lines(self) -> list[str]:
        """Whole lines written since the last call; a progress bar's carriage returns end lines too."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = re.split(r"[\r\n]", self._rest + data.decode("utf-8", "replace"))
        return lines

    def reason(self) -> str:
        """Why this server failed."""
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self._start, end - _READ_BYTES))
            return reason(file.read().decode("utf-8", "replace"))
