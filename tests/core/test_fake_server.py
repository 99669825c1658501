"""The fake server serves, counts what it sees, holds requests back, and has limits."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import httpx
import pytest
from _fake_client import client_of, embed, give_up, message, raw

from vllm_embed.testing import FakeVLLMServer, Fault


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
