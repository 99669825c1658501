"""`long_text="chunk"`: pieces that fit, their weighted mean, and everything else as always."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_embed import Embedder, errors
from vllm_embed._chunk import Piece, mean, split
from vllm_embed._shape import unit
from vllm_embed.testing import FakeVLLMServer, Fault, count_tokens

Embed = Callable[..., np.ndarray]

TEXTS = st.text(st.sampled_from("ab한国 \n\t.,é"), max_size=400)


@given(TEXTS, st.integers(4, 40))
def test_pieces_fit_and_together_are_the_text(text: str, limit: int) -> None:
    pieces = split(text, limit, count_tokens)
    assert "".join(piece.text for piece in pieces) == text
    assert all(count_tokens(piece.text) <= limit for piece in pieces)
    assert all(piece.tokens == count_tokens(piece.text) - 2 for piece in pieces)


@given(st.lists(st.sampled_from(["one", "two", "토성의", "고리는"]), min_size=1, max_size=300), st.integers(8, 40))
def test_pieces_end_at_whitespace_and_are_well_filled(words: list[str], limit: int) -> None:
    pieces = split(" ".join(words), limit, count_tokens)
    assert all(piece.text.endswith(" ") for piece in pieces[:-1])
    assert all(piece.tokens > (limit - 2) / 3 for piece in pieces[:-1])


def test_counting_goes_over_a_text_a_bounded_number_of_times() -> None:
    counted = 0

    def count(piece: str) -> int:
        nonlocal counted
        counted += len(piece)
        assert len(piece) <= 12 * 256
        return count_tokens(piece)

    text = "word and another longer one " * 40_000  # 1.1 million characters
    split(text, 256, count)
    assert counted < 5 * len(text)


def test_a_prompt_that_leaves_no_room_is_said() -> None:
    with pytest.raises(errors.InputTooLongError, match="the prompt alone has 12 tokens, the limit is 10"):
        split("text", 10, lambda piece: count_tokens(piece) + 10)
    with pytest.raises(errors.InputTooLongError, match="one character has"):
        split("text", 10, lambda piece: 100 if piece else 2)


def test_the_mean_is_weighted_and_of_length_1_where_the_pieces_are() -> None:
    rows = unit(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(mean(rows, [3, 1]), unit(np.array([[3.0, 1.0]])), atol=1e-6)
    np.testing.assert_allclose(mean(rows * 2, [3, 1]), [[1.5, 0.5]])


@pytest.fixture(params=["sync", "async"])
def embed(request: pytest.FixtureRequest) -> Embed:
    if request.param == "sync":
        return lambda embedder, *args, **kwargs: embedder.embed(*args, **kwargs)
    return lambda embedder, *args, **kwargs: asyncio.run(embedder.aembed(*args, **kwargs))


def wanted(server: FakeVLLMServer, text: str, prompt: str = "") -> np.ndarray:
    """The mean by hand, of the pieces that were sent for it."""
    pieces = split(text, 256, lambda piece: count_tokens(prompt + piece))
    rows = np.stack([server.vector(prompt + piece.text) for piece in pieces])
    return mean(rows, [piece.tokens for piece in pieces])[0]


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_long_texts_become_means_and_short_ones_stay_what_they_are(
    embed: Embed, server: FakeVLLMServer, prompt: str
) -> None:
    long = ["word and another " * n for n in (100, 1_000, 20_000)]
    texts = ["short", long[0], "", long[1], *[f"t{i}" for i in range(100)], long[2]]
    with Embedder(base_url=server.base_url, long_text="chunk", document_prompt=prompt) as embedder:
        vectors = embed(embedder, texts)
    for index, text in ((1, long[0]), (3, long[1]), (104, long[2])):
        np.testing.assert_allclose(vectors[index], wanted(server, text, prompt), atol=1e-5)
    np.testing.assert_array_equal(vectors[0], server.vector(prompt + "short"))
    np.testing.assert_array_equal(vectors[50], server.vector(f"{prompt}t46"))
    assert max(sum(map(len, body["input"])) for body in server.bodies) < 300_000  # never the longest text whole


def test_a_word_longer_than_the_limit_is_cut(server: FakeVLLMServer) -> None:
    word = "가나다라" * 2_500
    with Embedder(base_url=server.base_url, long_text="chunk") as embedder:
        np.testing.assert_allclose(embedder.embed([word])[0], wanted(server, word), atol=1e-5)


def test_errors_of_pieces_are_errors_of_their_text(server: FakeVLLMServer) -> None:
    server.refuse = lambda text: "prompt cannot be empty" if "poison" in text else None
    texts = ["fine", "word " * 400 + "poison", "fine too"]
    with Embedder(base_url=server.base_url, long_text="chunk") as embedder:
        with pytest.raises(errors.InvalidInputError) as caught:
            embedder.embed(texts)
        assert caught.value.indexes == (1,)
        np.testing.assert_array_equal(caught.value.vectors[2], server.vector("fine too"))
        (block,) = embedder.stream(texts, on_error="yield")
        assert list(block.failures) == [1]
    with Embedder(base_url=server.base_url, long_text="chunk", max_retries=0) as embedder:
        server.order(Fault.status(401), times=None, when=lambda body: any("word" in text for text in body["input"]))
        with pytest.raises(errors.AuthenticationError):
            embedder.embed(texts)


def test_a_prompt_over_the_limit_is_an_error_of_each_long_text(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, long_text="chunk", document_prompt="p " * 300) as embedder:
        with pytest.raises(errors.InputTooLongError, match="the prompt alone has"):
            embedder.embed(["a"])


def test_one_request_at_a_time_is_enough(embed: Embed, server: FakeVLLMServer) -> None:
    text = "word and another " * 1_000
    with Embedder(base_url=server.base_url, long_text="chunk", max_concurrency=1) as embedder:
        np.testing.assert_allclose(embed(embedder, [text, "b"])[0], wanted(server, text), atol=1e-5)
        assert embedder.stats().most_in_flight == 1


def test_pieces_need_the_route_that_counts(server: FakeVLLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object) -> None:
        raise errors.ModelNotFoundError("404")

    monkeypatch.setattr("vllm_embed._server.Server.count", hidden)
    with Embedder(base_url=server.base_url, long_text="chunk") as embedder:
        with pytest.raises(errors.ModelNotFoundError):
            embedder.embed(["word " * 400])


def test_a_blank_piece_weighs_nothing(server: FakeVLLMServer) -> None:
    text = "hello" + " " * 9_000 + "world"
    with Embedder(base_url=server.base_url, long_text="chunk") as embedder:
        vector = embedder.embed([text])[0]
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    assert Piece("", 0).tokens == 0
