"""Settings: what is allowed, what is said, what is never shown."""

import copy
import json
import pickle
import warnings

import httpx
import pytest
from pydantic import SecretStr

from vllm_embed import Embedder, Settings
from vllm_embed.errors import ConfigurationError


def test_defaults_need_no_environment() -> None:
    settings = Settings()
    assert settings.base_url == "http://localhost:8000/v1"
    assert settings.model is None
    assert settings.api_key is None
    assert (settings.batch_size, settings.max_batch_chars, settings.max_concurrency) == (64, 200_000, 16)
    assert (settings.timeout, settings.max_retries, settings.retry_deadline) == (300.0, 5, 120.0)
    assert (settings.long_text, settings.blank_text, settings.unicode) == ("error", "send", "nfc")


def test_address_and_key_come_from_our_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://gpu:8000, http://gpu:8001/v1")
    monkeypatch.setenv("VLLM_API_KEY", " token-1\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    settings = Settings()
    assert settings.base_url == ["http://gpu:8000", "http://gpu:8001/v1"]
    assert settings.api_key == SecretStr("token-1")
    monkeypatch.delenv("VLLM_API_KEY")
    assert Settings().api_key is None


def test_a_bad_address_in_the_environment_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "gpu:8000")
    with pytest.raises(ConfigurationError, match="http://"):
        Settings()


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("openai_api_base", "base_url", "http://gpu:1/v1"),
        ("api_base", "base_url", "http://gpu:1/v1"),
        ("openai_api_key", "api_key", SecretStr("k1")),
        ("chunk_size", "batch_size", 7),
        ("request_timeout", "timeout", 3.0),
        ("show_progress_bar", "show_progress", True),
    ],
)
def test_other_libraries_names_are_understood(alias: str, name: str, value: object) -> None:
    assert getattr(Settings(**{alias: value}), name) == value


def test_one_option_under_two_names_must_agree() -> None:
    assert Settings(batch_size=3, chunk_size=3).batch_size == 3
    with pytest.raises(ConfigurationError, match="batch_size is given twice"):
        Settings(batch_size=3, chunk_size=4)


