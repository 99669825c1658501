"""The file of rejected rows: one JSON object a line, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import orjson

from vllm_embed.jobs._row import sound
from vllm_embed.jobs._sink import told

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_embed.jobs._row import Reject

__all__ = ["Rejects"]


class Rejects:
    """Made anew by each job, with its first rejected row; what an earlier job left is removed.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._file: BinaryIO | None = None
        with told(path):
            path.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        """Note a row: its source, line, id, and why."""
        with told(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("wb")
            line = orjson.dumps(sound(reject._asdict()))
            self._file.write(line + b"\n")
        self.count += 1

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            with told(self.path):
                self._file.close()
