from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index_conformance import LlamaIndexEmbeddingConformance
from llama_index_conformance.observers import Callbacks, Limiter

from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Settings
from vllm_embed.errors import ConfigurationError, InvalidInputError, ServerUnreachableError
from vllm_embed.testing import FakeVLLMServer

KEY = "sk-a-secret-key"

DECIDES_THE_VECTOR = {
    "model": "other",
    "query_prompt": "query: ",
    "document_prompt": "passage: ",
    "dimensions": 8,
    "dimensions_fallback": "client",
    "normalize": True,
    "long_text": "truncate",
    "blank_text": "zero",
    "unicode": "nfkc",
    "extra_body": {"use_activation": False},
}
"""Settings under which the same text has another vector, each with a value that is not the default."""

DECIDES_NO_VECTOR = {
    "base_url": "http://127.0.0.1:1/v1",
    "api_key": KEY,
    "batch_size": 7,
    "max_batch_chars": 70,
    "max_concurrency": 7,
    "timeout": 7.0,
    "max_retries": 7,
    "retry_deadline": 7.0,
    "default_headers": {"X-Tenant": "a"},
    "verify": False,
    "proxy": "http://127.0.0.1:1",
    "http_client": None,
    "expect": "somewhere.json",
    "show_progress": True,
    "embed_batch_size": 7,
    "num_workers": 7,
    "embeddings_cache": SimpleKVStore(),
    "rate_limiter": Limiter(),
    "callback_manager": CallbackManager([Callbacks()]),
}
"""Transport, and what LlamaIndex does around the vectors."""


class TestConformance(LlamaIndexEmbeddingConformance):
    secrets = (KEY,)

    @pytest.fixture(autouse=True)
    def _server(self):
        with FakeVLLMServer(dimension=384, api_key=KEY) as self.server:
            yield

    def make(self, **options):
        return VLLMEmbedding(base_url=self.server.base_url, api_key=KEY, **options)

    def reference(self, text):
        return self.server.vector(text)

    def transport(self):
        return {"base_url": self.server.base_url, "api_key": KEY}


class TestConformanceWithPrompts(TestConformance):
    test_pipeline_of_processes = None  # once is enough: it takes seconds

    def make(self, **options):
        return super().make(query_instruction="query: ", text_instruction="passage: {text}!", **options)

    def reference(self, text):
        return self.server.vector(f"passage: {text}!")

    def query_reference(self, text):
        return self.server.vector(f"query: {text}")


@pytest.mark.parametrize("name", ["model", "model_name"])
def test_the_model_has_one_name_under_both_options(name):
    embedding = VLLMEmbedding(**{name: "m"})
    assert embedding.model == embedding.model_name == embedding.to_payload()["model_name"] == "m"


def test_both_names_of_the_model_may_be_given_when_they_agree():
    assert VLLMEmbedding(model="m", model_name="m").model == "m"
    with pytest.raises(ConfigurationError, match="model is given twice, once as model_name"):
        VLLMEmbedding(model="m", model_name="n")


def test_the_name_of_the_model_cannot_be_assigned():
    with pytest.raises(ConfigurationError, match="model_name is frozen"):
        VLLMEmbedding(model="m").model_name = "n"


def test_understands_the_names_of_other_llama_index_embeddings(server):
    embedding = VLLMEmbedding(api_base=server.base_url, query_instruction="q: ", text_instruction="t: ")
    embedding.get_query_embedding("a")
    embedding.get_text_embedding("b")
    assert [body["input"] for body in server.bodies] == [["q: a"], ["t: b"]]


def test_one_slice_of_llama_index_is_many_requests(server):
    """`embed_batch_size` is the framework's, over its own limit of 2,048; `batch_size` is the request's."""
    server.hold()
    embedding = VLLMEmbedding(base_url=server.base_url, model="fake-model", embed_batch_size=50_000)
    assert embedding.embed_batch_size == 50_000
    assert VLLMEmbedding().embed_batch_size > 2_048
    server.release()
    embedding.get_text_embedding_batch([f"text {number}" for number in range(1_000)])
    assert sorted(len(body["input"]) for body in server.bodies)[1:] == [64] * 15
    with pytest.raises(ConfigurationError, match="embed_batch_size=0"):
        VLLMEmbedding(embed_batch_size=0)


