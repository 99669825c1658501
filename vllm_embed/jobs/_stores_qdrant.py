"""Qdrant, in a folder or a server: cosine; exact in a folder, an approximate index (HNSW) in a server."""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING, Any, Final

import orjson

from vllm_embed.jobs._store import Hit, Store, as_json, metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["QdrantStore"]

_ROWS: Final = 256
"""In one request: a server takes at most 32 MB, and a vector is up to 100 kB of JSON."""
_TIMEOUT_S: Final = 60
_NAMESPACE: Final = uuid.NAMESPACE_OID
_OWN: Final = ("_id", "_collection_name")
"""What LangChain adds to the metadata of a point."""


class QdrantStore(Store):
    """A collection. Points are named by the UUID of their row's id, and hold what either framework reads.

    LangChain reads `page_content` and `metadata` of a point, LlamaIndex a whole node in `_node_content`: so the text is
    there twice, and both open it as their own.
    """

    kind = "qdrant"

    def __init__(self, place: Any) -> None:
        super().__init__(place)
        self._client: Any = None

    def _connected(self) -> Any:
        if self._client is None:
            from qdrant_client import QdrantClient  # noqa: PLC0415 - extra

            if self.place.path is not None:
                self._client = QdrantClient(path=str(self.place.path), force_disable_check_same_thread=True)
            else:
                key = os.environ.get("QDRANT_API_KEY") or None
                self._client = QdrantClient(
                    url=self.place.address, api_key=key, timeout=_TIMEOUT_S, check_compatibility=False
                )
        return self._client

    def exists(self) -> bool:
        """See `Store`."""
        if self.place.path is not None and not (self.place.path / "meta.json").exists():
            return False
        return bool(self._connected().collection_exists(self.place.collection))

    def clear(self) -> None:
        """See `Store`."""
        self._connected().delete_collection(self.place.collection)

    def _opened(self) -> Any:
        from langchain_qdrant import QdrantVectorStore  # noqa: PLC0415 - extra

        return QdrantVectorStore(
            self._connected(), self.place.collection, validate_embeddings=False, validate_collection_config=False
        )

    def _writable(self) -> None:
        super()._writable()
        self._connected()  # a folder that is open elsewhere is told before the first text is embedded

    def _upsert(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        from qdrant_client import models  # noqa: PLC0415 - extra

        client, name = self._connected(), self.place.collection
        if not self._width and not client.collection_exists(name):
            params = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
            client.create_collection(name, vectors_config={"": params})  # as LangChain's class makes one
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            batch = models.Batch(
                ids=[_point(row.id) for row in some],
                vectors={"": vectors[start : start + _ROWS].tolist()},
                payloads=[_payload(row) for row in some],
            )
            client.upsert(name, batch, wait=True)

    def _delete(self, ids: Sequence[str]) -> None:
        self._opened().delete([_point(key) for key in ids])

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """See `Store`."""
        hits = []
        for doc, score in self._opened().similarity_search_with_score_by_vector(vector.tolist(), k):
            for name in _OWN:
                doc.metadata.pop(name, None)
            hits.append(Hit(doc.metadata.pop("id"), score, doc.page_content, doc.metadata))
        return hits

    def close(self) -> None:
        """See `Sink`."""
        if self._client is not None:
            client, self._client = self._client, None
            client.close()

    def how_to_open(self, fingerprint: str) -> dict[str, str]:
        """See `Store`."""
        address, name, expect = (
            json.dumps(value) for value in (self.place.address, self.place.collection, fingerprint)
        )
        how, key = f"path={address}", ""
        if self.place.path is None:
            how, key = f'url={address}, api_key=os.environ.get("QDRANT_API_KEY")', "import os\n\n"
        return {
            "LangChain": (
                f"{key}from langchain_qdrant import QdrantVectorStore\n"
                "from langchain_vllm_embed import VLLMEmbeddings\n\n"
                f"embeddings = VLLMEmbeddings(expect={expect})  # and the settings of the job\n"
                f"store = QdrantVectorStore.from_existing_collection({name}, embeddings, {how})"
            ),
            "LlamaIndex": (
                f"{key}from llama_index.core import VectorStoreIndex\n"
                "from llama_index.vector_stores.qdrant import QdrantVectorStore\n"
                "from llama_index_vllm_embed import VLLMEmbedding\n"
                "from qdrant_client import QdrantClient\n\n"
                f"embed_model = VLLMEmbedding(expect={expect})  # and the settings of the job\n"
                f"store = QdrantVectorStore({name}, QdrantClient({how}))\n"
                "index = VectorStoreIndex.from_vector_store(store, embed_model)"
            ),
        }


def _point(key: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, key))


def _payload(row: Row) -> dict[str, Any]:
    held = {name: as_json(value) for name, value in metadata(row).items()}
    node = {"id_": row.id, "text": row.text, "metadata": held, "class_name": "TextNode"}
    return {
        "page_content": row.text,
        "metadata": held,
        "_node_content": orjson.dumps(node).decode(),
        "_node_type": "TextNode",
    }
