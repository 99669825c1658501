from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode

from llama_index_conformance.basis import HOOKS, QUESTION, TEXTS, Basis
from llama_index_conformance.observers import awaited


class Methods(Basis):
    """Every hook and method, sync and async, from scripts, running event loops and threads."""

    @pytest.mark.parametrize("hook", HOOKS)
    def test_overrides_every_hook(self, hook):
        """The base class's own ones send one text at a time, or block the event loop."""
        assert getattr(type(self.make()), hook) is not getattr(BaseEmbedding, hook)

    @pytest.mark.parametrize("method", ["_get_query_embedding", "get_query_embedding"])
    def test_query(self, door, method):
        self.check(door(self.make(), method, QUESTION), QUESTION, query=True)

    @pytest.mark.parametrize("method", ["_get_text_embedding", "get_text_embedding"])
    def test_text(self, door, method):
        self.check(door(self.make(), method, TEXTS[0]), TEXTS[0])

    @pytest.mark.parametrize("method", ["_get_text_embeddings", "get_text_embedding_batch"])
    def test_texts_in_order(self, door, method):
        self.check_all(door(self.make(), method, list(TEXTS)))

    @pytest.mark.parametrize("num_workers", [None, 2])
    def test_more_texts_than_embed_batch_size(self, door, num_workers):
        embedding = self.make(embed_batch_size=3, num_workers=num_workers)
        self.check_all(door(embedding, "get_text_embedding_batch", list(TEXTS)))

    def test_show_progress_goes_to_stderr(self, door, capfd):
        embedding = self.make(embed_batch_size=3)
        self.check_all(door(embedding, "get_text_embedding_batch", list(TEXTS), show_progress=True))
        captured = capfd.readouterr()
        assert "Generating embeddings" in captured.err
        assert captured.out == ""

    def test_no_texts(self, door):
        assert door(self.make(), "get_text_embedding_batch", []) == []

    def test_the_same_text_twice(self, door):
        texts = [TEXTS[0], TEXTS[1], TEXTS[0]]
        self.check_all(door(self.make(), "get_text_embedding_batch", texts), texts)

    def test_aggregate_of_queries(self, door):
        queries = [QUESTION, TEXTS[1]]
        mean = np.mean([self.query_reference(query) for query in queries], axis=0)
        assert np.allclose(door(self.make(), "get_agg_embedding_from_queries", queries), mean, atol=1e-4)
        first = door(self.make(), "get_agg_embedding_from_queries", queries, lambda vectors: vectors[0])
        self.check(first, QUESTION, query=True)

    def test_similarity(self):
        embedding = self.make()
        question = embedding.get_query_embedding(QUESTION)
        near, far = embedding.get_text_embedding_batch(list(TEXTS[:2]))
        assert embedding.similarity(question, near) > embedding.similarity(question, far)

    def test_a_transformation_of_nodes(self, door):
        nodes = door(self.make(), "__call__", [TextNode(text=text) for text in TEXTS])
        self.check_all([node.embedding for node in nodes])

    def test_one_object_over_four_event_loops(self):
        embedding = self.make()
        for _ in range(4):
            self.check_all(awaited(embedding, "get_text_embedding_batch", list(TEXTS)))
        self.check(embedding.get_query_embedding(QUESTION), QUESTION, query=True)

    @pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.startswith("_a")])
    def test_the_event_loop_runs_on_meanwhile(self, hook):
        async def turns() -> int:
            task = asyncio.ensure_future(getattr(self.make(), hook)(list(TEXTS) if hook.endswith("s") else TEXTS[0]))
            count = 0
            while not task.done():
                await asyncio.sleep(0)
                count += 1
            await task
            return count

        assert asyncio.run(turns()) > 2  # a call that blocks is done in the first turn

    def test_many_awaited_at_once(self):
        async def together() -> list[Any]:
            embedding = self.make()
            return await asyncio.gather(*[embedding.aget_text_embedding(text) for text in TEXTS * 3])

        self.check_all(asyncio.run(together()), TEXTS * 3)

    def test_from_threads_at_once(self):
        embedding = self.make()
        with ThreadPoolExecutor(16) as threads:
            results = list(threads.map(lambda _: embedding.get_text_embedding_batch(list(TEXTS)), range(16)))
        for vectors in results:
            self.check_all(vectors)
