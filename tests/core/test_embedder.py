"""What one embedder promises, over a real socket to the fake server."""

import asyncio
import copy
import gc
import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed._lists import alists, lists
from vllm_embed.testing import FakeVLLMServer, Fault

Embed = Callable[..., np.ndarray]


@pytest.fixture(params=["sync", "async"])
def embed(request: pytest.FixtureRequest) -> Embed:
    """The same promise through both doors."""
    if request.param == "sync":
        return lambda embedder, *args, **kwargs: embedder.embed(*args, **kwargs)
    return lambda embedder, *args, **kwargs: asyncio.run(embedder.aembed(*args, **kwargs))


def expected(server: FakeVLLMServer, texts: list[str]) -> np.ndarray:
    return np.stack([server.vector(text) for text in texts])


def test_n_texts_give_n_float32_rows_in_order(embed: Embed, server: FakeVLLMServer, embedder: Embedder) -> None:
    texts = [f"text number {i}" for i in range(1_000)]
    vectors = embed(embedder, texts)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected(server, texts))
    assert server.requests == 16


def test_no_texts_give_no_rows_and_no_request(embed: Embed, server: FakeVLLMServer, embedder: Embedder) -> None:
    assert embed(embedder, []).shape == (0, 0)
    embed(embedder, ["a"])
    assert embed(embedder, []).shape == (0, 16)
    assert server.requests == 1


def test_any_iterable_of_texts_will_do(embed: Embed, server: FakeVLLMServer, embedder: Embedder) -> None:
    np.testing.assert_array_equal(embed(embedder, (t for t in ["a", "b"])), expected(server, ["a", "b"]))


@pytest.mark.parametrize("texts", ["one text", b"bytes"])
def test_a_single_text_is_not_a_list(embed: Embed, embedder: Embedder, texts: object) -> None:
    with pytest.raises(errors.InvalidInputError, match="put it into a list"):
        embed(embedder, texts)
    with pytest.raises(errors.InvalidInputError, match="put it into a list"):
        embedder.stream(texts)


def test_an_unknown_kind_is_refused(embed: Embed, embedder: Embedder) -> None:
    with pytest.raises(errors.ConfigurationError, match='"query" or "document"'):
        embed(embedder, ["a"], kind="passage")


def test_prompts_belong_to_their_kind_and_a_call_may_replace_them(embed: Embed, server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, query_prompt="q: ", document_prompt="<{text}>") as embedder:
        embed(embedder, ["a"], kind="query")
        embed(embedder, ["a"])
        embed(embedder, ["a"], prompt="cluster: ")
        embed(embedder, ["a"], kind="query", prompt="")
    assert [body["input"] for body in server.bodies] == [["q: a"], ["<a>"], ["cluster: a"], ["a"]]


def test_siblings_with_other_prompts_share_one_queue_and_outlive_each_other(server: FakeVLLMServer) -> None:
    parent = Embedder(base_url=server.base_url, query_prompt="q: ", document_prompt="d: ")
    child = parent.with_prompts(query="cluster: ")
    assert child.settings.document_prompt == "d: "
    parent.embed(["a"], kind="query")
    child.embed(["a"], kind="query")
    parent.close()
    child.embed(["b"])
    assert [body["input"] for body in server.bodies] == [["q: a"], ["cluster: a"], ["d: b"]]
    assert child.stats().requests == 3
    assert server.connections == 1
    child.close()
    with pytest.raises(errors.ClosedError):
        child.embed(["c"])


def test_settings_reach_the_wire(embed: Embed) -> None:
    with FakeVLLMServer(dimension=16, matryoshka=True) as server:
        options = {"dimensions": 8, "long_text": "truncate", "extra_body": {"priority": 3}, "model": "fake-model"}
        with Embedder(
            base_url=server.base_url, default_headers={"X-Tenant": "t1"}, api_key="k1", **options
        ) as embedder:
            assert embed(embedder, ["word " * 400]).shape == (1, 8)
        body, headers = server.bodies[-1], server.request_headers[-1]
    assert {name: body[name] for name in ("dimensions", "truncate_prompt_tokens", "priority", "model")} == {
        "dimensions": 8,
        "truncate_prompt_tokens": -1,
        "priority": 3,
        "model": "fake-model",
    }
    assert "truncation_side" not in body
    assert (headers["x-tenant"], headers["authorization"]) == ("t1", "Bearer k1")


def test_credentials_in_the_url_become_a_header_and_default_headers_win(server: FakeVLLMServer) -> None:
    host = server.base_url.removeprefix("http://")
    Embedder(base_url=f"http://us%40er:p%3Aw@{host}").embed(["a"])
    assert server.request_headers[-1]["authorization"] == "Basic dXNAZXI6cDp3"
    Embedder(base_url=server.base_url, api_key="k1", default_headers={"authorization": "Custom x"}).embed(["a"])
    assert server.request_headers[-1]["authorization"] == "Custom x"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/embeddings"])
