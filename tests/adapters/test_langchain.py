from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_vllm_embed import VLLMEmbeddings
from vllm_embed.errors import InvalidInputError

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings


class TestUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        return {"model": "BAAI/bge-m3"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, object], dict[str, object]]:
        return (
            {"VLLM_BASE_URL": "http://gpu.example:8000/v1", "VLLM_API_KEY": "sk-a", "OPENAI_API_KEY": "sk-b"},
            {"model": "BAAI/bge-m3"},
            {"base_url": "http://gpu.example:8000/v1", "api_key": "sk-a", "model": "BAAI/bge-m3"},
        )


class TestIntegration(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        return {"base_url": self.server.base_url}


@pytest.fixture
def embeddings(server):
    return VLLMEmbeddings(base_url=server.base_url)


def test_openai_api_key_is_never_read(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:1/v1")
    assert VLLMEmbeddings().api_key is None
    assert VLLMEmbeddings().base_url == "http://localhost:8000/v1"


def test_vectors_are_lists_of_python_floats_in_order(server, embeddings):
    texts = [f"text {number}" for number in range(200)]
    for vectors in (embeddings.embed_documents(texts), asyncio.run(embeddings.aembed_documents(texts))):
        assert type(vectors) is list
        assert {type(vector) for vector in vectors} == {list}
        assert {type(number) for vector in vectors for number in vector} == {float}
        assert vectors == [server.vector(text).tolist() for text in texts]
    for vector in (embeddings.embed_query("text 7"), asyncio.run(embeddings.aembed_query("text 7"))):
        assert type(vector) is list
        assert vector == server.vector("text 7").tolist()


def test_no_texts_give_no_vectors(server, embeddings):
    assert embeddings.embed_documents([]) == asyncio.run(embeddings.aembed_documents([])) == []
    assert server.requests == 0


def test_one_object_serves_scripts_loops_and_running_loops(server, embeddings):
    right = server.vector("a").tolist()

    async def cell():
        return embeddings.embed_query("a"), await embeddings.aembed_query("a")

    assert embeddings.embed_query("a") == right
    for _ in range(4):
        assert asyncio.run(cell()) == (right, right)
    assert embeddings.embed_query("a") == right


def test_a_refused_text_is_named_and_the_others_are_kept(server, embeddings):
    server.refuse = lambda text: "The decoder prompt cannot be empty" if "bad" in text else None
    with pytest.raises(InvalidInputError) as caught:
        embeddings.embed_documents(["a", "bad", "c"])
    assert caught.value.indexes == (1,)
    assert caught.value.vectors[2].tolist() == server.vector("c").tolist()


def test_a_vector_store_finds_the_nearest(embeddings):
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(page_content=text) for text in ("Saturn has rings", "Yeast makes bread rise")])
    assert store.similarity_search("what has rings", k=1)[0].page_content == "Saturn has rings"
    found = asyncio.run(store.asimilarity_search("how does bread rise", k=1))
    assert found[0].page_content == "Yeast makes bread rise"


def test_the_embedder_gives_arrays_and_counts(server, embeddings):
    embeddings.embed_documents(["a", "b"])
    assert embeddings.embedder.embed(["a"]).shape == (1, 16)
    assert embeddings.embedder.stats().texts == server.texts == 3
