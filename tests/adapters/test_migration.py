"""From an `OpenAIEmbeddings` or `OpenAILikeEmbedding` that points at vLLM to ours: what carries over, what is told."""

from __future__ import annotations

import warnings

import httpx
import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index_conformance.observers import Callbacks, Limiter

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed.errors import ConfigurationError
from vllm_embed.testing import FakeVLLMServer

try:
    import httpx2 as openais_httpx  # what the openai package is built on from 3.0 on
except ImportError:
    openais_httpx = httpx

KEY = "sk-a-secret-key"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from langchain_openai import AzureOpenAIEmbeddings, OpenAIEmbeddings


def from_openai(**options):
    return VLLMEmbeddings.from_openai(
        OpenAIEmbeddings(**{"base_url": "http://gpu.example/v1", "api_key": KEY, **options})
    )


def from_openai_like(**options):
    theirs = OpenAILikeEmbedding(**{"model_name": "m", "api_base": "http://gpu.example/v1", "api_key": KEY, **options})
    return VLLMEmbedding.from_openai_like(theirs)


@pytest.fixture(params=[from_openai, from_openai_like], ids=["langchain", "llama_index"])
def carried(request):
    """Makes theirs with some options and carries it over."""
    return request.param


def arguments(carried, **fields):
    return {"model_kwargs" if carried is from_openai else "additional_kwargs": fields}


def key_of(made):
    return made.api_key and made.api_key.get_secret_value()


def test_what_is_not_set_there_is_our_default(carried):
    made, ours = carried(), VLLMEmbeddings(model="m")
    changed = {name for name, value in made.settings().items() if value != getattr(ours, name)}
    assert changed <= {"base_url", "api_key", "model"}
    assert made.base_url == "http://gpu.example/v1"
    assert key_of(made) == KEY


@pytest.mark.parametrize(
    ("theirs", "name", "value"),
    [
        ({"model": "n"}, "model", "n"),
        ({"dimensions": 8}, "dimensions", 8),
        ({"chunk_size": 7}, "batch_size", 7),
        ({"max_retries": 1}, "max_retries", 1),
        ({"timeout": 7.5}, "timeout", 7.5),
        ({"show_progress_bar": True}, "show_progress", True),
        ({"openai_proxy": "http://127.0.0.1:1"}, "proxy", "http://127.0.0.1:1"),
        ({"default_headers": {"X-Tenant": "a"}}, "default_headers", {"X-Tenant": "a"}),
        ({"headers": {"X-Tenant": "a"}}, "default_headers", {"X-Tenant": "a"}),
    ],
    ids=str,
)
def test_options_of_openai_embeddings(theirs, name, value):
    with warnings.catch_warnings():  # openai's own, about its proxy
        warnings.filterwarnings("ignore", module="langchain_openai|openai|httpx2")
        assert getattr(from_openai(**theirs), name) == value


@pytest.mark.parametrize(
    ("theirs", "name", "value"),
    [
        ({"model_name": "n"}, "model", "n"),
        ({"dimensions": 8}, "dimensions", 8),
        ({"embed_batch_size": 100}, "batch_size", 100),
        ({"max_retries": 1}, "max_retries", 1),
        ({"timeout": 7.5}, "timeout", 7.5),
        ({"default_headers": {"X-Tenant": "a"}}, "default_headers", {"X-Tenant": "a"}),
        ({"additional_kwargs": {"timeout": 7.5}}, "timeout", 7.5),
        ({"api_key": "fake"}, "api_key", None),
    ],
    ids=str,
)
def test_options_of_openai_like_embedding(theirs, name, value):
    assert getattr(from_openai_like(**theirs), name) == value


def test_without_a_key_there_there_is_none_here():
    theirs = OpenAIEmbeddings(base_url="http://gpu.example/v1", api_key=KEY)
    theirs.openai_api_key = None  # as where the openai package takes other credentials
    assert VLLMEmbeddings.from_openai(theirs).api_key is None


def test_the_slice_of_llama_index_stays_large():
    assert from_openai_like(embed_batch_size=100).embed_batch_size > 2_048


def test_llama_indexs_callback_manager_carries_over():
    manager = CallbackManager([Callbacks()])
    assert from_openai_like(callback_manager=manager).callback_manager is manager


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"extra_body": {"priority": 1}}, "extra_body", {"priority": 1}),
        ({"user": "a", "extra_body": {"priority": 1}}, "extra_body", {"user": "a", "priority": 1}),
        ({"encoding_format": "float"}, "extra_body", None),
        ({"extra_body": {"truncate_prompt_tokens": -1}}, "long_text", "truncate"),
        ({"extra_body": {"dimensions": 8}}, "dimensions", 8),
        ({"extra_headers": {"X-Tenant": "a"}}, "default_headers", {"X-Tenant": "a"}),
    ],
    ids=str,
)
def test_arguments_of_requests(carried, fields, name, value):
    assert getattr(carried(**arguments(carried, **fields)), name) == value