def test_an_address_may_end_as_people_write_it(server: FakeVLLMServer, suffix: str) -> None:
    with Embedder(base_url=server.base_url.removesuffix("/v1") + suffix) as embedder:
        assert embedder.embed(["a"]).shape == (1, 16)


def test_an_explicit_model_needs_no_look_at_the_list(server: FakeVLLMServer, embedder: Embedder) -> None:
    embedder.embed(["a"])
    assert server.paths == {"POST /v1/embeddings": 1}


def test_without_a_model_the_one_listed_is_asked_for_once(embed: Embed, server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        embed(embedder, ["a"])
        embed(embedder, [str(i) for i in range(300)])
    assert server.paths["GET /v1/models"] == 1
    assert {body["model"] for body in server.bodies} == {"fake-model"}


def test_blank_text_is_sent_zero_or_an_error(embed: Embed, server: FakeVLLMServer) -> None:
    texts = ["a", "", "b"]
    with Embedder(base_url=server.base_url) as sends:
        np.testing.assert_array_equal(embed(sends, texts), expected(server, texts))
    with Embedder(base_url=server.base_url, blank_text="zero") as zeroes:
        vectors = embed(zeroes, texts)
        assert not vectors[1].any()
        np.testing.assert_array_equal(vectors[[0, 2]], expected(server, ["a", "b"]))
    with Embedder(base_url=server.base_url, blank_text="zero") as unknowing:
        assert embed(unknowing, ["", " "]).shape == (2, 16)
    with Embedder(base_url=server.base_url, blank_text="error") as refuses:
        with pytest.raises(errors.InvalidInputError) as caught:
            embed(refuses, texts)
        assert caught.value.indexes == (1,)
        np.testing.assert_array_equal(caught.value.vectors[[0, 2]], expected(server, ["a", "b"]))
        with pytest.raises(errors.InvalidInputError) as caught:
            embed(refuses, ["", ""])
        assert (caught.value.indexes, caught.value.vectors) == ((0, 1), None)


def test_a_text_that_is_no_str_is_named_and_the_others_are_embedded(
    embed: Embed, server: FakeVLLMServer, embedder: Embedder
) -> None:
    with pytest.raises(errors.InvalidInputError, match=r"\[1\] a text must be a str, this is None") as caught:
        embed(embedder, ["a", None, "b"])
    assert caught.value.reasons == {1: "a text must be a str, this is None"}
    np.testing.assert_array_equal(caught.value.vectors[[0, 2]], expected(server, ["a", "b"]))
    assert np.isnan(caught.value.vectors[1]).all()


def test_a_request_holds_at_most_batch_size_texts_and_max_batch_chars(server: FakeVLLMServer) -> None:
    texts = ["x" * 60] * 5 + ["y" * 900] + ["z"] * 30
    with Embedder(base_url=server.base_url, batch_size=10, max_batch_chars=200, long_text="truncate") as embedder:
        np.testing.assert_array_equal(embedder.embed(texts)[-1], server.vector("z"))
    sent = [body["input"] for body in server.bodies]
    assert all(len(batch) <= 10 for batch in sent)
    assert all(sum(map(len, batch)) <= 200 for batch in sent if len(batch) > 1)
    assert ["y" * 900] in sent
    assert sorted(text for batch in sent for text in batch) == sorted(texts)


def test_waiting_single_calls_travel_together(server: FakeVLLMServer) -> None:
    async def ask() -> list[np.ndarray]:
        return await asyncio.gather(*(embedder.aembed([f"query {i}"], kind="query") for i in range(2_000)))

    with Embedder(base_url=server.base_url) as embedder:
        rows = asyncio.run(ask())
        assert embedder.stats().most_in_flight <= 16
    np.testing.assert_array_equal(np.concatenate(rows), expected(server, [f"query {i}" for i in range(2_000)]))
    assert server.requests <= 100


def test_queries_go_ahead_of_waiting_documents(server: FakeVLLMServer) -> None:
    async def ask() -> None:
        with server.hold():
            documents = asyncio.create_task(embedder.aembed([f"d{i}" for i in range(10)]))
            await asyncio.to_thread(server.wait_for, requests=1)
            query = asyncio.create_task(embedder.aembed(["q"], kind="query"))
            await asyncio.sleep(0)
        await asyncio.gather(documents, query)

    with Embedder(base_url=server.base_url, max_concurrency=1, batch_size=2, model="fake-model") as embedder:
        asyncio.run(ask())
    assert [body["input"][0] for body in server.bodies][:2] == ["d0", "q"]


def test_two_bulk_jobs_take_turns(server: FakeVLLMServer) -> None:
    async def ask() -> None:
        with server.hold():
            first = asyncio.create_task(embedder.aembed([f"a{i}" for i in range(8)]))
            await asyncio.to_thread(server.wait_for, requests=1)
            second = asyncio.create_task(embedder.aembed([f"b{i}" for i in range(8)]))
            await asyncio.sleep(0)
        await asyncio.gather(first, second)

    with Embedder(base_url=server.base_url, max_concurrency=1, batch_size=2, model="fake-model") as embedder:
        asyncio.run(ask())
    order = "".join(body["input"][0][0] for body in server.bodies)
    assert order == "aabababb"


def test_never_more_requests_in_flight_than_the_bound_whatever_calls_run(server: FakeVLLMServer) -> None:
    server.delay_s = 0.005
    texts = [f"t{i}" for i in range(200)]

    def sync(i: int) -> None:
        embedder.embed(texts if i % 2 else ["one"], kind="query" if i % 3 else "document")

    async def many() -> None:
        await asyncio.gather(*(embedder.aembed(texts[:20]) for _ in range(10)))

    with Embedder(base_url=server.base_url, max_concurrency=4, batch_size=8) as embedder:
        with ThreadPoolExecutor(16) as pool:
            jobs = [pool.submit(sync, i) for i in range(32)] + [pool.submit(asyncio.run, many()) for _ in range(3)]
            for job in jobs:
                job.result()
        assert embedder.stats().most_in_flight == 4
        assert embedder.stats().in_flight == 0
    assert server.most_in_flight == 4


def test_ten_batches_of_a_tenth_of_a_second_overlap(embed: Embed, server: FakeVLLMServer, embedder: Embedder) -> None:
    embed(embedder, ["warm"])
    server.delay_s = 0.1
    server.reset_counters()
    embed(embedder, [f"t{i}" for i in range(640)])
    assert (server.requests, server.most_in_flight) == (10, 10)  # benchmarks/ times it; a count cannot be flaky


def test_one_object_works_in_many_loops_in_a_running_loop_and_in_threads(
    server: FakeVLLMServer, embedder: Embedder
) -> None:
    want = expected(server, ["a", "b"])
    for _ in range(4):
        np.testing.assert_array_equal(asyncio.run(embedder.aembed(["a", "b"])), want)

    async def as_in_jupyter() -> np.ndarray:
        return embedder.embed(["a", "b"])

    np.testing.assert_array_equal(asyncio.run(as_in_jupyter()), want)
    with ThreadPoolExecutor(16) as pool:
        for got in pool.map(lambda _: embedder.embed(["a", "b"]), range(64)):
            np.testing.assert_array_equal(got, want)


def test_the_event_loop_runs_on_while_texts_are_embedded(server: FakeVLLMServer, embedder: Embedder) -> None:
    async def ask() -> int:
        ticks = 0
        with server.hold():
            job = asyncio.create_task(embedder.aembed(["a"]))
            await asyncio.to_thread(server.wait_for, requests=1)
            for _ in range(10):
                await asyncio.sleep(0)
                ticks += 1
            assert not job.done()
        await job
        return ticks

    assert asyncio.run(ask()) == 10


def test_a_closed_embedder_says_so_and_closing_again_is_nothing(embed: Embed, server: FakeVLLMServer) -> None:
    embedder = Embedder(base_url=server.base_url)
    embedder.embed(["a"])
    embedder.close()
    embedder.close()
    for call in (lambda: embed(embedder, ["a"]), embedder.info, lambda: list(embedder.stream(["a"]))):
        with pytest.raises(errors.ClosedError, match="was closed"):
            call()


def test_it_is_a_context_manager_both_ways(server: FakeVLLMServer) -> None:
    async def ask() -> None:
        async with Embedder(base_url=server.base_url) as embedder:
            await embedder.aembed(["a"])
        with pytest.raises(errors.ClosedError):
            await embedder.aembed(["a"])

    asyncio.run(ask())


def test_closing_ends_what_waits_with_an_error(server: FakeVLLMServer) -> None:
    embedder = Embedder(base_url=server.base_url, max_concurrency=1, batch_size=1, model="fake-model")
    with ThreadPoolExecutor(1) as pool, server.hold():
        job = pool.submit(lambda: asyncio.run(embedder.aembed(["a", "b", "c"])))
        server.wait_for(requests=1)
        embedder.close()
        with pytest.raises(errors.ClosedError):
            job.result(timeout=5)
    assert server.requests == 1


def test_info_tells_what_is_served(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        info = embedder.info()
    assert (info.model, info.dimension, info.max_model_len, info.version) == ("fake-model", 16, 256, "0.32.0")
    (endpoint,) = info.endpoints
    assert (endpoint.url, endpoint.healthy, endpoint.state) == (server.base_url, True, "up")


def test_stats_count_from_the_start(server: FakeVLLMServer, embedder: Embedder) -> None:
    embedder.embed(["one two", "three"])
    stats = embedder.stats()
    assert (stats.texts, stats.requests, stats.retries, stats.in_flight, stats.most_in_flight) == (2, 1, 0, 0, 1)
    assert stats.prompt_tokens == 7  # three words and twice two special tokens
    assert stats.endpoints[server.base_url]["requests"] == 1


def test_copies_and_pickles_have_a_life_of_their_own(server: FakeVLLMServer) -> None:
    embedder = Embedder(base_url=server.base_url, batch_size=3)
    embedder.embed(["a"])
    twins = [copy.deepcopy(embedder), pickle.loads(pickle.dumps(embedder))]
    embedder.close()
    for twin in twins:
        assert twin.settings.batch_size == 3
        assert twin.embed(["a"]).shape == (1, 16)
        twin.close()


def test_an_injected_client_is_used_and_left_open(server: FakeVLLMServer) -> None:
    with httpx.Client(headers={"x-mine": "1"}) as client:
        with Embedder(base_url=server.base_url, http_client=client) as embedder:
            embedder.embed(["a"])
        assert server.request_headers[-1]["x-mine"] == "1"
        assert not client.is_closed
    with pytest.raises(errors.ConfigurationError, match="has been closed"):
        Embedder(base_url=server.base_url, http_client=client).embed(["a"])


def test_making_one_opens_no_socket_and_starts_no_thread() -> None:
    before = threading.active_count()
    embedder = Embedder(base_url="http://127.0.0.1:9", api_key="k")
    assert threading.active_count() == before
    embedder.close()


def test_workers_are_daemons_and_an_abandoned_embedder_leaves_nothing_behind(server: FakeVLLMServer) -> None:
    embedder = Embedder(base_url=server.base_url)
    asyncio.run(embedder.aembed([f"t{i}" for i in range(500)]))
    workers = [thread for thread in threading.enumerate() if thread.name == "vllm-embed"]
    assert workers
    assert all(thread.daemon for thread in workers)
    embedder.close()
    for thread in workers:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_progress_bar_counts_documents_on_stderr(
    embed: Embed, server: FakeVLLMServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with Embedder(base_url=server.base_url, show_progress=True) as embedder:
        embed(embedder, ["a"] * 130)
        shown = capsys.readouterr()
        embed(embedder, ["a"], kind="query")
        assert not capsys.readouterr().err
    assert "130/130" in shown.err
    assert not shown.out


def test_a_line_per_request_goes_to_the_log_without_text_or_key(
    server: FakeVLLMServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="vllm_embed")
    with Embedder(base_url=server.base_url, api_key="key-1234") as embedder:
        embedder.embed(["a private sentence"])
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vllm_embed"]
    assert f"{server.base_url}: 1 texts" in line
    assert "status 200" in line
    assert "key-1234" not in caplog.text
    assert "private" not in caplog.text


def test_lists_leave_the_collector_as_it_was() -> None:
    rows = np.ones((200, 4), dtype=np.float32)
    assert gc.isenabled()
    assert lists(rows) == rows.tolist()
    assert gc.isenabled()
    gc.disable()
    try:
        assert asyncio.run(alists(rows)) == rows.tolist()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_redirects_are_followed_within_the_origin_only(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.redirect(f"{server.base_url}/embeddings"))
    assert embedder.embed(["a"]).shape == (1, 16)
    with FakeVLLMServer(dimension=16) as other:
        server.order(Fault.redirect(f"{other.base_url}/embeddings"))
        with pytest.raises(errors.ServerStatusError, match="redirects to http://127.0.0.1, which is not followed"):
            embedder.embed(["a"])
        assert other.connections == 0


@pytest.mark.parametrize("fault", [Fault.trickle(200.0), Fault.trickle_headers(20.0)], ids=["body", "headers"])
def test_a_reply_that_trickles_in_is_cut_off_by_the_timeout(server: FakeVLLMServer, fault: Fault) -> None:
    server.order(fault)
    start = time.monotonic()
    with (
        Embedder(base_url=server.base_url, timeout=0.3, max_retries=0) as embedder,
        pytest.raises(errors.ServerTimeoutError, match="timeout=0.3 s"),
    ):
        embedder.embed(["a"] * 64)
    assert time.monotonic() - start < 5  # without a limit it would take minutes
