"""`in_process` and `engine_args`: what is allowed, what is said, what of them decides a vector. No vLLM."""

import copy
import pickle

import httpx
import pytest

from vllm_embed import Embedder, Settings, _engine_args
from vllm_embed.errors import ConfigurationError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_url", "http://localhost:8000/v1"),
        ("openai_api_base", "http://user:s3cret@gpu:8000"),
        ("api_key", "s3cret"),
        ("proxy", "http://user:s3cret@proxy:1"),
        ("verify", False),
        ("default_headers", {"X-Team": "s3cret"}),
        ("http_client", httpx.Client()),
    ],
)
def test_an_option_of_a_server_is_refused_in_process(option: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match="for a server only; with in_process=True") as caught:
        Settings(model="m", in_process=True, **{option: value})
    assert Settings.aliases.get(option, option) in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_server_in_the_environment_is_not_looked_at_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "not an address at all")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    settings = Settings(model="m", in_process=True)
    assert settings.api_key is None
    assert "base_url" not in repr(settings)
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match="model: with in_process=True, name a hub id or a folder"):
        Settings(in_process=True)


def test_engine_arguments_need_an_engine() -> None:
    with pytest.raises(ConfigurationError, match="only with in_process=True; a server takes them on its command line"):
        Settings(engine_args={"dtype": "half"})


def test_an_adapter_needs_an_engine_that_takes_adapters() -> None:
    lora = {"lora_name": "mine", "lora_int_id": 1, "lora_path": "folder"}
    with pytest.raises(ConfigurationError, match="'lora_request': it needs \"enable_lora\": True"):
        Settings(model="m", in_process=True, engine_args={"lora_request": lora})
    Settings(model="m", in_process=True, engine_args={"enable_lora": True, "lora_request": lora})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("task", 'removed in vLLM 0.13; runner="pooling" replaced it'),
        ("model", "the option model"),
        ("runner", 'always "pooling"'),
        ("hf_token", "HF_TOKEN"),
    ],
)
def test_an_engine_argument_that_is_not_the_callers_says_whose_it_is(name: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        Settings(model="m", in_process=True, engine_args={name: "s3cret"})
    assert repr(name) in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_in_process_is_a_plain_bool() -> None:
    with pytest.raises(ConfigurationError, match="in_process='false'"):
        Settings(model="m", in_process="false")


def test_a_copy_moves_from_a_server_into_the_process_and_back() -> None:
    served = Settings(model="m", base_url="http://gpu:8000", api_key="k1", query_prompt="q: ")
    here = served.model_copy(update={"in_process": True, "engine_args": {"dtype": "half"}})
    assert (here.in_process, here.api_key, here.query_prompt) == (True, None, "q: ")
    again = here.model_copy(update={"in_process": False, "engine_args": {}})
    assert (again.base_url, again.query_prompt) == ("http://localhost:8000/v1", "q: ")


def test_the_arguments_are_copied_and_travel_with_the_settings() -> None:
    given = {"hf_overrides": {"architectures": ["BertModel"]}}
    embedder = Embedder(model="m", in_process=True, engine_args=given)
    given["dtype"] = "half"
    assert embedder.settings.engine_args == {"hf_overrides": {"architectures": ["BertModel"]}}
    assert pickle.loads(pickle.dumps(embedder)).settings == embedder.settings


def test_equal_arguments_share_an_engine_in_whatever_order() -> None:
    one = {"dtype": "half", "hf_overrides": {"a": 1, "b": [2]}}
    other = {"hf_overrides": {"b": [2], "a": 1}, "dtype": "half"}
    assert _engine_args.key("m", one) == _engine_args.key("m", other)
    assert len({_engine_args.key("m", one), _engine_args.key("n", one), _engine_args.key("m", {"dtype": "half"})}) == 3


def test_memory_and_parallelism_decide_no_vector() -> None:
    arguments = {"gpu_memory_utilization": 0.5, "dtype": "half", "tensor_parallel_size": 2, "pooler_config": {"a": 1}}
    assert _engine_args.deciding(arguments) == {"dtype": "half", "pooler_config": {"a": 1}}


def test_llama_index_caches_in_process_vectors_under_what_decides_them() -> None:
    from llama_index_vllm_embed import VLLMEmbedding

    def made(**arguments: object) -> VLLMEmbedding:
        return VLLMEmbedding(model="m", in_process=True, engine_args=arguments)

    identity = made(dtype="half", gpu_memory_utilization=0.5).to_dict()
    assert identity == made(dtype="half", gpu_memory_utilization=0.9).to_dict()
    assert identity != made(dtype="float32").to_dict()
    again = VLLMEmbedding.from_dict(identity)
    assert (again.in_process, again.engine_args) == (True, {"dtype": "half"})
    assert "base_url" not in identity


def test_a_namespace_keeps_engines_apart_that_give_other_vectors() -> None:
    def namespace(**arguments: object) -> str:
        return Embedder(model="m", in_process=True, engine_args=arguments).namespace

    assert namespace(dtype="half") == namespace(dtype="half", gpu_memory_utilization=0.5) != namespace(dtype="bfloat16")
