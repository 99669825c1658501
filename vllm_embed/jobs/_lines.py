"""`x.jsonl`, and `x.npy` with `x.ids.jsonl`: files that grow at their end, cut back to what the ledger knows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import orjson

from vllm_embed.errors import OutputError
from vllm_embed.jobs._sink import durable, durable_folder, told

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO
    from pathlib import Path

    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["JSONLinesSink", "NumpySink"]

_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
_COPY: Final = 1 << 20


class _Growing:
    """A file that only grows; a shorter one replaces it whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file: FileIO | None = None

    def open(self, size: int, made: int) -> None:
        with told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            prepared = self._prepared(made)
            if made and prepared.exists():  # recorded, and not carried out
                prepared.replace(self.path)
                durable_folder(self.path.parent)
            for left in self.path.parent.glob(f".{self.path.name}.*.new"):
                left.unlink()
            self.close()
            if not self.path.exists():
                self.path.touch()
            if self.path.stat().st_size < size:
                raise OutputError(f"{self.path} was cut: choose another output, or start anew with overwrite")
            self._file = self.path.open("r+b", buffering=0)  # what a full disk refused is not tried again
            self._file.truncate(size)
            self._file.seek(size)
            self.size = size

    def _prepared(self, made: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{made}.new")

    def append(self, data: bytes | memoryview) -> int:
        file = self._opened()
        try:
            with told(self.path):
                _write(file, data)
                durable(file)
        except OutputError:
            file.truncate(self.size)
            file.seek(self.size)
            raise
        self.size += len(data)
        return self.size

    def patch(self, data: bytes) -> None:
        """Write over the beginning."""
        file = self._opened()
        with told(self.path):
            file.seek(0)
            _write(file, data)
            durable(file)
            file.seek(self.size)

    def prepare(self, made: int, copy: Callable[[BinaryIO, BinaryIO], None]) -> int:
        """Make the file that is to replace this one; its size."""
        path = self._prepared(made)
        try:
            with told(self.path), self.path.open("rb") as old, path.open("wb") as new:
                copy(old, new)
                durable(new)
                return new.tell()
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> FileIO:
        assert self._file is not None  # noqa: S101 - `open` comes first
        return self._file


class JSONLinesSink:
    """One JSON object a line: `id`, `text`, `embedding`, and the carried columns.

    Args:
        path: of the file; made when missing.
    """

    knows_ids = False

    def __init__(self, path: Path) -> None:
        self._file = _Growing(path)
        self._made = 0
        self._state: dict[str, Any] = {}

    def open(self, state: dict[str, Any]) -> None:
        """See `Sink`."""
        self._state, self._made = state, state.get("made", 0)
        self._file.open(state.get("bytes", 0), self._made)

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """See `Sink`."""
        lines = [
            _line({"id": row.id, "text": row.text, "embedding": vector, **row.columns})
            for row, vector in zip(rows, vectors, strict=True)
        ]
        self._state = {"bytes": self._file.append(b"".join(lines)), "made": self._made}
        return self._state

    def remove(self, ids: Sequence[str]) -> None:
        """See `Sink`."""

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:
        """See `Sink`."""
        if len(live) == total:
            return None
        self._made += 1
        size = self._file.prepare(self._made, lambda old, new: _copy_lines(old, new, live, total))
        self._state = {"bytes": size, "made": self._made}
        return self._state

    def settle(self) -> None:
        """See `Sink`."""
        self.open(self._state)

    def finish(self) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


class NumpySink:
    """A float32 array of shape (n, d), and beside it a line of `id`, `text` and the carried columns for each row.

    Args:
        path: of the array, `x.npy`; the lines are in `x.ids.jsonl`.
    """

    knows_ids = False

    def __init__(self, path: Path) -> None:
        self._array = _Growing(path)
        self._lines = _Growing(path.with_suffix(".ids.jsonl"))
        self._made = 0
        self._state: dict[str, Any] = {}

    def open(self, state: dict[str, Any]) -> None:
        """See `Sink`."""
        self._state, self._made = state, state.get("made", 0)
        width = state.get("dimension", 0)
        if not state.get("rows"):
            self._array.open(0, self._made)
        else:
            self._array.open(_HEADER + state["rows"] * width * 4, self._made)
            self._array.patch(_header(state["rows"], width))
        self._lines.open(state.get("bytes", 0), self._made)

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """See `Sink`.

        Raises:
            OutputError: the vectors have another width than those that are there.
        """
        before, width = self._state.get("rows", 0), vectors.shape[1]
        if before and width != self._state["dimension"]:
            raise OutputError(
                f"{self._array.path} holds vectors of {self._state['dimension']} dimensions, these have {width}: an "
                ".npy file has room for one width only. Choose another output, or start anew with overwrite"
            )
        head = b"" if before else _header(len(rows), width)
        lines = [_line({"id": row.id, "text": row.text, **row.columns}) for row in rows]
        try:
            self._array.append(head + np.ascontiguousarray(vectors, dtype="<f4").tobytes())
            size = self._lines.append(b"".join(lines))
            if before:
                self._array.patch(_header(before + len(rows), width))
        except OutputError:
            self.open(self._state)  # rows in both files or in neither
            raise
        self._state = {"rows": before + len(rows), "dimension": width, "bytes": size, "made": self._made}
        return self._state

    def remove(self, ids: Sequence[str]) -> None:
        """See `Sink`."""

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:
        """See `Sink`."""
        if len(live) == total:
            return None
        self._made += 1
        width = self._state["dimension"]

        def copy(old: BinaryIO, new: BinaryIO) -> None:
            new.write(_header(len(live), width))
            rows = np.memmap(old, dtype="<f4", mode="r", offset=_HEADER, shape=(total, width))
            step = max(1, _COPY // (4 * width))
            new.writelines(rows[live[start : start + step]].tobytes() for start in range(0, len(live), step))

        self._array.prepare(self._made, copy)
        size = self._lines.prepare(self._made, lambda old, new: _copy_lines(old, new, live, total))
        self._state = {"rows": len(live), "dimension": width, "bytes": size, "made": self._made}
        return self._state

    def settle(self) -> None:
        """See `Sink`."""
        self.open(self._state)

    def finish(self) -> None:
        """See `Sink`. Without a row it is an array of none, which numpy opens."""
        if not self._state.get("rows"):
            self._array.append(_header(0, self._state.get("dimension", 0)))

    def close(self) -> None:
        """See `Sink`."""
        self._array.close()
        self._lines.close()


def _line(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values, default=str, option=_OPTIONS)
    except orjson.JSONEncodeError:  # integers of over 64 bits, or nested deeper than 254
        return f"{json.dumps(values, default=_plain, ensure_ascii=False)}\n".encode()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    """All of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _copy_lines(old: BinaryIO, new: BinaryIO, live: NDArray[np.int64], total: int) -> None:
    keep = np.zeros(total, dtype=bool)
    keep[live] = True
    for at, line in enumerate(old):
        if at < total and keep[at]:
            new.write(line)


_HEADER: Final = 128
"""Bytes before the rows: numpy's header with room for any number of them, so that it can be written over."""


_MAGIC: Final = b"\x93NUMPY\x01\x00"


def _header(rows: int, width: int) -> bytes:
    """Numpy's header 1.0, as in its documentation of `numpy.lib.format`, padded to 128 bytes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    room = _HEADER - len(_MAGIC) - 2
    return _MAGIC + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"
