"""Texts in pieces, by LangChain's splitter; sizes in tokens of the served model or in characters."""

from __future__ import annotations

import collections
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Literal, Protocol

from vllm_embed._extras import needs
from vllm_embed.errors import ConfigurationError, VLLMEmbedError
from vllm_embed.jobs._row import Reject, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Splitter", "Unit", "pieces"]

Unit = Literal["tokens", "characters"]

_AT_ONCE: Final = 8
"""Texts that are split side by side: counting tokens waits for the server."""
_SAMPLE: Final = 2_000
"""Characters of a text that tell how many of them a token has."""


class _Splits(Protocol):
    def split_text(self, text: str) -> list[str]: ...


class Splitter:
    """Splits texts at paragraphs, lines, spaces, and within a word only where it must.

    In tokens the pieces are cut by the characters that a token of this text has on average, and counted; one that is
    too long is cut again. No piece is over `size`.

    Args:
        size: most tokens or characters of a piece.
        overlap: tokens or characters, about, that a piece repeats of the one before.
        count: tokens of a text without special ones; None: sizes are in characters.

    Raises:
        ConfigurationError: sizes that cannot work.
    """

    def __init__(self, size: int, overlap: int = 0, count: Callable[[str], int] | None = None) -> None:
        if size < 1:
            raise ConfigurationError(f"chunk_size={size}: at least 1")
        if not 0 <= overlap < size:
            raise ConfigurationError(f"chunk_overlap={overlap}: at least 0 and less than chunk_size, which is {size}")
        self._size = size
        self._overlap = overlap
        self._count = count

    def split(self, text: str) -> list[str]:
        """The pieces of a text, in order; none for a text of whitespace."""
        if self._count is None:
            return _by_characters(self._size, self._overlap).split_text(text)
        sample = text[:_SAMPLE]
        rate = len(sample) / max(self._count(sample), 1)
        return self._fitting(text, max(1, int(self._size * rate)), int(self._overlap * rate), self._count)

    def _fitting(self, text: str, chars: int, overlap: int, count: Callable[[str], int]) -> list[str]:
        found = []
        for piece in _by_characters(chars, min(overlap, chars - 1)).split_text(text):
            # No tokenizer makes more than one token of a byte; other letters than ASCII's may become several by NFKC.
            tokens = 0 if len(piece) <= self._size and piece.isascii() else count(piece)
            if tokens <= self._size or len(piece) == 1:
                found.append(piece)
            else:
                shorter = max(1, min(int(len(piece) * self._size / tokens * 0.9), len(piece) - 1))
                found += self._fitting(piece, shorter, overlap * shorter // chars, count)
        return found


def _by_characters(size: int, overlap: int) -> _Splits:
    with needs("jobs"):
        from langchain_text_splitters import RecursiveCharacterTextSplitter  # noqa: PLC0415 - extra

    return RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=overlap)


def pieces(items: Iterable[Row | Reject], splitter: Splitter) -> Iterator[Row | Reject]:
    """The pieces of rows, in order; `#0`, `#1`, ... is put behind the id."""
    texts: queue.SimpleQueue[tuple[str, Future[list[str]]] | None] = queue.SimpleQueue()
    for _ in range(_AT_ONCE):  # daemons, not an executor: at exit its threads are waited for, and they for the server
        threading.Thread(target=_splitting, args=(texts, splitter), name="vllm-embed-split", daemon=True).start()
    waiting: collections.deque[tuple[Row | Reject, Future[list[str]] | None]] = collections.deque()
    try:
        for item in items:
            future: Future[list[str]] | None = None
            if isinstance(item, Row):
                future = Future()
                texts.put((item.text, future))
            waiting.append((item, future))
            if len(waiting) >= 2 * _AT_ONCE:
                yield from _made(*waiting.popleft())
        while waiting:
            yield from _made(*waiting.popleft())
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()
        for _ in range(_AT_ONCE):
            texts.put(None)


def _splitting(texts: queue.SimpleQueue[tuple[str, Future[list[str]]] | None], splitter: Splitter) -> None:
    while (task := texts.get()) is not None:
        text, future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(splitter.split(text))
        except BaseException as exc:  # noqa: BLE001 - raised where the pieces are wanted
            future.set_exception(exc)


def _made(item: Row | Reject, future: Future[list[str]] | None) -> Iterator[Row | Reject]:
    if isinstance(item, Reject) or future is None:
        yield item
        return
    try:
        found = future.result()
    except VLLMEmbedError as exc:
        if not exc.indexes and exc.status != 400:  # the server is gone, not this text wrong
            raise
        yield Reject(item.source, item.line, item.id, str(exc))
        return
    if not found:
        yield Reject(item.source, item.line, item.id, "no text: only whitespace")
    for number, piece in enumerate(found):
        yield item._replace(id=f"{item.id}#{number}", text=piece)
