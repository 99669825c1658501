"""A server, a proxy or a network that misbehaves: the right vectors, or the typed error that says what to do."""

import asyncio
import itertools
import logging
import math
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed.testing import FakeVLLMServer, Fault

NOW = {"Retry-After": "0"}
TEXTS = [f"t{i}" for i in range(12)]


@pytest.fixture
def embedder(server: FakeVLLMServer) -> Iterator[Embedder]:
    with Embedder(base_url=server.base_url, model="fake-model") as made:
        yield made


def right(server: FakeVLLMServer, texts: list[str], vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(vectors, np.stack([server.vector(text) for text in texts]))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault.shuffled(), id="in another order"),
        pytest.param(Fault.float_reply(), id="floats although base64 was asked for"),
        pytest.param(Fault.no_usage(), id="without token counts"),
        pytest.param(Fault.reset(), id="connection reset"),
        pytest.param(Fault.close(), id="connection closed without a reply"),
        pytest.param(Fault.reset_mid_body(), id="reset in mid-body"),
        pytest.param(Fault.close_mid_body(), id="closed in mid-body"),
        pytest.param(Fault.status(503, headers=NOW), id="503"),
        pytest.param(Fault.status(429, headers=NOW), id="429"),
        pytest.param(Fault.status(500, headers=NOW), id="500"),
        pytest.param(Fault.status(408, headers=NOW), id="408"),
    ],
)
def test_a_passing_fault_costs_nobody_a_vector(server: FakeVLLMServer, embedder: Embedder, fault: Fault) -> None:
    server.order(fault)
    right(server, TEXTS, embedder.embed(TEXTS))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(Fault.short(), "12 texts were sent, the reply has 11", id="short"),
        pytest.param(Fault.long(), "12 texts were sent, the reply has 13", id="long"),
        pytest.param(Fault.duplicate_index(), "numbered", id="an index twice"),
        pytest.param(Fault.wrong_width(), "widths 15, 16", id="one vector of another width"),
        pytest.param(Fault.truncated_json(), "cut off", id="truncated JSON"),
        pytest.param(Fault.html(), "HTML page", id="HTML with status 200"),
    ],
)
def test_a_lasting_bad_reply_is_told_as_what_it_is(server: FakeVLLMServer, fault: Fault, said: str) -> None:
    server.order(fault, times=100)
    with Embedder(base_url=server.base_url, model="fake-model", max_retries=0) as embedder:
        with pytest.raises(errors.BadReplyError, match=said) as caught:
            embedder.embed(TEXTS)
        assert (caught.value.endpoint, caught.value.model, caught.value.indexes) == (server.base_url, "fake-model", ())


@pytest.mark.parametrize("fault", [Fault.nan(row=5), Fault.null(row=5)], ids=["NaN", "null"])
def test_a_vector_that_stays_not_finite_is_named_and_the_others_kept(server: FakeVLLMServer, fault: Fault) -> None:
    server.order(fault, times=100)
    with Embedder(base_url=server.base_url, model="fake-model", max_retries=0) as embedder:
        with pytest.raises(errors.BadReplyError, match=r"1 of 12 .*\[5\].*not finite") as caught:
            embedder.embed(TEXTS)
        assert caught.value.indexes == (5,)
        right(server, [*TEXTS[:5], *TEXTS[6:]], np.delete(caught.value.vectors, 5, axis=0))
        (block,) = embedder.stream(TEXTS, on_error="yield")
        assert list(block.failures) == [5]


def test_a_reply_that_is_bad_once_is_asked_for_again(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.nan())
    right(server, TEXTS, embedder.embed(TEXTS))
    assert embedder.stats().retries == 1


def test_later_batches_of_another_width_are_a_bad_reply(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, model="fake-model", batch_size=6, max_concurrency=1) as embedder:
        server.order(Fault.narrower(), when=lambda body: body["input"][0] == "t6")
        with pytest.raises(errors.BadReplyError, match="width 15 after others of width 16"):
            embedder.embed(TEXTS)


def test_503_twice_then_fine_with_retry_after(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.status(503, headers=NOW), times=2)
    right(server, ["a"], embedder.embed(["a"]))
    assert server.requests == 3


def test_retry_after_beyond_the_deadline_ends_at_once_and_says_so(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.status(429, headers={"Retry-After": "600"}), times=9)
    with pytest.raises(
        errors.ServerStatusError, match="gave up after 1 attempt, the server asked to wait 600 s"
    ) as caught:
        embedder.embed(["a"])
    assert (caught.value.status, caught.value.attempts) == (429, 1)


