"""Any number of texts, block by block in order, in bounded memory."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Literal

from vllm_embed._job import refusal
from vllm_embed.errors import VLLMEmbedError
from vllm_embed.info import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_embed._core import Core
    from vllm_embed._job import Job

__all__ = ["OnError", "blocks"]

OnError = Literal["raise", "yield"]

_AHEAD = 2
"""Blocks on the way for each request that may be in flight."""


def blocks(core: Core, texts: Iterator[Any], make: Callable[[list[Any]], Job], on_error: OnError) -> Iterator[Block]:
    """See `Embedder.stream`; `make` turns a block's texts into a job."""
    dispatcher, limits = core.dispatcher, core.dispatcher.limits
    ahead: collections.deque[tuple[int, int, Job]] = collections.deque()
    read, more = 0, True
    try:
        while True:
            while more and len(ahead) < _AHEAD * core.backend.slots:
                block = _cut(texts, limits.texts, limits.chars)
                if not block:
                    more = False
                    break
                job = make(block)
                dispatcher.start(job)
                ahead.append((read, len(block), job))
                read += len(block)
            if not ahead:
                return
            yield _finished(core, *ahead[0], on_error)
            ahead.popleft()
    finally:
        for _, _, job in ahead:
            dispatcher.cancel(job)


def _cut(texts: Iterator[Any], most: int, chars: int) -> list[Any]:
    """The next texts that fill one request; the last may go over the characters."""
    block: list[Any] = []
    used = 0
    for text in texts:
        block.append(text)
        used += len(text) if isinstance(text, str) else 0
        if len(block) >= most or used >= chars:
            break
    return block


def _finished(core: Core, start: int, count: int, job: Job, on_error: OnError) -> Block:
    failures: dict[int, VLLMEmbedError] = {}
    try:
        vectors = job.future.result()
    except VLLMEmbedError as exc:
        if not exc.indexes or exc.vectors is None:
            raise
        vectors = exc.vectors
        failures = {
            start + index: error.copy(indexes=(start + index,), reasons={start + index: str(error)})
            for index, error in sorted(job.refused.items())
        }
        if on_error == "raise":
            raise refusal(failures, start + count, None) from exc
    return Block(start, core.seen(vectors, count), failures)