def test_every_setting_either_decides_the_vector_or_does_not():
    """A new setting must be sorted into one of the two: forgotten, a stale vector comes out of a cache."""
    fields = set(VLLMEmbedding.model_fields) - {"model_name", "in_process", "engine_args"}
    assert fields == DECIDES_THE_VECTOR.keys() | DECIDES_NO_VECTOR.keys()
    assert set(Settings.model_fields) <= fields | {"in_process", "engine_args"}


@pytest.mark.parametrize("name", DECIDES_THE_VECTOR)
def test_dict_changes_with_what_decides_the_vector(name):
    options = {"model": "m", name: DECIDES_THE_VECTOR[name]}
    made = VLLMEmbedding(**options)
    assert made.to_dict() != VLLMEmbedding(model="m").to_dict()
    assert getattr(VLLMEmbedding.from_dict(made.to_dict()), name) == options[name]


def test_dict_holds_the_engines_arguments_that_decide_a_vector():
    arguments = {"dtype": "float32", "gpu_memory_utilization": 0.3}
    made = VLLMEmbedding(model="m", in_process=True, engine_args=arguments)
    assert made.to_dict()["engine_args"] == {"dtype": "float32"}
    again = VLLMEmbedding.from_dict(made.to_dict())
    assert (again.in_process, again.engine_args, again.model) == (True, {"dtype": "float32"}, "m")


@pytest.mark.parametrize("name", DECIDES_NO_VECTOR)
def test_dict_does_not_change_with_transport(name):
    made = VLLMEmbedding(model="m", **{name: DECIDES_NO_VECTOR[name]})
    assert made.to_dict() == made.dict() == made.model_dump() == VLLMEmbedding(model="m").to_dict()
    assert json.loads(made.model_dump_json()) == json.loads(made.to_json()) == made.to_dict()


def test_dict_holds_the_name_of_the_model_that_the_server_lists(server):
    embedding = VLLMEmbedding(base_url=server.base_url)
    assert embedding.to_dict()["model"] == embedding.to_dict()["model_name"] == "fake-model"
    assert VLLMEmbedding.from_dict(embedding.to_dict()).model == "fake-model"
    assert server.paths == {"GET /v1/models": 1}  # asked once, and no text embedded for it


@pytest.fixture
def own_prompts(tmp_path):
    """A server whose model has prompts, and the function that gives it others."""

    def write(**prompts):
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}), "utf8")

    with FakeVLLMServer(dimension=16, root=str(tmp_path)) as server:
        yield server, write


def test_dict_holds_the_models_own_prompts_and_not_that_they_are_its_own(own_prompts):
    """Cached under "auto", the vectors of another revision's prompts would be taken for this one's."""
    server, write = own_prompts
    made = {}
    for passage in ("passage: ", "text: {text}"):
        write(query="query: ", passage=passage)
        auto = VLLMEmbedding(base_url=server.base_url, query_prompt="auto", document_prompt="auto")
        written_out = VLLMEmbedding(base_url=server.base_url, query_prompt="query: ", document_prompt=passage)
        made[passage] = auto.to_dict()
        assert auto.to_dict() == auto.model_dump() == json.loads(auto.to_json()) == written_out.to_dict()
        assert (auto.query_prompt, auto.document_prompt) == ("auto", "auto")
    assert made["passage: "] != made["text: {text}"]
    assert server.requests == 0  # no text was embedded for it
    again = VLLMEmbedding.from_dict(made["passage: "], base_url=server.base_url)
    assert (again.query_prompt, again.document_prompt) == ("query: ", "passage: ")
    again.get_query_embedding("a")
    again.get_text_embedding("b")
    assert [body["input"] for body in server.bodies] == [["query: a"], ["passage: b"]]