def test_retry_after_may_be_a_date(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.status(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}))
    server.order(Fault.status(503, headers={"Retry-After": "soon"}))
    right(server, ["a"], embedder.embed(["a"]))


def test_attempts_end_and_are_counted(server: FakeVLLMServer) -> None:
    server.order(Fault.status(500, headers=NOW), times=100)
    with Embedder(base_url=server.base_url, model="fake-model", max_retries=3) as embedder:
        with pytest.raises(errors.ServerStatusError, match="gave up after 4 attempts in") as caught:
            embedder.embed(["a"])
        assert caught.value.attempts == server.requests == 4
        assert embedder.stats().retries == 3


def test_nothing_listening_says_how_to_start_a_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with Embedder(base_url=f"http://127.0.0.1:{port}", model="m", max_retries=0) as embedder:
        with pytest.raises(errors.ServerUnreachableError, match="is the server running there") as caught:
            embedder.embed(["a"])
        assert caught.value.endpoint == f"http://127.0.0.1:{port}/v1"
    with Embedder(base_url=f"http://127.0.0.1:{port}", max_retries=0) as unknowing:
        with pytest.raises(errors.ServerUnreachableError):
            unknowing.embed(["a"])
        with pytest.raises(errors.ServerUnreachableError):
            unknowing.info()


def test_https_to_a_plain_port_says_so(server: FakeVLLMServer) -> None:
    url = server.base_url.replace("http://", "https://")
    with (
        Embedder(base_url=url, model="m", max_retries=0) as embedder,
        pytest.raises(errors.ServerUnreachableError, match=r"write http:// in base_url"),
    ):
        embedder.embed(["a"])


def test_a_certificate_path_that_cannot_be_read_says_so() -> None:
    with (
        Embedder(base_url="https://127.0.0.1:9", model="m", verify="/nowhere/ca.pem") as embedder,
        pytest.raises(errors.ConfigurationError, match="not a readable file of CA certificates"),
    ):
        embedder.embed(["a"])


def test_a_server_that_never_answers_is_a_timeout(server: FakeVLLMServer) -> None:
    with (
        server.hold(),
        Embedder(base_url=server.base_url, model="m", timeout=0.1, max_retries=0) as embedder,
        pytest.raises(errors.ServerTimeoutError, match="a loaded server may need more"),
    ):
        embedder.embed(["a"])


