"""What both adapters take: other libraries' names, prompts, copies; each test runs for each of the two."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import httpx
import pytest

from vllm_embed.errors import ClosedError, ConfigurationError

ALIASES = {
    "api_base": ("base_url", "http://gpu.example:8000/v1"),
    "openai_api_base": ("base_url", "http://gpu.example:8000/v1"),
    "openai_api_key": ("api_key", "sk-a"),
    "chunk_size": ("batch_size", 7),
    "request_timeout": ("timeout", 7.5),
    "show_progress_bar": ("show_progress", True),
}
IGNORED = {
    "check_embedding_ctx_length": False,
    "tiktoken_enabled": False,
    "tiktoken_model_name": "cl100k_base",
    "embedding_ctx_length": 512,
}


def plain(value):
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


@pytest.mark.parametrize("alias", ALIASES)
def test_understands_the_names_of_openai_embeddings(adapter, alias):
    name, value = ALIASES[alias]
    assert plain(getattr(adapter.make(**{alias: value}), name)) == value


@pytest.mark.parametrize("alias", ALIASES)
def test_an_option_given_under_two_names_is_refused(adapter, alias):
    name, value = ALIASES[alias]
    other = {"base_url": "http://other.example/v1", "api_key": "sk-b", "show_progress": False}.get(name, 1)
    with pytest.raises(ConfigurationError, match=f"{name} is given twice, once as {alias}") as caught:
        adapter.make(**{name: other, alias: value})
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("name", IGNORED)
def test_tokenizer_options_are_ignored_with_one_warning(adapter, name):
    with pytest.warns(UserWarning, match=f"{name}: ignored. Texts are sent as text") as caught:
        adapter.make(model="m", **{name: IGNORED[name]})
    assert len(caught) == 1


def test_all_tokenizer_options_give_one_warning_that_points_at_the_caller(adapter):
    with pytest.warns(UserWarning, match="ignored") as caught:
        made = adapter.make(model="m", **IGNORED)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in IGNORED)
    copy.deepcopy(made)
    pickle.loads(pickle.dumps(made))  # no second warning


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("batchsize", "batch_size"),
        ("base_ulr", "base_url"),
        ("max_concurency", "max_concurrency"),
        ("headers", "default_headers"),
        ("model_kwargs", "extra_body"),
        ("http_async_client", "http_client"),
        ("zzz", "settings table"),
    ],
)
def test_an_unknown_option_names_the_nearest(adapter, given, hint):
    with pytest.raises(ConfigurationError, match=f"no option '{given}'.*{hint}"):
        adapter.make(**{given: "x"})


@pytest.mark.parametrize("options", [{"max_retries": -1}, {"long_text": "cut"}, {"timeout": 0}, {"dimensions": "x"}])
def test_a_bad_value_is_a_configuration_error_and_a_value_error(adapter, options):
    (name,) = options
    with pytest.raises(ConfigurationError, match=name) as caught:
        adapter.make(**options)
    assert isinstance(caught.value, ValueError)


def test_prompts_reach_the_wire_exactly(adapter, ask, server):
    made = adapter.make(base_url=server.base_url, query_prompt="Query:", document_prompt=" <{text}>\n")
    ask(adapter, made, "query", " a ")
    ask(adapter, made, "documents", ["b", "c"])
    assert [body["input"] for body in server.bodies] == [["Query: a "], [" <b>\n", " <c>\n"]]


def test_with_prompts_shares_connections_queue_and_counters(adapter, ask, server):
    made = adapter.make(base_url=server.base_url, query_prompt="a: ", document_prompt="b: ")
    sibling = made.with_prompts(query="c: ")
    assert type(sibling) is type(made)
    assert (sibling.query_prompt, sibling.document_prompt) == ("c: ", "b: ")
    ask(adapter, made, "query", "x")
    ask(adapter, sibling, "query", "x")
    ask(adapter, sibling, "documents", ["x"])
    assert [body["input"] for body in server.bodies] == [["a: x"], ["c: x"], ["b: x"]]
    assert server.connections == 1
    assert made.embedder.stats() == sibling.embedder.stats()
    assert made.with_prompts(query=None, document=None).query_prompt is None


def test_siblings_close_the_connections_when_the_last_is_closed(adapter, server):
    made = adapter.make(base_url=server.base_url)
    sibling = made.with_prompts(query="c: ")
    made.embedder.close()
    with pytest.raises(ClosedError):
        adapter.query(made, "x")
    adapter.query(sibling, "x")


@pytest.mark.parametrize("name", ["model", "api_key", "query_prompt", "batch_size", "openai_api_key"])
def test_settings_are_frozen(adapter, name):
    made = adapter.make(model="m")
    with pytest.raises(ConfigurationError, match=f"{name} is frozen; model_copy"):
        setattr(made, name, "x")


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "model_copy": lambda made: made.model_copy(),
    "model_copy(deep=True)": lambda made: made.model_copy(deep=True),
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_same_settings_and_a_life_of_its_own(adapter, ask, server, copied):
    made = adapter.make(
        base_url=server.base_url,
        api_key="sk-a",
        query_prompt="q: ",
        default_headers={"X-Tenant": "a"},
        extra_body={"priority": 1},
    )
    adapter.query(made, "x")
    twin = copied(made)
    assert type(twin) is type(made)
    assert twin.settings() == made.settings()
    assert twin.embedder is not made.embedder
    made.embedder.close()
    assert ask(adapter, twin, "query", "x") == server.vector("q: x").tolist()
    assert server.request_headers[-1]["authorization"] == "Bearer sk-a"
    assert server.request_headers[-1]["x-tenant"] == "a"
    assert twin.embedder.stats().requests == 1


def test_a_deep_copy_shares_no_dict(adapter):
    made = adapter.make(extra_body={"priority": 1})
    assert copy.deepcopy(made).extra_body is not made.extra_body


def test_model_copy_changes_settings_and_checks_them(adapter):
    made = adapter.make(model="m", batch_size=7)
    changed = made.model_copy(update={"batch_size": 8, "openai_api_key": "sk-b"})
    assert (changed.model, changed.batch_size, plain(changed.api_key)) == ("m", 8, "sk-b")
    assert (made.batch_size, made.api_key) == (7, None)
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        made.model_copy(update={"batch_size": 0})
    with pytest.raises(ConfigurationError, match="did you mean batch_size"):
        made.model_copy(update={"batchsize": 8})


def test_model_copy_changes_the_model_under_all_its_names(adapter):
    changed = adapter.make(model="m").model_copy(update={"model": "n"})
    assert changed.model == changed.embedder.settings.model == "n"
    assert getattr(changed, "model_name", "n") == "n"


def test_an_injected_client_is_used_shared_and_never_closed(adapter, ask, server):
    with httpx.Client(headers={"X-From": "a-client"}) as client:
        made = adapter.make(base_url=server.base_url, http_client=client)
        for one in (made, copy.deepcopy(made), made.model_copy(update={"batch_size": 2})):
            ask(adapter, one, "query", "x")
            assert one.http_client is client
            one.embedder.close()
        assert [headers["x-from"] for headers in server.request_headers] == ["a-client"] * 3
        assert not client.is_closed
        assert made.model_copy(update={"http_client": None}).http_client is None


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_json_schema_is_of_what_json_can_hold(adapter, mode, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-from-the-environment")
    schema = adapter.make.model_json_schema(mode=mode)
    assert "sk-from" not in json.dumps(schema)
    assert "http_client" not in schema.get("properties", {})
    if mode == "validation":
        assert {"model", "base_url", "expect", "timeout"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bogus": 1}, "has no option 'bogus'"),
        ({"timeout": -1, "api_key": "sk-a"}, "^timeout=-1: .*greater than 0$"),
        ({"api_key": "sk-\u00e9"}, "^api_key: a key is printable ASCII"),
        (3, "valid dictionary|an object"),
    ],
    ids=["unknown", "out of range", "key", "no dictionary"],
)
def test_validating_bad_options_says_what_the_constructor_says(adapter, options, said):
    for validate, given in (
        (adapter.make.model_validate, options),
        (adapter.make.model_validate_json, json.dumps(options)),
    ):
        with pytest.raises(ConfigurationError, match=said) as caught:
            validate(given)
        assert "sk-" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="Invalid JSON"):
        adapter.make.model_validate_json('{"api_key": "sk-')


def test_good_options_validate_under_any_name(adapter):
    made = adapter.make.model_validate({"model": "m", "chunk_size": 3})
    assert (made.model, made.batch_size) == ("m", 3)
    assert adapter.make.model_validate(made) is made


def test_an_injected_client_cannot_be_pickled(adapter):
    with httpx.Client() as client:
        made = adapter.make(model="m", http_client=client)
        with pytest.raises(ConfigurationError, match="holds an http_client, which cannot be pickled"):
            pickle.dumps(made)


def test_show_progress_draws_documents_on_stderr(adapter, ask, server, capfd):
    made = adapter.make(base_url=server.base_url, show_progress=True)
    ask(adapter, made, "documents", ["a", "b"])
    shown = capfd.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""
    ask(adapter, made, "query", "a")
    assert capfd.readouterr() == ("", "")


def test_sixteen_threads_share_one_object(adapter, server):
    made = adapter.make(base_url=server.base_url, max_concurrency=4)
    texts = [f"text {number}" for number in range(50)]
    results = []
    threads = [threading.Thread(target=lambda: results.append(adapter.documents(made, texts))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[server.vector(text).tolist() for text in texts]] * 16
    assert server.most_in_flight <= 4
