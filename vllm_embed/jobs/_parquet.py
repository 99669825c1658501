"""A folder of Parquet files: `id`, `text`, `embedding` (fixed-size list of float32) and the carried columns."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from vllm_embed.errors import OutputError
from vllm_embed.jobs._sink import durable, durable_folder, told

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["ParquetSink"]

_FIXED: Final = ("id", "text", "embedding")


class ParquetSink:
    """One file a commit, named in the order of its rows: `part-000000.parquet`, ...

    The state holds the files that count, with their rows, and the schema of the newest. A later row with another
    column, or another type in one, widens the schema; `compact` brings the older files to it, so that the folder reads
    as one.

    Args:
        path: the folder; made when missing.
    """

    knows_ids = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[tuple[str, int]] = []
        self._schema: pa.Schema | None = None
        self._mixed = False
        """Whether some file has an older schema."""
        self._made = 0
        self._prepared: dict[str, Any] | None = None

    def open(self, state: dict[str, Any]) -> None:
        """See `Sink`."""
        with told(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            self._take(state)
            for path in self._path.iterdir():
                known = path.name in {name for name, _ in self._parts}
                if path.name.startswith(("part-", ".part-")) and not known:
                    path.unlink()

    def _take(self, state: dict[str, Any]) -> None:
        self._parts = [(name, rows) for name, rows in state.get("parts", [])]
        self._mixed = state.get("mixed", False)
        self._made = state.get("made", 0)
        encoded = state.get("schema")
        self._schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded))) if encoded else None
        for name, _ in self._parts:
            hidden = self._path / f".{name}"
            if hidden.exists():  # a compaction was recorded, and not carried out
                hidden.replace(self._path / name)
            if not (self._path / name).exists():
                raise OutputError(f"{self._path / name} is gone: choose another output, or start anew with overwrite")

    def _state(self, parts: list[tuple[str, int]], *, mixed: bool) -> dict[str, Any]:
        assert self._schema is not None  # noqa: S101 - rows were written
        schema = base64.b64encode(self._schema.serialize().to_pybytes()).decode()
        return {"parts": list(parts), "mixed": mixed, "made": self._made, "schema": schema}

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """See `Sink`."""
        table = _table(rows, vectors)
        schema = table.schema if self._schema is None else _wider(self._schema, table.schema)
        if self._parts and schema != self._schema:
            self._mixed = True
        self._schema = schema
        name = f"part-{self._made:06}.parquet"
        self._write(_cast(table, schema), name)
        with told(self._path):
            (self._path / f".{name}").replace(self._path / name)
            durable_folder(self._path)
        self._made += 1
        self._parts.append((name, len(rows)))
        return self._state(self._parts, mixed=self._mixed)

    def _write(self, table: pa.Table, name: str) -> None:
        """Under a hidden name, which readers of the folder pass over."""
        path = self._path / f".{name}"
        compression = {_leaf(field): "NONE" if field.name == "embedding" else "ZSTD" for field in table.schema}
        try:
            with told(self._path), path.open("wb") as file:
                parquet.write_table(
                    table,
                    file,
                    compression=compression if len(compression) == len(table.schema) else "NONE",
                    use_dictionary=False,  # every text and every vector is another one
                    write_statistics=["id"],
                )
                durable(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def remove(self, ids: Sequence[str]) -> None:
        """See `Sink`."""

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:
        """See `Sink`. Files of which every row counts stay as they are."""
        if len(live) == total and not self._mixed:
            return None
        if not len(live):
            return {"parts": [], "made": self._made}
        parts: list[tuple[str, int]] = []
        start = 0
        for name, count in self._parts:
            kept = live[np.searchsorted(live, start) : np.searchsorted(live, start + count)] - start
            start += count
            if not len(kept):
                continue
            schema = parquet.read_schema(self._path / name)
            if len(kept) == count and schema.equals(self._schema):
                parts.append((name, count))
                continue
            table = parquet.read_table(self._path / name, partitioning=None).take(pa.array(kept))
            rewritten = f"{name.split('.')[0]}-{self._made}.parquet"  # beside its neighbours in order
            self._write(_cast(table, self._schema), rewritten)
            parts.append((rewritten, len(kept)))
        self._made += 1
        self._prepared = self._state(parts, mixed=False)
        return self._prepared

    def settle(self) -> None:
        """See `Sink`."""
        state = self._prepared or {"parts": [], "made": self._made}
        self._prepared = None
        self.open(state)

    def finish(self) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""


def _leaf(field: pa.Field) -> str:
    return f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name


def _table(rows: Sequence[Row], vectors: NDArray[np.float32]) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    arrays: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    names = dict.fromkeys(name for row in rows for name in row.columns)
    for name in names:
        arrays[name] = _column([row.columns.get(name) for row in rows])
    return pa.table(arrays)


def _column(values: list[Any]) -> pa.Array:
    """As Arrow would type it; values of several kinds as JSON."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, RecursionError):
        array = None
    if array is None or not _storable(array.type):
        return pa.array([None if value is None else _json(value) for value in values], pa.string())
    return array


def _storable(kind: pa.DataType) -> bool:
    """Parquet has no structs without fields: what JSON's `{}` is when every row has no more."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return False
    return all(_storable(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else True


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _wider(old: pa.Schema, new: pa.Schema) -> pa.Schema:
    """A schema that both can be cast to; the embedding's width is the newer one's."""
    fields = {field.name: field for field in old}
    for field in new:
        known = fields.get(field.name)
        if known is None or field.name in _FIXED:
            fields[field.name] = field
        elif known.type != field.type:
            fields[field.name] = pa.field(field.name, _common(known.type, field.type))
    return pa.schema(list(fields.values()))


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    return _both(one, other) or pa.string()


def _both(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that Arrow would give to values of the two together; None where it has none."""
    for a, b in ((one, other), (other, one)):
        if a == b or pa.types.is_null(a) or (pa.types.is_integer(a) and pa.types.is_floating(b)):
            return b
    if pa.types.is_list(one) and pa.types.is_list(other):
        value = _both(one.value_type, other.value_type)
        return value and pa.list_(value)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            kind = _both(fields.get(field.name, pa.null()), field.type)
            if kind is None:
                return None
            fields[field.name] = kind
        return pa.struct(list(fields.items()))
    return None


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table.column(field.name)
        if column.type != field.type and field.name != "embedding":
            column = _column_as(column, field.type)
        columns.append(column)
    if "embedding" in table.column_names:  # a width of its own, until everything is of the new one
        width = table.schema.field("embedding")
        schema = schema.set(schema.get_field_index("embedding"), width)
    return pa.table(columns, schema=schema)


def _column_as(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_string(wanted):
        return pa.chunked_array([[None if value is None else _json(value) for value in column.to_pylist()]], wanted)
    if pa.types.is_nested(wanted):
        return pa.chunked_array([pa.array(column.to_pylist(), wanted)])
    return column.cast(wanted)
