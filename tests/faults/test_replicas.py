"""Several replicas behind one embedder: balance, failing over, coming back, and those that do not belong together."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed._address import addresses
from vllm_embed._replicas import Replicas
from vllm_embed.testing import FakeVLLMServer, Fault

TEXTS = [f"t{i}" for i in range(600)]


@pytest.fixture
def pair() -> Iterator[tuple[FakeVLLMServer, FakeVLLMServer]]:
    with FakeVLLMServer(dimension=16) as one, FakeVLLMServer(dimension=16) as two:
        yield one, two


def over(*servers: FakeVLLMServer, **options: object) -> Embedder:
    return Embedder(base_url=[server.base_url for server in servers], model="fake-model", **options)


def right(server: FakeVLLMServer, texts: list[str], vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(vectors, np.stack([server.vector(text) for text in texts]))


def test_requests_go_where_the_fewest_are_in_flight(pair: tuple[FakeVLLMServer, FakeVLLMServer]) -> None:
    one, two = pair
    one.delay_s = two.delay_s = 0.02
    with over(*pair, batch_size=10) as embedder:
        right(one, TEXTS, embedder.embed(TEXTS))
        assert embedder.stats().most_in_flight <= 32
    assert min(one.requests, two.requests) >= 20
    assert max(one.most_in_flight, two.most_in_flight) <= 16


def test_a_dead_replica_costs_no_vector_and_is_left_out(
    pair: tuple[FakeVLLMServer, FakeVLLMServer], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    with over(*pair, batch_size=5) as embedder:
        embedder.embed(TEXTS)
        two.stop()
        right(one, TEXTS, embedder.embed(TEXTS))
        left_out = [record for record in caplog.records if "is left out" in record.getMessage()]
        assert left_out
        assert two.base_url in left_out[0].getMessage()
        states = {endpoint.url: (endpoint.state, endpoint.healthy) for endpoint in embedder.info().endpoints}
        assert states[one.base_url] == ("up", True)
        assert states[two.base_url][1] is False


def test_a_replica_killed_in_the_middle_loses_and_repeats_no_row(pair: tuple[FakeVLLMServer, FakeVLLMServer]) -> None:
    one, two = pair
    with over(*pair, batch_size=5) as embedder:
        two.order(Fault.reset_mid_body(), times=None, when=lambda body: two.requests > 10)
        right(one, TEXTS, embedder.embed(TEXTS))
        two.cancel_orders()


def test_a_replica_that_comes_back_on_the_same_port_is_used_again(
    pair: tuple[FakeVLLMServer, FakeVLLMServer], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    caplog.set_level(logging.WARNING)
    with over(*pair, batch_size=5) as embedder:
        two.stop()
        embedder.embed(TEXTS)
        two.start()
        two.reset_counters()
        for _ in range(200):
            right(one, TEXTS, embedder.embed(TEXTS))
            if two.requests > 20:
                break
        else:
            pytest.fail("the replica was not used again")
    assert any("answers again" in record.getMessage() for record in caplog.records)


def test_when_all_are_gone_one_error_lists_each(pair: tuple[FakeVLLMServer, FakeVLLMServer]) -> None:
    one, two = pair
    with over(*pair, max_retries=2) as embedder:
        embedder.embed(["a"])
        one.stop()
        two.stop()
        with pytest.raises(errors.ServerUnreachableError, match="no replica answered") as caught:
            embedder.embed(["b"])
        assert all(server.base_url in str(caught.value) for server in pair)


def test_a_busy_replicas_requests_go_to_the_other_at_once(pair: tuple[FakeVLLMServer, FakeVLLMServer]) -> None:
    one, two = pair
    one.order(Fault.status(503, headers={"Retry-After": "60"}), times=None)
    with over(*pair, max_concurrency=2, batch_size=5) as embedder:
        right(two, TEXTS[:100], embedder.embed(TEXTS[:100]))
        assert next(e for e in embedder.info().endpoints if e.url == one.base_url).state == "left out"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": "other-model"}, "serve different models: .* serves 'other-model', not 'fake-model'"),
        ({"max_model_len": 512}, "differ in max_model_len.*: 256.*: 512|: 512.*: 256"),
        ({"dimension": 32}, "differ in width: .*: 16.*: 32|: 32.*: 16"),
    ],
    ids=["another name", "another limit", "another width"],
)
def test_replicas_that_do_not_belong_together_are_named(server: FakeVLLMServer, other: dict, said: str) -> None:
    options = {"dimension": 16, **other}
    with FakeVLLMServer(**options) as stranger, over(server, stranger, batch_size=5) as embedder:
        with pytest.raises(errors.ConfigurationError, match=said) as caught:
            embedder.embed(TEXTS)
        assert stranger.base_url in str(caught.value)


def test_without_a_model_the_first_replica_that_answers_is_asked(pair: tuple[FakeVLLMServer, FakeVLLMServer]) -> None:
    one, two = pair
    one.stop()
    with Embedder(base_url=[one.base_url, two.base_url]) as embedder:
        right(two, ["a"], embedder.embed(["a"]))


def test_a_gateway_that_hides_the_list_is_taken_as_it_is(
    pair: tuple[FakeVLLMServer, FakeVLLMServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: object) -> None:
        raise errors.ModelNotFoundError("404")

    monkeypatch.setattr("vllm_embed._server.Server.cards", hidden)
    with over(*pair) as embedder:
        right(pair[0], TEXTS, embedder.embed(TEXTS))


def test_a_slower_replica_gets_its_share_of_speed_in_flight_and_one_more() -> None:
    replicas = Replicas(addresses(["http://a", "http://b"]), most=16)
    fast, slow = replicas.all
    assert replicas.slots == 32
    for replica, seconds in ((fast, 0.1), (slow, 1.0)):
        taken = replicas.take(avoid=slow if replica is fast else fast)
        assert taken is replica
        replicas.done(replica, 64, seconds)
    assert replicas.slots == 16 + 3  # a tenth of the speed: 1.6, rounded up, and one to show when it gets faster
    held = [replicas.take() for _ in range(replicas.slots)]
    assert (held.count(fast), held.count(slow)) == (16, 3)
