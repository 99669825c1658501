"""No key, header value or password of a URL shows anywhere; each test runs for each of the two adapters."""

from __future__ import annotations

import base64
import json
import logging
import traceback

import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index_conformance.observers import Callbacks

from vllm_embed.errors import AuthenticationError, ServerUnreachableError, VLLMEmbedError
from vllm_embed.testing import FakeVLLMServer, Fault

KEY, HEADER, PASSWORD = "sk-a-secret-key", "a-secret-of-the-gateway", "a-secret-password"
BASIC = f"Basic {base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}"
WAYS = {
    "key and header": {"api_key": KEY, "default_headers": {"X-Gateway": HEADER}},
    "password in the URL": {"base_url": f"http://user:{PASSWORD}@127.0.0.1:9/v1"},
    "passwords in URLs": {"base_url": [f"http://user:{PASSWORD}@a.example/v1", f"http://user:{PASSWORD}@b.example/v1"]},
    "password in the proxy": {"proxy": f"http://user:{PASSWORD}@127.0.0.1:9"},
}


def assert_hidden(shown):
    for secret in (KEY, HEADER, PASSWORD):
        assert secret not in str(shown)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_reprs_and_dumps_hold_no_secret(adapter, options):
    made = adapter.make(model="m", **options)
    assert_hidden([repr(made), str(made), f"{made!r}", repr([made]), repr(made.embedder), repr(made.embedder.settings)])
    assert_hidden([made.model_dump(), made.model_dump_json(), json.dumps(made.model_dump(mode="json"))])
    assert_hidden([repr(made.with_prompts(query="q")), repr(made.model_copy()), list(made.__repr_args__())])
    if hasattr(made, "to_dict"):
        assert_hidden([made.to_dict(), made.to_json(), made.dict(), made.to_payload()])


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": KEY, "max_retries": -1},
        {"api_key": f"{KEY}é"},
        {"api_key": 1, "openai_api_key": KEY},
        {"api_key": KEY, "openai_api_key": f"{KEY}2"},
        {"api_key": [KEY]},
        {"api_key": KEY, "unknown": HEADER},
        {"default_headers": {"X-Gateway": f"{HEADER}\n"}},
        {"default_headers": HEADER},
        {"base_url": f"ftp://user:{PASSWORD}@a.example"},
        {"base_url": f"http://user:{PASSWORD}@a.example/v1?key={KEY}"},
        {"base_url": f"http://user:{PASSWORD}@a.example", "api_key": KEY},
        {"base_url": {KEY: PASSWORD}},
        {"proxy": f"ftp://user:{PASSWORD}@a.example"},
        {"http_client": KEY},
    ],
    ids=", ".join,
)
def test_settings_errors_hold_no_secret(adapter, options):
    with pytest.raises(VLLMEmbedError) as caught:
        adapter.make(**options)
    assert_hidden("".join(traceback.format_exception(caught.value)))
    assert_hidden(vars(caught.value))


FAULTS = {
    "400 that quotes the key": Fault.status(400, body={"error": {"message": f"bad key {KEY}, {HEADER}"}}),
    "401 that quotes the key": Fault.status(401, body={"error": f"Unauthorized: Bearer {KEY} {HEADER}"}),
    "403 as text": Fault.status(403, body=f"no access with {KEY} and {HEADER}"),
    "500 that quotes the headers": Fault.status(500, body=f"Authorization: Bearer {KEY}\nX-Gateway: {HEADER}"),
    "redirect with the key": Fault.redirect(f"http://user:{KEY}@a.example/{HEADER}"),
    "reset": Fault.reset(),
    "html": Fault.html(),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_errors_and_logs_hold_no_secret_even_when_the_server_quotes_it(adapter, ask, server, fault, caplog):
    caplog.set_level(logging.DEBUG)
    server.order(fault, times=None)
    made = adapter.make(base_url=server.base_url, max_retries=1, retry_deadline=1, **WAYS["key and header"])
    with pytest.raises(VLLMEmbedError) as caught:
        ask(adapter, made, "query", "x")
    assert_hidden("".join(traceback.format_exception(caught.value)))
    assert_hidden(vars(caught.value))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("vllm_embed")]
    assert told  # httpcore's own DEBUG lines quote the server's reply: not ours to change
    assert_hidden(told)


@pytest.mark.parametrize("way", ["key and header", "password in the URL"])
def test_no_logger_at_all_shows_what_we_send(adapter, ask, server, way, caplog):
    caplog.set_level(logging.DEBUG)
    address = server.base_url if way == "key and header" else server.base_url.replace("://", f"://user:{PASSWORD}@")
    made = adapter.make(**{**WAYS[way], "base_url": address})
    ask(adapter, made, "query", "x")
    assert server.request_headers[-1]["authorization"] in (f"Bearer {KEY}", BASIC)
    assert_hidden([caplog.text, made.embedder.info(), made.embedder.stats()])
    assert BASIC not in caplog.text


@pytest.mark.parametrize("options", [WAYS["password in the URL"], WAYS["password in the proxy"]], ids=["URL", "proxy"])
def test_a_server_that_is_away_is_told_without_the_password(adapter, ask, options, caplog):
    caplog.set_level(logging.DEBUG)
    made = adapter.make(model="m", max_retries=0, **options)
    with pytest.raises(ServerUnreachableError) as caught:
        ask(adapter, made, "query", "x")
    assert_hidden("".join(traceback.format_exception(caught.value)))
    assert_hidden([vars(caught.value), caplog.text])


def test_a_wrong_key_is_one_request_and_an_error_that_says_what_to_do(adapter, ask):
    with FakeVLLMServer(api_key="another") as server:
        made = adapter.make(base_url=server.base_url, model="fake-model", api_key=KEY)
        with pytest.raises(AuthenticationError, match="VLLM_API_KEY") as caught:
            ask(adapter, made, "documents", ["x"] * 10)
        assert server.requests == 1
        assert_hidden(caught.value)


def test_callback_payloads_hold_no_secret(server):
    from llama_index_vllm_embed import VLLMEmbedding

    handler = Callbacks()
    made = VLLMEmbedding(
        base_url=server.base_url, callback_manager=CallbackManager([handler]), **WAYS["key and header"]
    )
    made.get_query_embedding("x")
    assert_hidden([handler.started, handler.ended])
