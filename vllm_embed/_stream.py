"""Any number of texts, block by block in order, in bounded memory."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from vllm_embed._core import PROBE
from vllm_embed._job import refusal
from vllm_embed.errors import VLLMEmbedError
from vllm_embed.info import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_embed._backend import Limits
    from vllm_embed._core import Core
    from vllm_embed._job import Job

__all__ = ["AHEAD", "PAUSE", "OnError", "blocks", "cut", "in_order"]

OnError = Literal["raise", "yield"]

PAUSE: Final[Any] = object()
"""Among the texts: send what was read so far, and read on only when all of it was handed out."""

AHEAD: Final = 2
"""Blocks on the way for each request that may be in flight."""

Way = TypeVar("Way")


def blocks(core: Core, texts: Iterator[Any], make: Callable[[list[Any]], Job], on_error: OnError) -> Iterator[Block]:
    """See `Embedder.stream`; `make` turns a block's texts into a job."""
    dispatcher = core.dispatcher

    def start(block: list[Any]) -> Job:
        job = make(block)
        dispatcher.start(job)
        return job

    def finish(at: int, count: int, job: Job) -> Block:
        return _finished(core, at, count, job, on_error, width=lambda: len(start([PROBE]).future.result()[0]))

    return in_order(
        texts,
        dispatcher.limits,
        lambda: AHEAD * core.backend.slots,
        start=start,
        finish=finish,
        cancel=dispatcher.cancel,
    )


def in_order(
    texts: Iterator[Any],
    limits: Limits,
    room: Callable[[], int],
    *,
    start: Callable[[list[Any]], Way],
    finish: Callable[[int, int, Way], Block],
    cancel: Callable[[Way], object],
) -> Iterator[Block]:
    """Blocks of texts on their way at the same time, handed out in order.

    Args:
        texts: read no further than there is room.
        limits: of one block, as they are now.
        room: most blocks on the way.
        start: sends a block off.
        finish: waits for one, given its place in the stream and its number of texts.
        cancel: called for each that is on the way when the stream ends early.
    """
    ahead: collections.deque[tuple[int, int, Way]] = collections.deque()
    read, more, paused = 0, True, False
    try:
        while True:
            while more and not paused and len(ahead) < room():
                block, more, paused = cut(texts, limits.texts, limits.chars)
                if block:
                    ahead.append((read, len(block), start(block)))
                    read += len(block)
            if ahead:
                yield finish(*ahead[0])
                ahead.popleft()
            elif not more:
                return
            paused = paused and bool(ahead)
    finally:
        for _, _, way in ahead:
            cancel(way)


def cut(texts: Iterator[Any], most: int, chars: int) -> tuple[list[Any], bool, bool]:
    """The next texts that fill one request, whether there may be more, and whether to pause first.

    The last text may go over the characters.
    """
    block: list[Any] = []
    used = 0
    for text in texts:
        if text is PAUSE:
            return block, True, True
        block.append(text)
        used += len(text) if isinstance(text, str) else 0
        if len(block) >= most or used >= chars:
            return block, True, False
    return block, False, False


def _finished(core: Core, start: int, count: int, job: Job, on_error: OnError, *, width: Callable[[], int]) -> Block:
    failures: dict[int, VLLMEmbedError] = {}
    try:
        vectors = job.future.result()
    except VLLMEmbedError as exc:
        if not exc.indexes or not job.refused:
            raise
        failures = {
            start + index: error.copy(indexes=(start + index,), reasons={start + index: str(error)})
            for index, error in sorted(job.refused.items())
        }
        if on_error == "raise":
            raise refusal(failures, start + count, None) from exc
        if exc.vectors is None:  # the server refused all that it was sent; what it was not sent is zeros
            vectors = np.zeros((count, core.dimension or width()), np.float32)
            vectors[list(job.refused)] = np.nan
        else:
            vectors = exc.vectors
    return Block(start, core.seen(vectors, count), failures)
