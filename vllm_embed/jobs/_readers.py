"""Rows out of text files, JSON lines, CSV, Parquet and standard input; what is no row becomes a `Reject`."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import orjson

from vllm_embed._extras import needs
from vllm_embed.errors import ConfigurationError
from vllm_embed.jobs import _encoding
from vllm_embed.jobs._row import Reject, Row, kind, sound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from vllm_embed.jobs._inputs import Format, Source

__all__ = ["Reader"]

_SAMPLE: Final = 1 << 20
"""Bytes that an encoding is guessed from."""
_BROKEN, _JSON_BROKEN = 0.1, 0.5
"""Share of lines that are not UTF-8 from which on another encoding is looked for. JSON is UTF-8 (RFC 8259)."""
_RESERVED: Final = ("id", "text", "embedding")
"""Columns of the output; a carried one of the same name gets an underscore."""
_PARQUET_ROWS: Final = 1024


class Reader:
    """Reads sources one after another, and remembers how far it is.

    Args:
        sources: what to read.
        rows: what is here already, as mappings of columns; told as "rows".
        text_column: column or key of the text; None: "text", or in a CSV or Parquet file its only column.
        id_column: of the id; None: "id" where there is one, else the position.
        columns: carried along; None: all others.
        encoding: of text files; None: UTF-8, or a guess where a file is not.
        note: told what a user should know, such as a guessed encoding.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        rows: Iterable[Mapping[str, Any]] = (),
        *,
        text_column: str | None = None,
        id_column: str | None = None,
        columns: list[str] | None = None,
        encoding: str | None = None,
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        if encoding is not None:
            _encoding.check(encoding)
        self._sources = list(sources)
        self._rows = rows
        self._text = text_column
        self._id = id_column
        self._columns = columns
        self._encoding = encoding
        self._note = note
        self.bytes_read = 0
        self.bytes_total = sum(_size(source.path) for source in self._sources if source.path is not None)
        """0 where it cannot be told."""
        if any(source.path is None for source in self._sources):
            self.bytes_total = 0

    def __iter__(self) -> Iterator[Row | Reject]:
        for source in self._sources:
            before = self.bytes_read
            try:
                yield from self._read(source)
            except OSError as exc:
                raise ConfigurationError(f"{source.name} cannot be read: {exc.strerror or exc}") from exc
            if source.path is not None:
                self.bytes_read = before + _size(source.path)
        for number, values in enumerate(self._rows, 1):
            yield self.row("rows", number, values)

    def _read(self, source: Source) -> Iterator[Row | Reject]:
        if source.format == "parquet":
            yield from self._parquet(source)
            return
        with _opened(source.path) as file:
            sample = file.peek(_SAMPLE)[:_SAMPLE] if source.path is None else file.read(_SAMPLE)
            if source.path is not None:
                file.seek(0)
            form: Format = source.format or ("jsonl" if sample.lstrip().startswith(b"{") else "lines")
            if self._encoding is not None:
                encoding = _encoding.named(self._encoding, sample)
            elif (encoding := _encoding.guess(sample, _JSON_BROKEN if form == "jsonl" else _BROKEN)) != "utf-8":
                self._note(f"{source.name} is not plain UTF-8: read as {encoding} (--encoding names another)")
            readers = {"text": self._whole, "lines": self._lines, "jsonl": self._jsonl}
            if form in readers:
                yield from readers[form](source.name, file, encoding)
            else:
                yield from self._csv(source.name, file, encoding, "\t" if form == "tsv" else ",")

    def _whole(self, name: str, file: BinaryIO, encoding: str) -> Iterator[Row | Reject]:
        data = file.read()
        self.bytes_read += len(data)
        try:
            text = data.decode(encoding)
        except UnicodeError as exc:
            at = data.count(b"\n", 0, getattr(exc, "start", 0)) + 1
            yield Reject(name, at, name, _encoding.undecodable(exc))
            return
        yield self._row(name, 1, name, text.removeprefix("\ufeff"), {"source": name})

    def _lines(self, name: str, file: BinaryIO, encoding: str) -> Iterator[Row | Reject]:
        for number, line in self._decoded(name, file, encoding):
            if isinstance(line, Reject):
                yield line
            elif line.strip():
                yield self._row(name, number, None, line.rstrip("\r\n"), {})

    def _jsonl(self, name: str, file: BinaryIO, encoding: str) -> Iterator[Row | Reject]:
        lines: Iterable[tuple[int, Any]]
        lines = enumerate(self._counted(file), 1) if encoding == "utf-8" else self._decoded(name, file, encoding)
        for number, line in lines:
            if isinstance(line, Reject):
                yield line
                continue
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                if not line.strip():
                    continue
                try:  # what orjson refuses and JSON's own tolerate: half a surrogate pair, NaN
                    value = json.loads(line if isinstance(line, str) else line.decode())
                except UnicodeDecodeError as exc:
                    yield Reject(name, number, None, _encoding.undecodable(exc))
                    continue
                except (ValueError, RecursionError) as exc:
                    yield Reject(name, number, None, f"no JSON: {exc}")
                    continue
            if not isinstance(value, dict):
                yield Reject(name, number, None, f"no JSON object, but {kind(value)}")
                continue
            yield self.row(name, number, value)

    def _csv(self, name: str, file: BinaryIO, encoding: str, delimiter: str) -> Iterator[Row | Reject]:
        csv.field_size_limit(sys.maxsize)
        if encoding.startswith(_encoding.WIDE):
            lines = _wide(file, encoding, newline="")
        else:  # bytes that cannot be read stay in, marked, so that only their row is lost
            lines = (line.decode(encoding, "surrogateescape") for line in self._counted(file))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)  # a quote left open must not swallow rows
        header = _header(name, reader, encoding)
        if not header:
            return
        text = self._text_of(name, header)
        self._check(name, header)
        before = reader.line_num
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as exc:
                yield Reject(name, before + 1, None, f"no CSV: {exc}")
                before = reader.line_num
                continue
            number, before = before + 1, reader.line_num
            if fields is None:
                return
            if not fields:
                continue
            if len(fields) != len(header):
                yield Reject(name, number, None, f"{len(fields)} fields, the header has {len(header)}")
                continue
            if (broken := next((i for i, field in enumerate(fields) if not _encoding.whole(field)), None)) is not None:
                yield Reject(name, number, None, f"bytes in {header[broken]!r} that are not {encoding}")
                continue
            yield self.row(name, number, dict(zip(header, fields, strict=True)), text)

    def _parquet(self, source: Source) -> Iterator[Row | Reject]:
        with needs("jobs"):
            from pyarrow import ArrowException, parquet  # noqa: PLC0415 - extra

        if source.path is None:
            raise ConfigurationError("Parquet cannot be read from standard input: name the file")
        try:
            with parquet.ParquetFile(source.path) as file:
                names = file.schema_arrow.names
                text = self._text_of(source.name, names)
                self._check(source.name, names)
                wanted = [n for n in names if self._columns is None or n in (text, self._id or "id", *self._columns)]
                size, rows = _size(source.path), max(file.metadata.num_rows, 1)
                numbers = itertools.count(1)
                for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                    for values in batch.to_pylist():
                        yield self.row(source.name, next(numbers), values, text)
                    self.bytes_read += size * batch.num_rows // rows
        except ArrowException as exc:
            raise ConfigurationError(f"{source.name} cannot be read as Parquet: {exc}") from exc

    def row(self, name: str, number: int, values: Mapping[str, Any], text_column: str | None = None) -> Row | Reject:
        """The row that a mapping of columns makes."""
        text_column = text_column or self._text or "text"
        id_column = self._id or "id"
        key = values.get(id_column)
        if key is not None and (not isinstance(key, (str, int)) or isinstance(key, bool)):
            return Reject(name, number, None, f"{id_column!r} is {kind(key)}, not a string or an integer")
        if key is None or key == "":
            if self._id is not None:
                return Reject(name, number, None, f"no {id_column!r}")
            key = None
        if text_column not in values:
            return Reject(name, number, _told(key), f"no {text_column!r}; it has {', '.join(values) or 'nothing'}")
        carried = {
            f"{column}_" if column in _RESERVED else column: value
            for column, value in values.items()
            if column not in (text_column, id_column) and (self._columns is None or column in self._columns)
        }
        return self._row(name, number, _told(key), values[text_column], carried)

    def _row(self, name: str, number: int, key: str | None, text: Any, columns: dict[str, Any]) -> Row | Reject:
        if not isinstance(text, str):
            return Reject(name, number, key, "no text" if text is None else f"the text is {kind(text)}, not a string")
        if not text:
            return Reject(name, number, key, "no text: it is empty")
        return Row(sound(key) if key is not None else f"{sound(name)}:{number}", text, columns, name, number)

    def _text_of(self, name: str, header: list[str]) -> str:
        if self._text is not None:
            if self._text not in header:
                raise ConfigurationError(f"{name} has no column {self._text!r}; it has {', '.join(header)}")
            return self._text
        if "text" in header:
            return "text"
        if len(header) == 1:
            return header[0]
        raise ConfigurationError(
            f"{name}: which column is the text? It has {', '.join(header)}: name it by text_column (--text-column)"
        )

    def _check(self, name: str, header: list[str]) -> None:
        if self._id is not None and self._id not in header:
            raise ConfigurationError(f"{name} has no column {self._id!r}; it has {', '.join(header)}")
        for column in self._columns or ():
            if column not in header:
                self._note(f"{name} has no column {column!r} to carry along; it has {', '.join(header)}")

    def _counted(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            self.bytes_read += len(line)
            yield line

    def _decoded(self, name: str, file: BinaryIO, encoding: str) -> Iterator[tuple[int, str | Reject]]:
        if encoding.startswith(_encoding.WIDE):
            broken = f"bytes that are not {encoding}"
            for number, text in enumerate(_wide(file, encoding), 1):
                yield number, text if _encoding.whole(text) else Reject(name, number, None, broken)
            return
        for number, line in enumerate(self._counted(file), 1):
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as exc:
                yield number, Reject(name, number, None, _encoding.undecodable(exc))


def _opened(path: Path | None) -> io.BufferedReader:
    """Standard input is opened anew: a thread that waits for it must not hold the interpreter's own at exit."""
    if path is None:
        return io.BufferedReader(io.FileIO(os.dup(0)), _SAMPLE)
    return io.BufferedReader(io.FileIO(path), _SAMPLE)


def _wide(file: BinaryIO, encoding: str, newline: str | None = None) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding, errors=_encoding.BROKEN, newline=newline) as lines:
        yield from lines


def _header(name: str, reader: Iterator[list[str]], encoding: str) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as exc:
        raise ConfigurationError(f"{name} cannot be read as CSV: {exc}") from exc
    if not all(map(_encoding.whole, header)):
        raise ConfigurationError(
            f"{name}: bytes in its header that are not {encoding}; encoding (--encoding) names another"
        )
    return [column.removeprefix("\ufeff") for column in header]


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _told(key: str | int | None) -> str | None:
    return None if key is None else str(key)
