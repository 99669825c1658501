"""The fake server misbehaves when told to."""

import json
from dataclasses import replace
from time import monotonic

import httpx
import numpy as np
import pytest
from _fake_client import embed, message, raw, vectors

from vllm_embed.testing import Fault


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
