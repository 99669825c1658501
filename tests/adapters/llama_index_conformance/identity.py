from __future__ import annotations

import json
import pickle
import threading
from copy import deepcopy

import pytest
from llama_index.core.callbacks import CallbackManager

from llama_index_conformance.basis import TEXTS, Basis
from llama_index_conformance.observers import Callbacks, Limiter

COPIES = {
    "pickle": lambda embedding: pickle.loads(pickle.dumps(embedding)),
    "deepcopy": deepcopy,
    "model_copy": lambda embedding: embedding.model_copy(),
    "model_copy(deep=True)": lambda embedding: embedding.model_copy(deep=True),
}


class Identity(Basis):
    """Dumps, payloads, copies and pickles."""

    def test_payload_is_plain_data_without_secrets(self):
        payload = self.make().to_payload()
        assert json.loads(json.dumps(payload)) == payload
        self.check_hides_secrets(payload)

    def test_class_name_is_its_own(self):
        embedding = self.make()
        assert embedding.class_name() not in {"base_component", "BaseEmbedding"}
        assert embedding.to_dict()["class_name"] == embedding.class_name()

    def test_hides_secrets(self):
        embedding = self.make()
        self.check_hides_secrets([repr(embedding), str(embedding), embedding.to_json(), embedding.model_dump()])

    def test_dict_is_plain_data_and_use_does_not_change_it(self):
        """IngestionPipeline caches vectors under it."""
        embedding = self.make()
        before = embedding.to_dict()
        assert json.loads(json.dumps(before)) == before
        embedding.get_text_embedding(TEXTS[0])
        assert embedding.to_dict() == before == self.make().to_dict()

    def test_dict_and_json_make_an_equal_embedding(self, door):
        embedding = self.make()
        for again in (
            type(embedding).from_dict(embedding.to_dict(), **self.transport()),
            type(embedding).from_json(embedding.to_json(), **self.transport()),
        ):
            assert again.to_dict() == embedding.to_dict()
            self.check_all(door(again, "get_text_embedding_batch", list(TEXTS)))

    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
    def test_copies_of_a_used_embedding(self, door, copied):
        embedding = self.make(embed_batch_size=7)
        embedding.get_text_embedding(TEXTS[0])
        twin = copied(embedding)
        assert type(twin) is type(embedding)
        assert twin.embed_batch_size == 7
        assert twin.to_dict() == embedding.to_dict()
        self.check_all(door(twin, "get_text_embedding_batch", list(TEXTS)))
        self.check(embedding.get_text_embedding(TEXTS[0]), TEXTS[0])

    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
    def test_copies_of_a_watched_embedding(self, copied):
        """Callback handlers and limiters hold locks as a rule: they are shared or left behind, and hinder no copy."""
        limiter, handler = Limiter(), Callbacks()
        limiter.lock = handler.lock = threading.Lock()
        embedding = self.make(callback_manager=CallbackManager([handler]), rate_limiter=limiter)
        self.check(copied(embedding).get_text_embedding(TEXTS[0]), TEXTS[0])
