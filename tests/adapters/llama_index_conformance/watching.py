from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.callbacks import CallbackManager, EventPayload
from llama_index.core.embeddings import resolve_embed_model
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.storage.kvstore import SimpleKVStore

from llama_index_conformance.basis import QUESTION, TEXTS, Basis
from llama_index_conformance.observers import Callbacks, Events, Limiter

if TYPE_CHECKING:
    from collections.abc import Iterator


class Watching(Basis):
    """Callbacks, instrumentation events, LlamaIndex's cache and rate limiter."""

    @pytest.mark.parametrize("method", ["get_query_embedding", "get_text_embedding"])
    def test_callbacks_of_one_text(self, door, method):
        handler = Callbacks()
        vector = door(self.make(callback_manager=CallbackManager([handler])), method, QUESTION)
        assert len(handler.started) == len(handler.ended) == 1
        assert handler.ended[0][EventPayload.CHUNKS] == [QUESTION]
        assert handler.ended[0][EventPayload.EMBEDDINGS] == [vector]
        self.check_hides_secrets(handler.started)

    def test_callbacks_of_batches(self, door):
        handler = Callbacks()
        embedding = self.make(embed_batch_size=4, callback_manager=CallbackManager([handler]))
        vectors = door(embedding, "get_text_embedding_batch", list(TEXTS))
        assert len(handler.started) == 3
        assert [text for payload in handler.ended for text in payload[EventPayload.CHUNKS]] == list(TEXTS)
        assert [vector for payload in handler.ended for vector in payload[EventPayload.EMBEDDINGS]] == vectors

    def test_a_callback_manager_given_later(self, door):
        """LlamaIndex assigns it: `Settings.embed_model = ...` does, and so does every index."""
        handler = Callbacks()
        embedding, manager = self.make(), CallbackManager([handler])
        assert resolve_embed_model(embedding, callback_manager=manager) is embedding
        assert embedding.callback_manager is manager
        door(embedding, "get_query_embedding", QUESTION)
        assert len(handler.ended) == 1

    @pytest.fixture
    def events(self) -> Iterator[list[Any]]:
        """The instrumentation events of this test."""
        handler, root = Events(), get_dispatcher()
        Events.seen.clear()
        root.add_event_handler(handler)
        yield Events.seen
        root.event_handlers.remove(handler)

    def test_instrumentation_events(self, door, events):
        vectors = door(self.make(embed_batch_size=4), "get_text_embedding_batch", list(TEXTS))
        starts = [event for event in events if isinstance(event, EmbeddingStartEvent)]
        ends = [event for event in events if isinstance(event, EmbeddingEndEvent)]
        assert len(starts) == len(ends) == 3
        assert [text for event in ends for text in event.chunks] == list(TEXTS)
        assert [vector for event in ends for vector in event.embeddings] == vectors
        self.check_hides_secrets([event.model_dump() for event in starts])

    def test_embeddings_cache_is_filled_and_asked(self, door):
        cache, planted = SimpleKVStore(), [0.5, 0.25]
        cache.put(TEXTS[1], {"id": planted}, collection="embeddings")
        embedding = self.make(embeddings_cache=cache)
        first, second, third = door(embedding, "get_text_embedding_batch", list(TEXTS[:3]))
        assert second == planted
        self.check_all([first, third], [TEXTS[0], TEXTS[2]])
        assert list((cache.get(TEXTS[2], collection="embeddings") or {}).values()) == [third]
        assert door(embedding, "get_text_embedding", TEXTS[1]) == planted

    def test_rate_limiter_is_asked_once_a_batch(self, door):
        limiter = Limiter()
        embedding = self.make(embed_batch_size=4, rate_limiter=limiter)
        self.check_all(door(embedding, "get_text_embedding_batch", list(TEXTS)))
        assert limiter.acquired == 3
