"""LanceDB: exact search until you build an index.

Vectors are stored with length 1, so that L2, which both frameworks search by, ranks by cosine.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_embed.jobs._store import Hit, Store, metadata, storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["LanceDBStore"]


class LanceDBStore(Store):
    """A table: `id`, `text`, `vector` and the struct `metadata`, as LangChain's class makes one.

    A later row with another column widens the struct. One with another type in a column has the table written anew,
    with that column as JSON text (or as floats, for whole numbers among others).
    """

    kind = "lancedb"

    def __init__(self, place: Any) -> None:
        super().__init__(place)
        self._connection: Any = None
        self._wrote = False

    def _connected(self) -> Any:
        if self._connection is None:
            import lancedb  # noqa: PLC0415 - extra

            self._connection = lancedb.connect(str(self.place.path))
        return self._connection

    def exists(self) -> bool:
        """See `Store`."""
        assert self.place.path is not None  # noqa: S101 - never a server
        return (self.place.path / f"{self.place.collection}.lance").is_dir()

    def clear(self) -> None:
        """See `Store`."""
        self._connected().drop_table(self.place.collection)

    def _opened(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that langchain-community is no longer maintained
            from langchain_community.vectorstores import LanceDB  # noqa: PLC0415 - extra
        from langchain_core.embeddings import FakeEmbeddings  # noqa: PLC0415 - extra

        # One that it never asks: it refuses to be without.
        return LanceDB(
            self._connected(), FakeEmbeddings(size=1), table_name=self.place.collection, mode="append", api_key=""
        )

    def _table(self) -> Any:
        return self._opened().get_table()

    def _upsert(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        import pyarrow as pa  # noqa: PLC0415 - LanceDB has it

        table = self._table() if self._width or self.exists() else None
        held = [metadata(row) for row in rows]
        names = list(dict.fromkeys(name for each in held for name in each))
        columns = {name: [None if each.get(name) is None else storable(each[name]) for each in held] for name in names}
        known = {field.name: field.type for field in table.schema.field("metadata").type} if table else {}
        types = {name: _type(values, known.get(name)) for name, values in columns.items()}
        if table is not None:
            if any(name in known and known[name] != kind for name, kind in types.items()):
                table = self._rewritten(table, {**known, **types})
            elif new := [pa.field(name, kind) for name, kind in types.items() if name not in known]:
                table.add_columns(pa.field("metadata", pa.struct(new)))
        arrays = [_array(columns[name], kind) for name, kind in types.items()]
        unit = _unit(vectors)
        data = pa.table(
            {
                "id": pa.array([row.id for row in rows], pa.string()),
                "text": pa.array([row.text for row in rows], pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(unit.reshape(-1)), unit.shape[1]),
                "metadata": pa.StructArray.from_arrays(arrays, names=list(types)),
            }
        )
        if table is None:
            self._connected().create_table(self.place.collection, data=data)
        else:
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)
        self._wrote = True

    def _rewritten(self, table: Any, types: dict[str, Any]) -> Any:
        """The table with other types in its metadata. By way of a file: LanceDB cannot read and write one at once."""
        import pyarrow as pa  # noqa: PLC0415 - LanceDB has it

        spool = self.place.folder / "rewritten.arrow"
        schema = table.schema
        wanted = pa.struct([pa.field(name, kind) for name, kind in types.items()])
        schema = schema.set(schema.get_field_index("metadata"), pa.field("metadata", wanted))
        try:
            with pa.OSFile(str(spool), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in table.search().to_batches():
                    values = batch.column("metadata").to_pylist()
                    arrays = [_array([each.get(name) for each in values], kind) for name, kind in types.items()]
                    struct = pa.StructArray.from_arrays(arrays, names=list(types))
                    columns = [struct if name == "metadata" else batch.column(name) for name in schema.names]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
            with pa.memory_map(str(spool)) as file, pa.ipc.open_stream(file) as reader:
                return self._connected().create_table(
                    self.place.collection, data=reader, schema=schema, mode="overwrite"
                )
        finally:
            spool.unlink(missing_ok=True)

    def _delete(self, ids: Sequence[str]) -> None:
        self._opened().delete(list(ids))
        self._wrote = True

    def finish(self) -> None:
        """Join the small files that the writes made."""
        if self._wrote:
            with self.reported():
                self._table().optimize()
            self._wrote = False

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """See `Store`."""
        found = self._opened().similarity_search_by_vector(vector.tolist(), k, metrics="cosine", score=True)
        return [Hit(doc.metadata.pop("id"), 1 - distance, doc.page_content, doc.metadata) for doc, distance in found]

    def close(self) -> None:
        """See `Sink`."""
        self._connection = None

    def how_to_open(self, fingerprint: str) -> dict[str, str]:
        """See `Store`."""
        path, name, expect = (json.dumps(value) for value in (self.place.address, self.place.collection, fingerprint))
        return {
            "LangChain": (
                "from langchain_community.vectorstores import LanceDB\n"
                "from langchain_vllm_embed import VLLMEmbeddings\n\n"
                f"embeddings = VLLMEmbeddings(expect={expect})  # and the settings of the job\n"
                f'store = LanceDB(embedding=embeddings, uri={path}, table_name={name}, mode="append")'
            ),
            "LlamaIndex": (
                "from llama_index.core import VectorStoreIndex\n"
                "from llama_index.vector_stores.lancedb import LanceDBVectorStore\n"
                "from llama_index_vllm_embed import VLLMEmbedding\n\n"
                f"embed_model = VLLMEmbedding(expect={expect})  # and the settings of the job\n"
                f'store = LanceDBVectorStore({path}, {name}, doc_id_key="id", mode="append")\n'
                "index = VectorStoreIndex.from_vector_store(store, embed_model)"
            ),
        }


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _type(values: list[Any], known: Any) -> Any:
    """The type for a column's values beside those that it has."""
    import pyarrow as pa  # noqa: PLC0415 - LanceDB has it

    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return known or pa.string()
    if kinds == {bool}:
        found = pa.bool_()
    elif kinds == {int}:
        found = pa.int64()
    elif kinds <= {int, float}:
        found = pa.float64()
    else:
        found = pa.string()
    if known is None or known == found:
        return found
    numbers = (pa.int64(), pa.float64())
    return pa.float64() if known in numbers and found in numbers else pa.string()


def _array(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa  # noqa: PLC0415 - LanceDB has it

    if pa.types.is_string(kind):
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    elif pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, kind)