def test_dict_without_a_prompt_is_one_whatever_it_was_told(own_prompts):
    server, write = own_prompts
    write(query="query: ")
    dumps = [VLLMEmbedding(base_url=server.base_url, document_prompt=prompt).to_dict() for prompt in (None, "", "auto")]
    assert [dump["document_prompt"] for dump in dumps] == [None] * 3
    assert dumps[0] == dumps[1] == dumps[2]


def test_dict_of_prompts_that_the_model_has_not_is_refused_with_where_was_looked(server):
    with pytest.raises(ConfigurationError, match="no prompts were found; looked at"):
        VLLMEmbedding(base_url=server.base_url, query_prompt="auto").to_dict()


def test_dict_of_an_unnamed_model_needs_the_server(server):
    """An identity without its model would find the vectors of another."""
    server.stop()
    with pytest.raises(ServerUnreachableError):
        VLLMEmbedding(base_url=server.base_url, max_retries=0).to_dict()


def test_payload_asks_no_server():
    assert VLLMEmbedding(base_url="http://127.0.0.1:1/v1", dimensions=8).to_payload() == {
        "class_name": "VLLMEmbedding",
        "model_name": "unknown",
        "embed_batch_size": 10_000,
        "dimensions": 8,
    }


def test_pipeline_embeds_again_when_the_prompt_changes_and_not_when_the_address_does(server):
    nodes = [TextNode(text="a"), TextNode(text="b")]
    with FakeVLLMServer(dimension=16) as moved:
        first = IngestionPipeline(transformations=[VLLMEmbedding(base_url=server.base_url)])
        first.run(nodes=nodes)
        second = VLLMEmbedding(base_url=moved.base_url, api_key=KEY, timeout=5, batch_size=1)
        IngestionPipeline(transformations=[second], cache=first.cache).run(nodes=nodes)
        assert server.texts == 2
        assert moved.requests == 0
        third = VLLMEmbedding(base_url=moved.base_url, document_prompt="passage: ")
        IngestionPipeline(transformations=[third], cache=first.cache).run(nodes=nodes)
        assert moved.texts == 2


def test_a_pickle_keeps_what_pickles_and_says_what_does_not(caplog):
    cache = SimpleKVStore(data={"embeddings": {"a": {"id": [1.0]}}})
    handler = Callbacks()
    handler.stream = sys.stderr
    embedding = VLLMEmbedding(
        model="m",
        api_key=KEY,
        embed_batch_size=7,
        num_workers=3,
        embeddings_cache=cache,
        callback_manager=CallbackManager([handler]),
    )
    twin = pickle.loads(pickle.dumps(embedding))
    assert twin.settings() == embedding.settings()
    assert (twin.embed_batch_size, twin.num_workers) == (7, 3)
    assert twin.embeddings_cache.get("a", collection="embeddings") == {"id": [1.0]}
    assert twin.callback_manager.handlers == []
    assert [record.getMessage() for record in caplog.records] == [
        "callback_manager does not pickle; the copy has the default"
    ]


PIPELINE_WITH_A_CLIENT = """
import httpx, sys
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index_vllm_embed import VLLMEmbedding

if __name__ == "__main__":
    embedding = VLLMEmbedding(model="m", http_client=httpx.Client())
    IngestionPipeline(transformations=[embedding], disable_cache=True).run(
        nodes=[TextNode(text="a"), TextNode(text="b")], num_workers=2
    )
"""


def test_a_pipeline_of_processes_refuses_an_http_client_and_does_not_hang(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PIPELINE_WITH_A_CLIENT, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert finished.returncode == 1
    assert "ConfigurationError: VLLMEmbedding holds an http_client, which cannot be pickled" in finished.stderr


def test_a_refused_text_is_named_and_no_node_is_dropped(server):
    server.refuse = lambda text: "The decoder prompt cannot be empty" if "bad" in text else None
    embedding = VLLMEmbedding(base_url=server.base_url)
    with pytest.raises(InvalidInputError) as caught:
        embedding.get_text_embedding_batch(["a", "bad", "c"])
    assert caught.value.indexes == (1,)


def test_an_embeddings_cache_must_be_llama_indexs():
    with pytest.raises(TypeError, match="BaseKVStore"):
        VLLMEmbedding(embeddings_cache={})
