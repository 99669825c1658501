"""The README's recipes on real vLLM: the right vectors come out of each framework's way to fill a store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from llama_index.core import Document as LlamaDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding

pytestmark = pytest.mark.live

LEAST_COSINE = 0.99999
TEXTS = [
    "Saturn has rings of ice and rock.",
    "토성에는 얼음과 돌로 된 고리가 있다.",
    *(f"Lake number {i} lies {100 + 7 * i} metres above the sea." for i in range(70)),
]
QUESTION = "Which planet has rings?"


def cosine(one: Any, other: Any) -> float:
    return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.fixture
def chroma(live_server) -> Any:
    chromadb = pytest.importorskip("chromadb", reason='NOT TESTED with Chroma: pip install "vllm-embed[chroma]"')
    from langchain_chroma import Chroma

    client = chromadb.EphemeralClient(settings=chromadb.Settings(anonymized_telemetry=False))

    def made(name: str) -> Any:
        return Chroma(name, VLLMEmbeddings(**live_server.options), client=client)

    return made


@pytest.fixture
def embed_model(live_server) -> VLLMEmbedding:
    return VLLMEmbedding(**live_server.options)


def check(store: Any, encode: Any) -> None:
    stored = store.get(include=["documents", "embeddings"])
    assert sorted(stored["documents"]) == sorted(TEXTS)
    for text, vector in list(zip(stored["documents"], stored["embeddings"], strict=True))[::7]:
        assert cosine(vector, encode(text)) >= LEAST_COSINE
    assert store.similarity_search(QUESTION, k=1)[0].page_content == TEXTS[0]


def test_chroma_from_documents(live_server, chroma, encode) -> None:
    empty = chroma("unused")
    store = type(empty).from_documents(
        [Document(text) for text in TEXTS], empty.embeddings, client=empty._client, collection_name="from-documents"
    )
    check(store, encode)


def test_langchains_index(chroma, encode) -> None:
    store = chroma("index")
    manager = InMemoryRecordManager(store.embeddings.namespace)
    manager.create_schema()
    documents = [Document(text, metadata={"source": f"{i}.txt"}) for i, text in enumerate(TEXTS)]
    options = {"batch_size": 5_000, "cleanup": "incremental", "source_id_key": "source", "key_encoder": "sha256"}
    assert index(documents, manager, store, **options)["num_added"] == len(TEXTS)
    check(store, encode)
    requests = store.embeddings.embedder.stats().requests
    assert index(documents, manager, store, **options)["num_skipped"] == len(TEXTS)
    assert store.embeddings.embedder.stats().requests == requests


def test_a_vector_store_index(embed_model, encode) -> None:
    documents = [LlamaDocument(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    made = VectorStoreIndex.from_documents(documents, embed_model=embed_model, insert_batch_size=10_000)
    vectors = made.vector_store.data.embedding_dict
    assert len(vectors) == len(TEXTS)
    for node_id in list(vectors)[::7]:
        assert cosine(vectors[node_id], encode(made.docstore.get_node(node_id).text)) >= LEAST_COSINE
    assert made.as_retriever(similarity_top_k=1).retrieve(QUESTION)[0].text == TEXTS[0]


def test_an_ingestion_pipeline_of_two_processes(embed_model, encode) -> None:
    """`tokenizer=list` counts characters. LlamaIndex's default (0.14.25) unpickles tiktoken, which wants a download:
    without a network each worker dies of that without a word, and the pool waits for ever."""
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(chunk_size=2_000, tokenizer=list), embed_model])
    documents = [LlamaDocument(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    nodes = pipeline.run(documents=documents, num_workers=2)
    assert [node.text for node in nodes] == TEXTS
    for node in nodes[::7]:
        assert cosine(node.embedding, encode(node.text)) >= LEAST_COSINE