def test_tokenizer_options_are_ignored_with_one_warning_that_says_why() -> None:
    with pytest.warns(UserWarning, match="check_embedding_ctx_length, tiktoken_enabled: ignored") as caught:
        Settings(check_embedding_ctx_length=False, tiktoken_enabled=False)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("apikey", "api_key"),
        ("batchsize", "batch_size"),
        ("model_kwargs", "extra_body"),
        ("http_async_client", "sync and async"),
        ("zzz", "README"),
    ],
)
def test_an_unknown_option_names_the_nearest(option: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"no option '{option}'.*{hint}"):
        Settings(**{option: 1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size=0: .*greater than or equal to 1"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"dimensions": 0}, "dimensions=0"),
        ({"long_text": "cut"}, "long_text='cut': .*'error', 'truncate' or 'chunk'"),
        ({"unicode": "nfd"}, "unicode='nfd'"),
        ({"model": " "}, "an empty name"),
        ({"base_url": "localhost:8000"}, "starts with http://"),
        ({"base_url": "http://"}, "starts with http://"),
        ({"base_url": []}, "empty list"),
        ({"base_url": 5}, "a URL such as"),
        ({"base_url": "http://a:99999999"}, "not a URL"),
        ({"base_url": "http://a/v1?x=1"}, "no .query"),
        ({"base_url": ["http://a", "http://a/v1"]}, "listed twice"),
        ({"api_key": "two\nlines"}, "printable ASCII"),
        ({"api_key": 5}, "api_key: "),
        ({"default_headers": {"a b": "c"}}, "'a b' is not a header name"),
        ({"default_headers": {"a": "b\r\nc"}}, "'a' must be printable ASCII"),
        ({"default_headers": ["a"]}, "headers are a dict"),
        ({"proxy": "proxy:1"}, "a proxy looks like"),
        ({"proxy": "http://a:99999999"}, "a proxy looks like"),
        ({"extra_body": {"input": "x", "dimensions": 3}}, "'dimensions' is set by the option dimensions; 'input'"),
        ({"query_prompt": "\ud800"}, "half a surrogate"),
        ({"batch_size": 0, "timeout": 0}, "batch_size=0.*; timeout=0"),
    ],
)
def test_a_bad_value_is_told_with_what_is_allowed(options: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        Settings(**options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is None


def test_verify_and_proxy_belong_to_an_injected_client() -> None:
    with httpx.Client() as client, pytest.raises(ConfigurationError, match="set them there"):
        Settings(http_client=client, verify=False)


def test_a_key_and_a_password_cannot_share_the_authorization_header() -> None:
    with pytest.raises(ConfigurationError, match="both set the Authorization header") as caught:
        Embedder(base_url="http://u:pass-word-1@gpu/v1", api_key="k1")
    assert "pass-word-1" not in str(caught.value)


SECRETS = ("key-1234", "pass-5678", "head-9012", "prox-3456")


def _secretive() -> Settings:
    return Settings(
        base_url=["http://user:pass-5678@gpu:1/v1", "http://gpu:2"],
        default_headers={"X-Tenant": "head-9012", "Authorization": "Bearer key-1234"},
        proxy="http://u:prox-3456@proxy:3128",
    )


def test_secrets_appear_in_no_repr_str_or_dump() -> None:
    settings = _secretive().model_copy(update={"base_url": "http://user:pass-5678@gpu:1/v1"})
    shown = [repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()]
    shown += [repr(Settings(api_key="key-1234")), Settings(api_key="key-1234").model_dump_json()]
    shown += [repr(Embedder(settings)), json.dumps(settings.model_dump(mode="json"))]
    for text in shown:
        assert not any(secret in text for secret in SECRETS)
    assert "http://***@gpu:1/v1" in repr(settings)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "key-1234\x00"},
        {"base_url": "ftp://user:pass-5678@gpu"},
        {"default_headers": {"X": "head-9012\n"}},
        {"proxy": "prox-3456"},
        {"api_key": "key-1234", "batch_size": "x"},
        {"base_url": "http://user:pass-5678@gpu/v1", "nonsense": 1},
    ],
)
def test_secrets_appear_in_no_settings_error(options: dict) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**options)
    assert not any(secret in str(caught.value) + repr(caught.value) for secret in SECRETS)


def test_settings_are_frozen_and_copied_with_changes() -> None:
    settings = Settings(batch_size=3, api_key="k")
    with pytest.raises(ConfigurationError, match="batch_size is frozen; model_copy"):
        settings.batch_size = 4
    changed = settings.model_copy(update={"chunk_size": 4})
    assert (settings.batch_size, changed.batch_size, changed.api_key) == (3, 4, SecretStr("k"))
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        settings.model_copy(update={"batch_size": 0})


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_hold_every_setting_the_key_included(twin: object) -> None:
    settings = Settings(
        model="m", api_key="k", base_url=["http://u:p@a", "http://b"], default_headers={"X": "y"}, extra_body={"a": [1]}
    )
    assert twin(settings).settings() == settings.settings()
    assert twin(settings) == settings


def test_a_deep_copy_shares_nothing_that_can_change() -> None:
    settings = Settings(extra_body={"a": [1]})
    copy.deepcopy(settings).extra_body["a"].append(2)
    assert settings.extra_body == {"a": [1]}


def test_an_injected_client_is_shared_by_copies_and_refused_by_pickle() -> None:
    with httpx.Client() as client:
        settings = Settings(http_client=client)
        assert copy.deepcopy(settings).http_client is client
        with pytest.raises(ConfigurationError, match="cannot be pickled"):
            pickle.dumps(settings)
        with pytest.raises(ConfigurationError, match="cannot be pickled"):
            pickle.dumps(Embedder(settings))


def test_making_settings_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings(model="m")
