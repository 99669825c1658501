"""`Embedder.stream`: any number of texts, in order, in bounded memory."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed.testing import FakeVLLMServer, Fault


@pytest.fixture
def embedder(server: FakeVLLMServer) -> Iterator[Embedder]:
    with Embedder(base_url=server.base_url, model="fake-model", batch_size=8, max_concurrency=2) as made:
        yield made


def test_blocks_come_in_order_and_cover_every_text(server: FakeVLLMServer, embedder: Embedder) -> None:
    texts = [f"t{i}" for i in range(100)]
    blocks = list(embedder.stream(iter(texts)))
    assert [block.start for block in blocks] == list(range(0, 100, 8))
    assert not any(block.failures for block in blocks)
    np.testing.assert_array_equal(
        np.concatenate([block.vectors for block in blocks]), np.stack([server.vector(text) for text in texts])
    )


def test_no_text_gives_no_block(embedder: Embedder) -> None:
    assert list(embedder.stream([])) == []


def test_it_reads_no_further_ahead_than_its_window(embedder: Embedder) -> None:
    read = itertools.count()
    stream = embedder.stream(f"t{next(read)}" for _ in itertools.repeat(None))
    next(stream)
    next(stream)
    stream.close()
    assert next(read) <= 8 * (2 * 2 + 1)  # two blocks for each of two requests, and one given out


def test_large_texts_make_small_blocks(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, max_batch_chars=100, long_text="truncate") as embedder:
        sizes = [len(block.vectors) for block in embedder.stream(["x" * 60] * 7)]
    assert sizes == [2, 2, 2, 1]


def test_refused_texts_are_nan_rows_with_reasons_and_the_stream_goes_on(
    server: FakeVLLMServer, embedder: Embedder
) -> None:
    texts: list = [f"t{i}" for i in range(40)]
    texts[3] = None
    texts[21] = "word " * 300
    texts[24:32] = [None] * 8  # a whole block without anything to send
    blocks = list(embedder.stream(texts, on_error="yield"))
    vectors = np.concatenate([block.vectors for block in blocks])
    failures = {index: error for block in blocks for index, error in block.failures.items()}
    assert sorted(failures) == [3, 21, *range(24, 32)]
    assert vectors.shape == (40, 16)
    assert np.flatnonzero(np.isnan(vectors).all(axis=1)).tolist() == sorted(failures)
    assert isinstance(failures[21], errors.InputTooLongError)
    assert (failures[21].indexes, failures[21].reasons) == ((21,), {21: str(failures[21])})
    np.testing.assert_array_equal(vectors[39], server.vector("t39"))


@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
def test_a_block_of_which_the_server_refuses_every_text_does_not_end_the_stream(
    server: FakeVLLMServer, first: bool
) -> None:
    refused = ["word " * 300] * 7 + [" "]
    texts = refused + ["fine"] * 8 if first else ["fine"] * 8 + refused
    with Embedder(base_url=server.base_url, batch_size=8, blank_text="zero") as embedder:
        one, other = embedder.stream(texts, on_error="yield")
    bad, good = (one, other) if first else (other, one)
    assert sorted(bad.failures) == list(range(bad.start, bad.start + 7))
    assert bad.vectors.shape == (8, 16)
    assert np.isnan(bad.vectors[:7]).all()
    assert not bad.vectors[7].any()
    np.testing.assert_array_equal(good.vectors[0], server.vector("fine"))


def test_with_raise_the_stream_ends_at_the_refused_text_named_by_its_place(embedder: Embedder) -> None:
    texts = [f"t{i}" for i in range(40)]
    texts[21] = "word " * 300
    stream = embedder.stream(texts)
    assert [next(stream).start, next(stream).start] == [0, 8]
    with pytest.raises(errors.InputTooLongError, match=r"\[21\]") as caught:
        next(stream)
    assert caught.value.indexes == (21,)
    assert list(stream) == []


def test_other_errors_end_the_stream_whatever_on_error_says(server: FakeVLLMServer, embedder: Embedder) -> None:
    server.order(Fault.status(401), times=100)
    with pytest.raises(errors.AuthenticationError):
        list(embedder.stream([f"t{i}" for i in range(40)], on_error="yield"))


def test_on_error_takes_two_words(embedder: Embedder) -> None:
    with pytest.raises(errors.ConfigurationError, match='"raise" or "yield"'):
        embedder.stream(["a"], on_error="ignore")


def test_leaving_a_stream_early_sends_nothing_more(server: FakeVLLMServer, embedder: Embedder) -> None:
    stream = embedder.stream(f"t{i}" for i in range(1_000))
    next(stream)
    stream.close()
    embedder.embed(["after"])
    assert server.requests <= 8
    assert embedder.stats().in_flight <= 2


def test_a_progress_bar_counts_without_a_total(server: FakeVLLMServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Embedder(base_url=server.base_url, show_progress=True) as embedder:
        list(embedder.stream(f"t{i}" for i in range(70)))
    assert "70doc" in capsys.readouterr().err
