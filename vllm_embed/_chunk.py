"""`long_text="chunk"`: a text over the model's limit becomes pieces that fit, and the mean of their vectors.

A piece's weight is its tokens without the prompt's and the special ones. The mean is re-normalized where the vectors of
the pieces have length 1. Pieces end at whitespace, which stays with the piece before it; a word longer than a piece is
cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_embed import _text
from vllm_embed._job import Job
from vllm_embed._shape import is_unit, unit
from vllm_embed.errors import InputTooLongError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from vllm_embed._backend import Backend

__all__ = ["Chunker", "Piece", "mean", "split"]

_CHARS = 12
"""Most characters a token of the limit in one piece: vLLM 0.32 refuses texts of over 18 a token unread."""
_FIRST_CHARS = 3.0
"""Characters a token that are tried first."""
_FULL = 0.7
"""A piece that fills less of the limit is tried again longer."""
_GROWTHS = 2
"""Times that a piece may be tried longer."""
_LONG = 16
"""Characters a token of the limit from which on a text is split without being tried whole."""


class Piece(NamedTuple):
    """Consecutive characters of a text."""

    text: str
    tokens: int
    """Without the prompt's and the special ones."""


def split(text: str, limit: int, count: Callable[[str], int]) -> list[Piece]:
    """Cut a text into pieces of at most `limit` tokens; together they are the text.

    Args:
        text: any length. No more than a dozen characters a token of the limit are counted at once.
        limit: most tokens of a piece, special ones included.
        count: tokens of a piece with its prompt and special tokens.

    Raises:
        InputTooLongError: the prompt alone, or with one character, is over the limit.
    """
    extra = count("")
    room = limit - extra
    if room < 1:
        raise InputTooLongError(f"the prompt alone has {extra} tokens, the limit is {limit}")
    pieces: list[Piece] = []
    rate, start = _FIRST_CHARS, 0
    while start < len(text):
        most = min(len(text) - start, room * _CHARS)
        length, good, growths = max(1, min(most, int(room * rate))), None, 0
        while True:
            end = _boundary(text, start, start + length)
            tokens = count(text[start:end]) - extra
            if tokens <= room:
                good = Piece(text[start:end], tokens)
                full = tokens >= room * _FULL or end - start >= most
                if full or growths == _GROWTHS:
                    break
                growths += 1
                longer = int((end - start) * room * 0.95 / max(tokens, 1))
                if longer <= length:
                    break
                length = min(most, longer)
            else:
                if good is not None:
                    break
                if end - start == 1:
                    raise InputTooLongError(f"one character has {tokens} tokens, there is room for {room}")
                length = max(1, min(int((end - start) * room * 0.9 / tokens), end - start - 1))
        pieces.append(good)
        start += len(good.text)
        if good.tokens:
            rate = min(len(good.text) / good.tokens * 0.95, float(_CHARS))
    return pieces


def _boundary(text: str, start: int, end: int) -> int:
    """The last place in reach where a piece may end: behind whitespace, or `end` where there is none."""
    if end >= len(text) or text[end - 1].isspace():
        return min(end, len(text))
    at = end - 1
    while at > start and not text[at - 1].isspace():
        at -= 1
    return at if at > start else end


def mean(vectors: NDArray[np.float32], weights: list[int]) -> NDArray[np.float32]:
    """Token-weighted mean of the rows, as one row; of length 1 where all the rows are."""
    total = np.average(vectors.astype(np.float64), axis=0, weights=weights).astype(np.float32)[None, :]
    return unit(total) if is_unit(vectors) else total


class Chunker:
    """Turns long texts of jobs into jobs of their pieces, which travel beside everything else.

    Args:
        backend: counts tokens and knows the limit.
        start: queues a job.
        cancel: sends nothing more of a job.
    """

    def __init__(self, backend: Backend, start: Callable[[Job], None], cancel: Callable[[Job], None]) -> None:
        self._backend = backend
        self._start = start
        self._cancel = cancel
        self._suspect = 0
        """Characters from which on a text is split without being tried whole; learned from refusals. 0: not yet."""

    def suspicious(self, text: str) -> bool:
        """Whether a text is so long that trying it whole is a waste."""
        if not self._suspect:
            if len(text) < _LONG * 128:  # no embedding model has a smaller limit: no need to ask for it
                return False
            self._suspect = _LONG * self._backend.limit()
        return len(text) >= self._suspect

    def settle(self, job: Job, index: int, *, refused: bool) -> None:
        """Embed one text of a job by its pieces; its row follows when they are done.

        Args:
            job: has `cleaned` texts and a `prompt`.
            index: position of the text in the job.
            refused: whether the server said that it is too long.
        """
        text, prompt = job.cleaned[index], job.prompt
        if refused:
            self._suspect = min(self._suspect or len(text), len(text))
        try:
            pieces = split(
                text, self._backend.limit(), lambda piece: self._backend.count(_text.prompted(piece, prompt))
            )
        except InputTooLongError as exc:
            job.refuse(index, exc)
            return
        except VLLMEmbedError as exc:
            job.fail(exc)
            return
        if len(pieces) == 1:
            self._suspect = max(self._suspect, len(text) + 1)
        counted = [piece for piece in pieces if piece.tokens] or [Piece(pieces[0].text, 1)]
        parts = Job(
            [_text.prompted(piece.text, prompt) for piece in counted], range(len(counted)), job.fields, query=job.query
        )
        parts.future.add_done_callback(lambda done: self._join(job, index, [piece.tokens for piece in counted], done))
        self._start(parts)
        job.future.add_done_callback(lambda _: self._cancel(parts))

    def _join(self, job: Job, index: int, weights: list[int], done: Future[NDArray[np.float32]]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            job.fill([index], mean(done.result(), weights))
        elif isinstance(error, VLLMEmbedError) and error.indexes:
            job.refuse(index, error.copy(indexes=(), reasons={}, vectors=None))
        else:
            job.fail(error)
