"""`dimensions` and `normalize`: what is asked of the server, and what is done here."""

from collections.abc import Iterator

import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed._shape import is_unit, unit
from vllm_embed.testing import FakeVLLMServer

TEXTS = ["one text", "another"]


@pytest.fixture
def matryoshka() -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(dimension=16, matryoshka=True) as server:
        yield server


def test_dimensions_are_served_where_the_model_allows(matryoshka: FakeVLLMServer) -> None:
    with Embedder(base_url=matryoshka.base_url, dimensions=8) as embedder:
        vectors = embedder.embed(TEXTS)
    np.testing.assert_array_equal(vectors, np.stack([matryoshka.vector(text, 8) for text in TEXTS]))


def test_the_native_width_is_never_sent(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, dimensions=16) as embedder:
        assert embedder.embed(TEXTS).shape == (2, 16)
        assert embedder.embed(TEXTS).shape == (2, 16)
    assert not any("dimensions" in body for body in server.bodies)
    assert server.requests == 3  # the model's own width was asked for once


def test_more_dimensions_than_the_model_has_are_refused_with_its_number(matryoshka: FakeVLLMServer) -> None:
    with (
        Embedder(base_url=matryoshka.base_url, dimensions=32) as embedder,
        pytest.raises(errors.ConfigurationError, match="dimensions=32: the model has 16"),
    ):
        embedder.embed(TEXTS)


def test_with_the_fallback_vectors_are_cut_and_renormalized_here(
    server: FakeVLLMServer, matryoshka: FakeVLLMServer
) -> None:
    with Embedder(base_url=server.base_url, dimensions=8, dimensions_fallback="client") as embedder:
        vectors = embedder.embed([*TEXTS, *TEXTS])
        np.testing.assert_allclose(vectors[:2], [matryoshka.vector(text, 8) for text in TEXTS], atol=1e-6)
        asked = server.requests
        embedder.embed(TEXTS)
        assert server.requests == asked + 1  # the refusal is remembered
        assert embedder.info().dimension == 8


def test_requests_that_are_refused_at_the_same_time_are_all_cut_here(
    server: FakeVLLMServer, matryoshka: FakeVLLMServer
) -> None:
    server.delay_s = 0.2  # all four are on their way before the first is refused
    texts = [f"text {number}" for number in range(4)]
    with Embedder(base_url=server.base_url, dimensions=8, dimensions_fallback="client", batch_size=1) as embedder:
        vectors = embedder.embed(texts)
        assert embedder.stats().most_in_flight == 4
    np.testing.assert_allclose(vectors, [matryoshka.vector(text, 8) for text in texts], atol=1e-6)


def test_without_the_fallback_the_refusal_names_the_servers_flag_and_the_fallback(server: FakeVLLMServer) -> None:
    with (
        Embedder(base_url=server.base_url, dimensions=8) as embedder,
        pytest.raises(errors.ServerStatusError, match="is_matryoshka.*dimensions_fallback"),
    ):
        embedder.embed(TEXTS)


def test_raw_vectors_are_asked_for_under_the_servers_own_name() -> None:
    for version, field in (("0.32.0", "use_activation"), ("0.15.1", "normalize"), ("0.16.0rc1", "use_activation")):
        with FakeVLLMServer(dimension=16, version=version) as server:
            with Embedder(base_url=server.base_url, normalize=False, max_retries=0) as embedder:
                if field == "use_activation":
                    assert not is_unit(embedder.embed(TEXTS))
                else:  # the fake is 0.32 and refuses the old name
                    with pytest.raises(errors.VLLMEmbedError):
                        embedder.embed(TEXTS)
            assert server.bodies[0][field] is False


def test_unit_vectors_where_raw_ones_were_asked_for_are_an_error() -> None:
    with FakeVLLMServer(dimension=16) as server:
        with Embedder(base_url=server.base_url, normalize=False) as embedder:
            raw = embedder.embed(TEXTS)
        np.testing.assert_allclose(unit(raw), [server.vector(text) for text in TEXTS], atol=1e-6)


def test_true_gives_unit_vectors_whatever_the_model_gives() -> None:
    with FakeVLLMServer(dimension=16, normalize=False) as server:
        with Embedder(base_url=server.base_url) as embedder:
            raw = embedder.embed(TEXTS)
        with Embedder(base_url=server.base_url, normalize=True) as embedder:
            vectors = embedder.embed(TEXTS)
    assert not is_unit(raw)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, unit(raw), atol=1e-6)


def test_zeros_stay_zeros() -> None:
    assert not unit(np.zeros((1, 3), dtype=np.float32)).any()