def test_an_idle_connection_closed_by_the_server_costs_nothing(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.idle_timeout_s = 0.01
    for _ in range(20):
        right(server, ["a"], embedder.embed(["a"]))
    assert embedder.stats().retries <= 20


def test_a_wrong_key_is_an_error_after_one_request() -> None:
    with FakeVLLMServer(dimension=16, api_key="right") as server:
        with Embedder(base_url=server.base_url, api_key="wrong", model="fake-model") as embedder:
            with pytest.raises(errors.AuthenticationError, match="VLLM_API_KEY") as caught:
                embedder.embed(["a"])
            assert (caught.value.status, server.requests) == (401, 1)
            with pytest.raises(errors.AuthenticationError):
                embedder.embed([f"t{i}" for i in range(64 * 100)])
            assert server.requests <= 1 + 16
            with pytest.raises(errors.AuthenticationError):
                asyncio.run(embedder.aembed(["a"]))
        with (
            Embedder(base_url=server.base_url, api_key="wrong") as unknowing,
            pytest.raises(errors.AuthenticationError),
        ):
            unknowing.embed(["a"])


def test_an_unknown_model_is_an_error_after_one_request(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, model="other") as embedder:
        with pytest.raises(errors.ModelNotFoundError, match="`other` does not exist"):
            embedder.embed(["a"])
    assert server.requests == 1


@pytest.mark.parametrize("bad", [[500], [3, 64, 999], list(range(40, 45))])
def test_bad_texts_among_a_thousand_are_named_and_the_others_kept(
    server: FakeVLLMServer, embedder: Embedder, bad: list[int]
) -> None:
    texts = [f"t{i}" for i in range(1_000)]
    server.refuse = lambda text: "no such text" if text in {f"t{i}" for i in bad} else None
    with pytest.raises(errors.InvalidInputError) as caught:
        embedder.embed(texts)
    assert caught.value.indexes == tuple(bad)
    good = [i for i in range(1_000) if i not in bad]
    right(server, [texts[i] for i in good], caught.value.vectors[good])
    if len(bad) == 1:
        assert server.requests <= 16 + 2 * math.log2(64) + 1  # and one look whether the request itself is at fault


def test_several_long_texts_are_found_together(server: FakeVLLMServer, embedder: Embedder) -> None:
    texts = [f"t{i}" for i in range(64)]
    for i in (7, 33, 60):
        texts[i] = "word " * 300
    with pytest.raises(errors.InputTooLongError, match=r"3 of 64 .*at least 257 tokens, the limit is 256") as caught:
        embedder.embed(texts)
    assert caught.value.indexes == (7, 33, 60)
    assert server.requests <= 16  # the longest go together: 64, then 32+32, 16+16, ...


def test_a_refused_text_costs_no_other_call_its_vectors(server: FakeVLLMServer) -> None:
    async def ask() -> list:
        with server.hold():
            jobs = [asyncio.create_task(embedder.aembed([text])) for text in ["first", "a", "b", "c" * 3_000, "d"]]
            await asyncio.to_thread(server.wait_for, requests=1)
        return await asyncio.gather(*jobs, return_exceptions=True)

    with Embedder(base_url=server.base_url, model="fake-model", max_concurrency=1) as embedder:
        *good, bad, last = asyncio.run(ask())
    assert isinstance(bad, errors.InputTooLongError)
    assert bad.indexes == (0,)
    right(server, ["first", "a", "b", "d"], np.concatenate([*good, last]))


def test_a_request_that_can_never_pass_is_not_split_into_its_texts(server: FakeVLLMServer) -> None:
    server.refuse = lambda _: "some parameter is wrong"
    with Embedder(base_url=server.base_url, model="fake-model") as embedder:
        with pytest.raises(errors.ServerStatusError, match="whatever its text") as caught:
            embedder.embed(TEXTS)
    assert caught.value.indexes == ()
    assert server.requests == 2


def test_dimensions_of_a_model_that_has_none_are_explained_at_once(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, model="fake-model", dimensions=8) as embedder:
        with pytest.raises(errors.ServerStatusError, match="is_matryoshka"):
            embedder.embed(TEXTS)
    assert server.requests == 2  # and one look at the model's own width


def test_413_halves_the_request_and_the_size_that_passed_is_kept(server: FakeVLLMServer) -> None:
    server.max_body_bytes = 3_000
    texts = [f"{i:04d} " + "x" * 95 for i in range(256)]
    with Embedder(base_url=server.base_url, model="fake-model", max_concurrency=1, long_text="truncate") as embedder:
        embedder.embed(texts[:64])
        server.reset_counters()
        assert embedder.embed(texts).shape == (256, 16)
    assert server.requests <= 256 / 16 + 1


def test_413_for_a_single_text_names_it(server: FakeVLLMServer) -> None:
    server.max_body_bytes = 1_000
    with (
        Embedder(base_url=server.base_url, model="fake-model") as embedder,
        pytest.raises(errors.InputTooLongError, match="larger than the server or its proxy takes") as caught,
    ):
        embedder.embed(["a", "b" * 2_000])
    assert caught.value.indexes == (1,)


def test_503_twice_halves_the_request_and_the_size_that_passed_is_kept(server: FakeVLLMServer) -> None:
    server.max_queued_texts = 20
    texts = [f"t{i}" for i in range(128)]
    options = {"model": "fake-model", "max_concurrency": 1, "retry_deadline": 600}
    with Embedder(base_url=server.base_url, **options) as embedder:
        right(server, texts[:40], embedder.embed(texts[:40]))
        server.reset_counters()
        right(server, texts, embedder.embed(texts))
    assert max(len(body["input"]) for body in server.bodies) == 20
    assert server.requests == 7


def test_one_failed_call_cancels_no_other(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, model="fake-model", max_retries=0, batch_size=4) as embedder:
        server.order(Fault.status(500), when=lambda body: "bad0" in body["input"], times=9)

        async def ask() -> list:
            jobs = (embedder.aembed([f"{name}{i}" for i in range(4)]) for name in ("good", "bad", "fine"))
            return await asyncio.gather(*jobs, return_exceptions=True)

        good, bad, fine = asyncio.run(ask())
    assert isinstance(bad, errors.ServerStatusError)
    right(server, [f"good{i}" for i in range(4)], good)
    right(server, [f"fine{i}" for i in range(4)], fine)


def test_after_a_cancelled_await_no_new_request_goes_out_and_the_object_works_on(server: FakeVLLMServer) -> None:
    async def ask() -> None:
        with server.hold():
            job = asyncio.create_task(embedder.aembed([f"t{i}" for i in range(100)]))
            await asyncio.to_thread(server.wait_for, requests=2)
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
        right(server, ["after"], await embedder.aembed(["after"]))

    with Embedder(base_url=server.base_url, model="fake-model", max_concurrency=2, batch_size=2) as embedder:
        asyncio.run(ask())
    assert server.requests == 3


def test_after_ctrl_c_no_new_request_goes_out_and_the_object_works_on(server: FakeVLLMServer) -> None:
    seen = itertools.count()

    def interrupt(text: str) -> None:  # runs in the server's thread, when the first text of our own request is there
        if text == "t0":
            import _thread

            _thread.interrupt_main()
        next(seen)

    server.refuse = interrupt
    server.delay_s = 0.3
    with Embedder(base_url=server.base_url, model="fake-model", max_concurrency=1, batch_size=2) as embedder:
        with pytest.raises(KeyboardInterrupt):
            embedder.embed([f"t{i}" for i in range(100)])
        server.delay_s = 0.0
        right(server, ["after"], embedder.embed(["after"]))
    assert server.requests <= 3


def test_of_two_calls_in_one_request_a_cancelled_one_leaves_the_other_its_own_rows(server: FakeVLLMServer) -> None:
    async def ask() -> np.ndarray:
        with server.hold():
            first = asyncio.create_task(embedder.aembed(["first"]))
            await asyncio.to_thread(server.wait_for, requests=1)
            leaves = asyncio.create_task(embedder.aembed(["x", "y"]))
            stays = asyncio.create_task(embedder.aembed(["z"]))
            await asyncio.sleep(0)
        while not embedder.stats().retries:
            await asyncio.sleep(0.001)
        leaves.cancel()
        await first
        return await stays

    server.order(Fault.status(503, headers={"Retry-After": "0.2"}), when=lambda body: "z" in body["input"])
    with Embedder(base_url=server.base_url, model="fake-model", max_concurrency=1) as embedder:
        right(server, ["z"], asyncio.run(ask()))
    assert [body["input"] for body in server.bodies][1:] == [["x", "y", "z"], ["z"]]


def test_a_cancelled_call_does_not_sit_out_its_pause(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.status(503, headers={"Retry-After": "60"}))

    async def ask() -> None:
        job = asyncio.create_task(embedder.aembed(["a"]))
        await asyncio.to_thread(server.wait_for, requests=1)
        while not embedder.stats().retries:
            await asyncio.sleep(0.001)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(ask())
    workers = [thread for thread in threading.enumerate() if thread.name == "vllm-embed"]
    embedder.close()
    for worker in workers:
        worker.join(timeout=5)
        assert not worker.is_alive()
    assert server.requests == 1


def test_retries_are_warned_of_and_show_no_secret(server: FakeVLLMServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = b'{"error": {"message": "bad token key-1234 in a whole private sentence"}}'
    server.order(Fault.status(500, headers=NOW, body=said), times=100)
    host = server.base_url.removeprefix("http://")
    options: list[dict] = [
        {"base_url": server.base_url, "api_key": "key-1234"},
        {"base_url": f"http://user:key-1234@{host}"},
        {"base_url": server.base_url, "default_headers": {"X-Key": "key-1234"}},
    ]
    for option in options:
        with Embedder(model="fake-model", max_retries=1, **option) as embedder:
            with pytest.raises(errors.ServerStatusError) as caught:
                embedder.embed(["a whole private sentence"])
            if "user" not in str(option):
                assert "key-1234" not in str(caught.value) + repr(caught.value)
            assert "private" not in str(caught.value) + repr(caught.value)
    warned = [record.getMessage() for record in caplog.records if record.name == "vllm_embed" and record.levelno == 30]
    assert len(warned) == 3
    assert "private" not in caplog.text


@pytest.mark.parametrize("models", [["one", "two"], []], ids=["several models are listed", "an empty list of models"])
def test_without_one_model_to_take_the_error_lists_them(
    server: FakeVLLMServer, monkeypatch: pytest.MonkeyPatch, models: list[str]
) -> None:
    import vllm_embed._server as module

    cards = [module.ModelCard(name, None, 256) for name in models]
    monkeypatch.setattr(module.Server, "cards", lambda *_: cards)
    with (
        Embedder(base_url=server.base_url) as embedder,
        pytest.raises(errors.ConfigurationError, match=f"lists {len(models)} models .*model="),
    ):
        embedder.embed(["a"])


def test_a_defect_of_ours_reaches_the_caller_instead_of_leaving_it_waiting(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Callable[[], None]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("vllm_embed._wire.read_reply", broken)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(embedder.aembed(["a"]))
    assert embedder.stats().in_flight == 0
