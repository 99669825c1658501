"""Caches of the frameworks: a new prompt, width or model gets no old vector; a new address embeds nothing again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from langchain_core.stores import InMemoryByteStore
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import TextNode

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed.testing import FakeVLLMServer

TEXTS = ["Saturn has rings.", "토성에는 고리가 있다."]
KEY = "key-of-this-test"

DECIDES = [
    pytest.param({"document_prompt": "passage: "}, id="prompt"),
    pytest.param({"document_prompt": "auto"}, id="the model's own prompt"),
    pytest.param({"dimensions": 8}, id="dimension"),
    pytest.param({"model": "second"}, id="model"),
    pytest.param({"normalize": False}, id="normalization"),
    pytest.param({"unicode": "nfkc"}, id="unicode form"),
    pytest.param({"long_text": "truncate"}, id="long texts"),
    pytest.param({"blank_text": "zero"}, id="blank texts"),
]
TRANSPORT = [
    pytest.param({"api_key": "another-key"}, id="key"),
    pytest.param({"timeout": 7.0, "retry_deadline": 9.0, "max_retries": 1}, id="timeouts"),
    pytest.param({"batch_size": 1, "max_batch_chars": 10, "max_concurrency": 1}, id="batches"),
    pytest.param({"default_headers": {"X-Team": "search"}}, id="headers"),
]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "document": "d: "}}')
    with FakeVLLMServer(dimension=16, model=["first", "second"], root=str(tmp_path), matryoshka=True) as fake:
        yield fake


def options(server: FakeVLLMServer, **changes: Any) -> dict[str, Any]:
    return {"base_url": server.base_url, "model": "first", "api_key": KEY, **changes}


def fresh(server: FakeVLLMServer, changes: dict[str, Any]) -> Any:
    """The vectors without any cache."""
    return VLLMEmbeddings(**options(server, **changes)).embed_documents(TEXTS)


class LangChainCache:
    """`CacheBackedEmbeddings` over one store, as the README sets it up."""

    def __init__(self) -> None:
        reason = "NOT TESTED with LangChain's CacheBackedEmbeddings: pip install langchain-classic"
        self.cached = pytest.importorskip("langchain_classic.embeddings.cache", reason=reason).CacheBackedEmbeddings
        self.store = InMemoryByteStore()

    def __call__(self, **changes: Any) -> Any:
        return self.of(VLLMEmbeddings(**changes)).embed_documents(TEXTS)

    def written(self) -> str:
        assert all(key.startswith("first-") for key in self.store.store)  # the namespace
        return repr(self.store.store)

    def of(self, embeddings: VLLMEmbeddings, **more: Any) -> Any:
        return self.cached.from_bytes_store(
            embeddings, self.store, namespace=embeddings.namespace, key_encoder="sha256", **more
        )


class AsyncLangChainCache(LangChainCache):
    def __call__(self, **changes: Any) -> Any:
        return asyncio.run(self.of(VLLMEmbeddings(**changes)).aembed_documents(TEXTS))


class LlamaIndexCache:
    """`IngestionPipeline` over one cache."""

    def __init__(self) -> None:
        self.cache = IngestionCache()

    def pipeline(self, changes: dict[str, Any]) -> tuple[IngestionPipeline, list[TextNode]]:
        nodes = [TextNode(text=text, id_=text) for text in TEXTS]
        return IngestionPipeline(transformations=[VLLMEmbedding(**changes)], cache=self.cache), nodes

    def written(self) -> str:
        return repr(self.cache.cache.get_all(self.cache.collection))

    def __call__(self, **changes: Any) -> Any:
        pipeline, nodes = self.pipeline(changes)
        return [node.embedding for node in pipeline.run(nodes=nodes)]


class AsyncLlamaIndexCache(LlamaIndexCache):
    def __call__(self, **changes: Any) -> Any:
        pipeline, nodes = self.pipeline(changes)
        return [node.embedding for node in asyncio.run(pipeline.arun(nodes=nodes))]


@pytest.fixture(
    params=[LangChainCache, AsyncLangChainCache, LlamaIndexCache, AsyncLlamaIndexCache],
    ids=["CacheBackedEmbeddings", "CacheBackedEmbeddings async", "IngestionPipeline", "IngestionPipeline async"],
)
def embed(request):
    """Embeds `TEXTS` through a framework's cache that outlives the embeddings."""
    return request.param()


