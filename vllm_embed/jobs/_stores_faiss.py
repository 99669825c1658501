"""FAISS: exact inner product of vectors of length 1, which is the cosine; built of rows that wait in Parquet files."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from vllm_embed.errors import OutputError
from vllm_embed.jobs._parquet import ParquetSink
from vllm_embed.jobs._sink import durable, durable_folder, told
from vllm_embed.jobs._store import Hit, Store, as_json, metadata

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["FAISSStore"]

_LLAMA: Final = "llama_index"
_STAMP: Final = "rows.json"
_FILES: Final = {"index.faiss", "index.pkl", _LLAMA, _STAMP}
_STRATEGY: Final = "MAX_INNER_PRODUCT"


class FAISSStore(Store):
    """A folder: `index.faiss` for both frameworks, `index.pkl` for LangChain, `llama_index/` for LlamaIndex.

    The rows are in `rows.parquet` in the job's folder, as `ParquetSink` keeps them. `finish` builds the index in a
    folder beside PATH and puts it in its place; where the rows are those that it was built of, it does nothing.
    Building holds all vectors once, and all texts, as does opening it.
    """

    kind = "faiss"
    knows_ids = False

    def __init__(self, place: Any) -> None:
        super().__init__(place)
        assert place.path is not None  # noqa: S101 - never a server
        self._path: Path = place.path
        self._rows = place.folder / "rows.parquet"
        self._sink = ParquetSink(self._rows)
        self._inner: dict[str, Any] = {}
        self._new = self._path.with_name(f".{self._path.name}.new")
        self._old = self._path.with_name(f".{self._path.name}.old")

    def exists(self) -> bool:
        """See `Store`."""
        return self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir()))

    def clear(self) -> None:
        """See `Store`."""
        _remove(self._path)

    def open(self, state: dict[str, Any]) -> None:
        """See `Sink`."""
        self._own(state)
        with told(self._path):
            if self._old.exists():  # a kill while the new one was put in place
                if self._path.exists():
                    _remove(self._old)
                else:
                    self._old.replace(self._path)
            _remove(self._new)
            if self._path.exists() and not self._path.is_dir():
                raise NotADirectoryError(f"{self._path} is a file")
            strange = {file.name for file in self._path.iterdir()} - _FILES if self._path.exists() else set()
        if strange:
            raise OutputError(f"{self._path} holds other files ({', '.join(sorted(strange)[:3])}): choose another path")
        self._writable()
        self._inner = state.get("rows", {})
        self._sink.open(self._inner)

    def _writable(self) -> None:
        with told(self._path):
            self._new.mkdir(parents=True)
            self._new.rmdir()

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """See `Sink`."""
        held = [row._replace(columns={k: v for k, v in metadata(row).items() if k != "id"}) for row in rows]
        self._inner = self._sink.write(held, vectors)
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {"store": self.kind, "collection": self.place.collection, "rows": self._inner}

    def _upsert(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        raise NotImplementedError

    def _delete(self, ids: Sequence[str]) -> None:
        """`compact` leaves them out."""

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:
        """See `Sink`."""
        if (inner := self._sink.compact(live, total)) is None:
            return None
        self._inner = inner
        return self._state()

    def settle(self) -> None:
        """See `Sink`."""
        self._sink.settle()

    def finish(self) -> None:
        """Build the index, unless it is that of these rows."""
        parts = [list(part) for part in self._inner.get("parts", [])]
        stamp = self._path / _STAMP
        if stamp.exists() and json.loads(stamp.read_text()) == parts:
            return
        with self.reported(), told(self._path):
            if not parts:
                _remove(self._path)
                return
            _remove(self._new)
            self._new.mkdir(parents=True)
            try:
                self._build([name for name, _ in parts], self._new)
                with (self._new / _STAMP).open("w") as file:
                    json.dump(parts, file)
                    durable(file)
                durable_folder(self._new)
                if self._path.exists():
                    self._path.replace(self._old)
                self._new.replace(self._path)
                durable_folder(self._path.parent)
            finally:
                _remove(self._new)
            _remove(self._old)

    def _build(self, parts: list[str], folder: Path) -> None:
        import faiss  # noqa: PLC0415 - extra
        from langchain_core.documents import Document  # noqa: PLC0415 - extra
        from langchain_core.embeddings import FakeEmbeddings  # noqa: PLC0415 - extra

        store_class, docstore_class = _langchain()
        index: Any = None
        documents: dict[str, Any] = {}
        (folder / _LLAMA).mkdir()
        with (folder / _LLAMA / "docstore.json").open("wb") as nodes:
            nodes.write(b'{"docstore/metadata":{},"docstore/data":{')
            for table in self._tables(parts):
                column = table.column("embedding").combine_chunks()
                width = column.type.list_size
                if index is None:
                    index = faiss.IndexFlatIP(width)
                elif index.d != width:
                    raise OutputError(
                        f"{self._rows} has vectors of {index.d} and of {width} numbers, of two models: start anew with "
                        "overwrite, or take out the rows that the input no longer has with prune"
                    )
                matrix = np.array(column.flatten()).reshape(-1, width)
                faiss.normalize_L2(matrix)
                index.add(matrix)
                for row in table.drop_columns(["embedding"]).to_pylist():
                    key, text = row["id"], row.pop("text")
                    nodes.write(b"," if documents else b"")
                    nodes.write(_node(key, text, row))
                    documents[key] = Document(id=key, page_content=text, metadata=row)
            nodes.write(b"}}")
            durable(nodes)
        (folder / _LLAMA / "index_store.json").write_bytes(_struct(documents))
        store = store_class(
            FakeEmbeddings(size=1),  # never asked
            index,
            docstore_class(documents),
            dict(enumerate(documents)),
            distance_strategy=_STRATEGY,
        )
        store.save_local(str(folder))

    def _tables(self, parts: list[str]) -> Iterator[Any]:
        from pyarrow import parquet  # noqa: PLC0415 - extra

        return (parquet.read_table(self._rows / name, partitioning=None) for name in parts)

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """See `Store`."""
        from langchain_core.embeddings import FakeEmbeddings  # noqa: PLC0415 - extra

        store = _langchain()[0].load_local(
            str(self._path),
            FakeEmbeddings(size=1),
            distance_strategy=_STRATEGY,
            allow_dangerous_deserialization=True,  # as its user would: the job's own file
        )
        unit = vector / (np.linalg.norm(vector) or 1)
        found = store.similarity_search_with_score_by_vector(unit.tolist(), k)
        return [Hit(doc.metadata.pop("id"), float(score), doc.page_content, doc.metadata) for doc, score in found]

    def close(self) -> None:
        """See `Sink`."""
        self._sink.close()

    def how_to_open(self, fingerprint: str) -> dict[str, str]:
        """See `Store`."""
        path, llama, file, expect = (
            json.dumps(str(value))
            for value in (self._path, self._path / _LLAMA, self._path / "index.faiss", fingerprint)
        )
        return {
            "LangChain": (
                "from langchain_community.vectorstores import FAISS\n"
                "from langchain_vllm_embed import VLLMEmbeddings\n\n"
                f"embeddings = VLLMEmbeddings(expect={expect})  # and the settings of the job\n"
                f'how = {{"distance_strategy": "{_STRATEGY}", "allow_dangerous_deserialization": True}}  # a pickle\n'
                f"store = FAISS.load_local({path}, embeddings, **how)"
            ),
            "LlamaIndex": (
                "from llama_index.core import StorageContext, load_index_from_storage\n"
                "from llama_index.vector_stores.faiss import FaissVectorStore\n"
                "from llama_index_vllm_embed import VLLMEmbedding\n\n"
                f"embed_model = VLLMEmbedding(expect={expect})  # and the settings of the job\n"
                f"store = FaissVectorStore.from_persist_path({file})\n"
                f"storage = StorageContext.from_defaults(vector_store=store, persist_dir={llama})\n"
                "index = load_index_from_storage(storage, embed_model=embed_model)"
            ),
        }


def _langchain() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that langchain-community is no longer maintained
        from langchain_community.docstore.in_memory import InMemoryDocstore  # noqa: PLC0415 - extra
        from langchain_community.vectorstores import FAISS  # noqa: PLC0415 - extra
    return FAISS, InMemoryDocstore


def _node(key: str, text: str, held: dict[str, Any]) -> bytes:
    """An entry of LlamaIndex's docstore.json (0.14)."""
    values = {name: as_json(value) for name, value in held.items()}
    node = {"id_": key, "text": text, "metadata": values, "class_name": "TextNode"}
    return orjson.dumps(key) + b":" + orjson.dumps({"__data__": node, "__type__": "1"})


def _struct(ids: dict[str, Any]) -> bytes:
    """LlamaIndex's index_store.json (0.14): which vector is which node."""
    numbered = {str(number): key for number, key in enumerate(ids)}
    struct = {
        "index_id": "vllm-embed",
        "summary": None,
        "nodes_dict": numbered,
        "doc_id_dict": {},
        "embeddings_dict": {},
    }
    entry = {"__type__": "vector_store", "__data__": orjson.dumps(struct).decode()}
    return orjson.dumps({"index_store/data": {"vllm-embed": entry}})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
