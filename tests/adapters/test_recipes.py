"""The README's recipes run at full speed, seen in counters: whole requests, and as many in flight as may be.

Held requests make it exact: the server answers the first only when so many have arrived at the same time.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Document as LlamaDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import TextNode

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_embed.testing import FakeVLLMServer

IN_FLIGHT = 16  # max_concurrency's default
ABOARD = 64  # batch_size's default


def texts(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def documents(count: int) -> list[Document]:
    return [Document(text, metadata={"at": i}) for i, text in enumerate(texts(count))]


def held(server: FakeVLLMServer, work: Callable[[], Any], in_flight: int = IN_FLIGHT) -> Any:
    """What `work` gives; its first requests are answered when so many are there."""
    with ThreadPoolExecutor(1) as pool, server.hold():
        done = pool.submit(work)
        server.wait_for(requests=in_flight, timeout_s=60)
        server.release()
        return done.result()


@pytest.fixture
def embeddings(server: FakeVLLMServer) -> VLLMEmbeddings:
    return VLLMEmbeddings(model="fake-model", base_url=server.base_url)


@pytest.fixture
def embed_model(server: FakeVLLMServer) -> VLLMEmbedding:
    return VLLMEmbedding(model="fake-model", base_url=server.base_url)


class TestChroma:
    @pytest.fixture
    def chroma(self) -> Any:
        chromadb = pytest.importorskip("chromadb", reason='NOT TESTED with Chroma: pip install "vllm-embed[chroma]"')
        from langchain_chroma import Chroma

        client = chromadb.EphemeralClient(settings=chromadb.Settings(anonymized_telemetry=False))
        return Chroma, {"client": client, "collection_name": f"recipe-{uuid4()}"}

    def test_from_documents_fills_requests_and_the_server(self, server, embeddings, chroma) -> None:
        """It hands over as many documents as Chroma takes at once, some thousands."""
        make, options = chroma
        most = options["client"].get_max_batch_size()
        count = most + 500
        store = held(server, lambda: make.from_documents(documents(count), embeddings, **options))
        assert server.requests == math.ceil(most / ABOARD) + math.ceil(500 / ABOARD)
        assert server.most_in_flight == IN_FLIGHT
        assert store.similarity_search("text 77", k=1)[0].metadata == {"at": 77}

    def test_index_takes_no_more_at_once_than_chroma(self, embeddings, chroma) -> None:
        """Why the recipe says 5,000: Chroma refuses a larger batch, with the number that it takes."""
        make, options = chroma
        store = make(embedding_function=embeddings, **options)
        most = options["client"].get_max_batch_size()
        assert most >= 5_000
        manager = InMemoryRecordManager("chroma")
        manager.create_schema()
        with pytest.raises(Exception, match=str(most)):
            index(documents(most + 1), manager, store, batch_size=most + 1, key_encoder="sha256")


class TestIndex:
    @pytest.fixture
    def manager(self) -> InMemoryRecordManager:
        manager = InMemoryRecordManager("docs")
        manager.create_schema()
        return manager

    def test_its_default_sends_two_requests_at_a_time(self, server, embeddings, manager) -> None:
        """Why the recipe raises batch_size: slices of 100 are a request of 64 and one of 36, and then a wait."""
        store = InMemoryVectorStore(embeddings)
        held(server, lambda: index(documents(1_000), manager, store, key_encoder="sha256"), in_flight=2)
        assert server.requests == 20
        assert server.most_in_flight == 2

    def test_a_large_batch_fills_requests_and_the_server(self, server, embeddings, manager) -> None:
        store = InMemoryVectorStore(embeddings)

        def run() -> Any:
            return index(documents(6_000), manager, store, batch_size=5_000, key_encoder="sha256")

        assert held(server, run)["num_added"] == 6_000
        assert server.requests == math.ceil(5_000 / ABOARD) + math.ceil(1_000 / ABOARD)
        assert server.most_in_flight == IN_FLIGHT
        before = server.requests
        assert run()["num_skipped"] == 6_000
        assert server.requests == before


class TestVectorStoreIndex:
    def test_it_fills_requests_and_the_server(self, server, embed_model) -> None:
        """Nodes come in slices of insert_batch_size, 2,048 by default: raised, one slice is all of them."""
        made = [LlamaDocument(text=text) for text in texts(3_000)]
        found = held(
            server,
            lambda: VectorStoreIndex.from_documents(made, embed_model=embed_model, insert_batch_size=10_000),
        )
        assert server.requests == math.ceil(3_000 / ABOARD)
        assert server.most_in_flight == IN_FLIGHT
        assert found.as_retriever(similarity_top_k=1).retrieve("text 77")[0].text == "text 77"

    def test_its_default_slice_fills_the_server_too(self, server, embed_model) -> None:
        nodes = [TextNode(text=text) for text in texts(3_000)]
        held(server, lambda: VectorStoreIndex(nodes, embed_model=embed_model))
        assert server.requests == math.ceil(2_048 / ABOARD) + math.ceil((3_000 - 2_048) / ABOARD)
        assert server.most_in_flight == IN_FLIGHT

    def test_llama_indexs_own_slice_of_ten_would_not(self, server) -> None:
        """Why embed_batch_size is 10,000 here: with 10, as other classes have it, requests go out one by one."""
        small = VLLMEmbedding(model="fake-model", base_url=server.base_url, embed_batch_size=10)
        VectorStoreIndex([TextNode(text=text) for text in texts(300)], embed_model=small)
        assert server.requests == 30
        assert server.most_in_flight == 1


def test_a_pipeline_of_processes_fills_the_server_from_each_and_its_cache_is_kept(server) -> None:
    """Two processes have 16 requests in flight each; the next run finds its nodes in the cache of this process."""
    cache = IngestionCache()
    nodes = [TextNode(text=text, id_=text) for text in texts(4_096)]

    def run(**changes: Any) -> Any:
        options = {"model": "fake-model", "base_url": server.base_url, "api_key": "one", **changes}
        pipeline = IngestionPipeline(transformations=[VLLMEmbedding(**options)], cache=cache)
        return pipeline.run(nodes=[node.model_copy() for node in nodes], num_workers=2)

    made = held(server, run, in_flight=2 * IN_FLIGHT)
    assert [node.text for node in made] == texts(4_096)
    np.testing.assert_allclose(made[77].embedding, server.vector("text 77"), atol=1e-6)
    assert server.requests == 4_096 / ABOARD
    assert server.most_in_flight == 2 * IN_FLIGHT

    again = run(base_url="http://127.0.0.1:1/v1", api_key="another")  # nothing listens there, and nothing is asked
    assert [node.embedding for node in again] == [node.embedding for node in made]
    assert server.requests == 4_096 / ABOARD

    prompted = run(document_prompt="passage: ")
    assert server.texts == 2 * 4_096
    np.testing.assert_allclose(prompted[77].embedding, server.vector("passage: text 77"), atol=1e-6)


def test_the_pipelines_cache_is_of_a_run_as_a_whole(server, embed_model) -> None:
    """Why the recipe has a docstore for documents that come and go: one more node, and all are embedded again."""
    cache = IngestionCache()
    nodes = [TextNode(text=text, id_=text) for text in texts(10)]
    for count, sent in ((9, 9), (9, 9), (10, 19)):
        IngestionPipeline(transformations=[embed_model], cache=cache).run(nodes=nodes[:count])
        assert server.texts == sent


def test_with_a_docstore_only_new_documents_are_embedded(server, embed_model) -> None:
    from llama_index.core.storage.docstore import SimpleDocumentStore
    from llama_index.core.vector_stores import SimpleVectorStore

    pipeline = IngestionPipeline(
        transformations=[embed_model],
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
        disable_cache=True,
    )
    made = [LlamaDocument(text=text, id_=text) for text in texts(10)]
    for count, sent in ((9, 9), (9, 9), (10, 10)):
        pipeline.run(documents=made[:count])
        assert server.texts == sent