@pytest.mark.parametrize("changes", DECIDES)
def test_what_decides_a_vector_is_embedded_again(server, embed, changes):
    embed(**options(server))
    sent = server.texts
    vectors = embed(**options(server, **changes))
    assert server.texts >= sent + len(TEXTS)
    np.testing.assert_allclose(vectors, fresh(server, changes), atol=1e-6)


def test_the_models_own_prompts_are_cached_as_what_they_are(server, embed, tmp_path):
    """Written out they are the same vectors; in another revision of the model they are not."""
    before = embed(**options(server, document_prompt="auto"))
    requests = server.requests
    np.testing.assert_allclose(embed(**options(server, document_prompt="d: ")), before, atol=1e-6)
    assert server.requests == requests
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"document": "other: "}}')
    after = embed(**options(server, document_prompt="auto"))
    np.testing.assert_allclose(after, fresh(server, {"document_prompt": "other: "}), atol=1e-6)


@pytest.mark.parametrize("changes", TRANSPORT)
def test_what_does_not_decide_it_is_never_embedded_again(server, embed, changes):
    before = embed(**options(server))
    requests = server.requests
    after = embed(**options(server, **changes))
    assert server.requests == requests
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_another_address_is_never_asked(server, embed):
    before = embed(**options(server))
    with FakeVLLMServer(dimension=16, model=["first", "second"]) as moved:
        after = embed(**options(server, base_url=[moved.base_url, server.base_url]))
        assert moved.requests == 0
    gone = embed(**options(server, base_url="http://127.0.0.1:1/v1"))  # nothing listens
    np.testing.assert_allclose(after, before, atol=1e-6)
    np.testing.assert_allclose(gone, before, atol=1e-6)


def test_an_unnamed_model_is_cached_under_its_name(server, embed):
    """Only the list of models is asked for, and another model behind the same address is embedded again."""
    with FakeVLLMServer(dimension=16, model="first") as one, FakeVLLMServer(dimension=16, model="second") as other:
        embed(**options(server))
        embed(base_url=one.base_url)
        assert one.texts == 0
        embed(base_url=other.base_url)
        assert other.texts == len(TEXTS)


def test_a_cache_holds_no_key_and_no_address(server, embed):
    embed(**options(server))
    written = embed.written()
    assert len(written) > 100
    assert KEY not in written
    assert server.base_url not in written


def test_queries_need_a_store_of_their_own_where_the_prompts_differ(server):
    """With `query_embedding_cache=True` LangChain takes the vector of a document that reads like the query."""
    langchain = LangChainCache()
    embeddings = VLLMEmbeddings(**options(server), query_prompt="q: ", document_prompt="d: ")
    cached = langchain.of(embeddings, query_embedding_cache=InMemoryByteStore())
    documents = cached.embed_documents(TEXTS)
    for _ in range(2):
        np.testing.assert_allclose(cached.embed_query(TEXTS[0]), server.vector(f"q: {TEXTS[0]}"), atol=1e-6)
    np.testing.assert_allclose(documents[0], server.vector(f"d: {TEXTS[0]}"), atol=1e-6)
    assert server.texts == len(TEXTS) + 1
    trap = langchain.of(embeddings, query_embedding_cache=True)
    np.testing.assert_allclose(trap.embed_query(TEXTS[0]), server.vector(f"d: {TEXTS[0]}"), atol=1e-6)
