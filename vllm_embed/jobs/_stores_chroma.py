"""Chroma: cosine distance, an approximate index (HNSW)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_embed.jobs._store import Hit, Store, metadata, storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["ChromaStore"]


class _Ready:
    """LangChain's `Embeddings`, for vectors that are made already."""

    vectors: NDArray[np.float32]

    def embed_documents(self, texts: list[str]) -> NDArray[np.float32]:  # noqa: ARG002 - their vectors are here
        return self.vectors


class ChromaStore(Store):
    """A collection in a folder of Chroma's."""

    kind = "chroma"

    def __init__(self, place: Any) -> None:
        super().__init__(place)
        self._client: Any = None
        self._store: Any = None
        self._ready = _Ready()

    def _connected(self) -> Any:
        if self._client is None:
            import chromadb  # noqa: PLC0415 - extra

            self._client = chromadb.PersistentClient(str(self.place.path))
        return self._client

    def exists(self) -> bool:
        """See `Store`."""
        assert self.place.path is not None  # noqa: S101 - never a server
        if not (self.place.path / "chroma.sqlite3").exists():
            return False
        from chromadb.errors import NotFoundError  # noqa: PLC0415 - extra

        try:
            self._connected().get_collection(self.place.collection, embedding_function=None)
        except NotFoundError:
            return False
        return True

    def clear(self) -> None:
        """See `Store`."""
        self._connected().delete_collection(self.place.collection)

    def _opened(self, *, make: bool) -> Any:
        from langchain_chroma import Chroma  # noqa: PLC0415 - extra

        return Chroma(
            self.place.collection,
            self._ready,  # type: ignore[arg-type,unused-ignore]
            client=self._connected(),
            collection_configuration={"hnsw": {"space": "cosine"}} if make else None,
            create_collection_if_not_exists=make,
        )

    def _upsert(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        if self._store is None:
            self._store = self._opened(make=True)
        most = self._connected().get_max_batch_size()
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            self._ready.vectors = vectors[start : start + most]
            # Not by an upsert: it moves a vector within the index and leaves some that no search reaches (1.5.9).
            if there := self._store.get([row.id for row in some], include=[])["ids"]:
                self._store.delete(there)
            self._store.add_texts(
                [row.text for row in some],
                [{name: storable(value) for name, value in metadata(row).items()} for row in some],
                [row.id for row in some],
            )

    def _delete(self, ids: Sequence[str]) -> None:
        collection = self._connected().get_collection(self.place.collection, embedding_function=None)
        most = self._connected().get_max_batch_size()
        for start in range(0, len(ids), most):
            collection.delete(ids=list(ids[start : start + most]))

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """See `Store`."""
        found = self._opened(make=False).similarity_search_by_vector_with_relevance_scores(vector.tolist(), k)
        return [Hit(doc.metadata.pop("id"), 1 - distance, doc.page_content, doc.metadata) for doc, distance in found]

    def close(self) -> None:
        """See `Sink`."""
        self._store = None
        if self._client is not None:
            client, self._client = self._client, None
            getattr(client, "close", lambda: None)()  # older ones have none

    def how_to_open(self, fingerprint: str) -> dict[str, str]:
        """See `Store`."""
        path, name, expect = (json.dumps(value) for value in (self.place.address, self.place.collection, fingerprint))
        return {
            "LangChain": (
                "from langchain_chroma import Chroma\n"
                "from langchain_vllm_embed import VLLMEmbeddings\n\n"
                f"embeddings = VLLMEmbeddings(expect={expect})  # and the settings of the job\n"
                f"store = Chroma({name}, embeddings, persist_directory={path})"
            ),
            "LlamaIndex": (
                "import chromadb\n"
                "from llama_index.core import VectorStoreIndex\n"
                "from llama_index.vector_stores.chroma import ChromaVectorStore\n"
                "from llama_index_vllm_embed import VLLMEmbedding\n\n"
                f"embed_model = VLLMEmbedding(expect={expect})  # and the settings of the job\n"
                f"store = ChromaVectorStore(chromadb.PersistentClient({path}).get_collection({name}))\n"
                "index = VectorStoreIndex.from_vector_store(store, embed_model)"
            ),
        }