def test_the_objects_own_headers_win_over_those_of_requests(carried):
    made = carried(default_headers={"X-A": "1"}, **arguments(carried, extra_headers={"X-A": "2", "X-B": "3"}))
    assert made.default_headers == {"X-A": "1", "X-B": "3"}


def test_another_truncation_than_the_models_limit_is_refused_with_the_way_out(carried):
    with pytest.raises(ConfigurationError, match=r'truncate_prompt_tokens.*long_text="truncate"'):
        carried(**arguments(carried, extra_body={"truncate_prompt_tokens": 128}))


def test_options_given_here_win(carried):
    if carried is from_openai:
        theirs = OpenAIEmbeddings(base_url="http://gpu.example/v1", api_key=KEY, chunk_size=7)
        made = VLLMEmbeddings.from_openai(theirs, batch_size=8, model="n")
    else:
        theirs = OpenAILikeEmbedding(model_name="m", api_base="http://gpu.example/v1", embed_batch_size=7)
        made = VLLMEmbedding.from_openai_like(theirs, batch_size=8, model="n")
    assert (made.batch_size, made.model) == (8, "n")


@pytest.mark.parametrize(
    ("carried", "options", "named"),
    [
        (from_openai, {"http_client": openais_httpx.Client()}, "http_client"),
        (from_openai, {"http_async_client": openais_httpx.AsyncClient()}, "http_async_client"),
        (from_openai, {"default_query": {"a": "b"}}, "default_query"),
        (from_openai, {"organization": "a"}, "openai_organization"),
        (from_openai, {"skip_empty": True}, "skip_empty"),
        (from_openai, {"timeout": (1.0, 2.0)}, r"request_timeout \(give seconds\)"),
        (from_openai, {"api_key": lambda: KEY}, r"openai_api_key \(a function\)"),
        (from_openai, {"model_kwargs": {"extra_query": {"a": "b"}}}, "extra_query"),
        (from_openai_like, {"http_client": httpx.Client()}, "http_client"),
        (from_openai_like, {"async_http_client": httpx.AsyncClient()}, "async_http_client"),
        (from_openai_like, {"api_version": "1"}, "api_version"),
        (from_openai_like, {"embeddings_cache": SimpleKVStore()}, "embeddings_cache"),
        (from_openai_like, {"rate_limiter": Limiter()}, "rate_limiter"),
        (from_openai_like, {"additional_kwargs": {"timeout": httpx.Timeout(1)}}, r"timeout \(give seconds\)"),
        (from_openai_like, {"additional_kwargs": {"extra_query": {"a": "b"}}}, "extra_query"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_what_has_no_counterpart_is_told_in_one_warning(carried, options, named):
    with pytest.warns(UserWarning, match=f"not carried over, no counterpart in VLLMEmbeddings?: {named}") as caught:
        carried(**options)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # where from_openai was called


@pytest.mark.parametrize("base_url", [None, "https://api.openai.com/v1"], ids=["no address", "its address"])
def test_an_object_that_points_at_openai_is_refused(base_url):
    with pytest.raises(ConfigurationError, match="points at OpenAI itself"):
        VLLMEmbeddings.from_openai(OpenAIEmbeddings(base_url=base_url, api_key=KEY))
    with pytest.raises(ConfigurationError, match="points at OpenAI itself"):
        VLLMEmbedding.from_openai_like(OpenAILikeEmbedding(model_name="m", api_base=base_url, api_key=KEY))


def test_azure_is_refused_as_openai_is():
    theirs = AzureOpenAIEmbeddings(azure_endpoint="https://a.openai.azure.com", api_key=KEY, api_version="1")
    with pytest.raises(ConfigurationError, match="points at OpenAI itself"):
        VLLMEmbeddings.from_openai(theirs)


@pytest.mark.parametrize("variable", ["OPENAI_API_BASE", "OPENAI_BASE_URL"])
def test_an_address_that_openai_embeddings_took_from_the_environment_carries_over(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://gpu.example/v1")
    made = VLLMEmbeddings.from_openai(OpenAIEmbeddings(api_key=KEY))
    assert made.base_url == "http://gpu.example/v1"


def test_what_was_carried_over_embeds_with_the_same_key_model_and_headers():
    with FakeVLLMServer(dimension=16, api_key=KEY, model="m") as server:
        options = {"base_url": server.base_url, "default_headers": {"X-Tenant": "a"}}
        one = from_openai(model="m", check_embedding_ctx_length=False, **options)
        other = from_openai_like(api_base=options["base_url"], default_headers=options["default_headers"])
        assert one.embed_query("a\nb") == other.get_query_embedding("a\nb") == server.vector("a\nb").tolist()
        assert [headers["x-tenant"] for headers in server.request_headers] == ["a", "a"]
