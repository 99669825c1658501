"""One call's texts on their way to vectors, and the parts of it that travel as requests."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_embed.errors import BadReplyError, InputTooLongError, InvalidInputError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Job", "Part"]


class Job:
    """The texts of one call, the array that their vectors go into, and a future of it.

    Args:
        texts: as they are sent.
        pending: positions in `texts` that are to be sent.
        fields: further request fields; only texts with the same object share a request.
        query: whether it goes ahead of documents.
        refused: positions that are not sent, and why.
        zero: positions that are not sent and become zeros.
        cleaned: the texts without prompt, for pieces of them.
        prompt: put before each piece.
        on_rows: called with a number of rows that are done.
    """

    __slots__ = (
        "_at",
        "_dropped",
        "_left",
        "_lock",
        "_on_rows",
        "_zero",
        "cleaned",
        "fields",
        "future",
        "out",
        "pending",
        "prompt",
        "query",
        "refused",
        "texts",
    )

    def __init__(
        self,
        texts: Sequence[str],
        pending: Sequence[int],
        fields: Mapping[str, Any],
        *,
        query: bool = False,
        refused: dict[int, VLLMEmbedError] | None = None,
        zero: Sequence[int] = (),
        cleaned: Sequence[str] = (),
        prompt: str = "",
        on_rows: Callable[[int], object] | None = None,
    ) -> None:
        self.texts = texts
        self.pending = pending
        self.fields = fields
        self.query = query
        self.cleaned = cleaned
        self.prompt = prompt
        self.refused: dict[int, VLLMEmbedError] = refused or {}
        self.future: Future[NDArray[np.float32]] = Future()
        self.out: NDArray[np.float32] | None = None
        self._zero = list(zero)
        self._at = 0
        self._dropped = False
        self._left = len(pending)
        self._lock = threading.Lock()
        self._on_rows = on_rows

    @property
    def queued(self) -> int:
        """Texts that no part has taken."""
        return 0 if self._dropped else len(self.pending) - self._at

    @property
    def over(self) -> bool:
        """Whether the future has its result, its error, or was cancelled."""
        return self.future.done()

    def take(self, texts: int, chars: int, *, first: bool) -> tuple[Sequence[int], int]:
        """The next positions that fit, and their characters. The `first` text of a part always fits."""
        start = end = self._at
        stop = min(start + texts, len(self.pending))
        used = 0
        while end < stop:
            length = len(self.texts[self.pending[end]])
            if used + length > chars and not (first and end == start):
                break
            used += length
            end += 1
        self._at = end
        return self.pending[start:end], used

    def drop(self) -> None:
        """Send nothing more."""
        self._dropped = True

    def fill(self, indexes: Sequence[int], rows: NDArray[np.float32]) -> None:
        """Store vectors; the last one resolves the future."""
        with self._lock:
            if self.out is None:
                self.out = np.empty((len(self.texts), rows.shape[1]), dtype=np.float32)
                self.out[self._zero] = 0.0
        if self.out.shape[1] != rows.shape[1]:
            self.fail(BadReplyError(f"vectors of width {rows.shape[1]} after others of width {self.out.shape[1]}"))
            return
        if isinstance(indexes, range):
            self.out[indexes.start : indexes.stop] = rows
        else:
            self.out[list(indexes)] = rows
        self._done(len(indexes))

    def refuse(self, index: int, error: VLLMEmbedError) -> None:
        """Record a text that cannot be embedded; the job goes on."""
        with self._lock:
            self.refused[index] = error
        self._done(1)

    def _done(self, rows: int) -> None:
        with self._lock:
            self._left -= rows
            last = self._left == 0
            if self._on_rows is not None:
                self._on_rows(rows)
        if last:
            self.finish()

    def finish(self) -> None:
        """Resolve the future: with the vectors, or with the one error that names every refused text."""
        if self.refused:
            self.fail(refusal(self.refused, len(self.texts), self.out))
        else:
            self._resolve(None)

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it is over; queued texts are dropped, those in flight come to nothing."""
        self.drop()
        self._resolve(error)

    def _resolve(self, error: BaseException | None) -> None:
        with self._lock:
            if self.future.done() or not self.future.set_running_or_notify_cancel():
                return
        if error is not None:
            self.future.set_exception(error)
        elif self.out is not None:
            self.future.set_result(self.out)


class Part:
    """What one request carries: texts of one job, or of several that waited together."""

    __slots__ = ("attempts", "segments")

    def __init__(self, segments: list[tuple[Job, Sequence[int]]], attempts: int = 0) -> None:
        self.segments = segments
        self.attempts = attempts

    def __len__(self) -> int:
        return sum(len(indexes) for _, indexes in self.segments)

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.segments[0][0].fields

    def texts(self) -> list[str]:
        return [job.texts[index] for job, indexes in self.segments for index in indexes]

    def live(self) -> Part:
        """The same without jobs that are over."""
        if not any(job.over for job, _ in self.segments):
            return self
        return Part([segment for segment in self.segments if not segment[0].over], self.attempts)

    def halves(self, *, by_length: bool) -> tuple[Part, Part]:
        """Two parts; `by_length` puts the longest texts together, which finds those over the limit soonest."""
        items = [(job, index) for job, indexes in self.segments for index in indexes]
        if by_length:
            items.sort(key=lambda item: len(item[0].texts[item[1]]))
        middle = len(items) // 2
        return self._of(items[:middle]), self._of(items[middle:])

    def without(self, items: list[tuple[Job, int]]) -> Part:
        """The same without some texts."""
        gone = {(id(job), index) for job, index in items}
        return self._of([(job, i) for job, indexes in self.segments for i in indexes if (id(job), i) not in gone])

    def _of(self, items: list[tuple[Job, int]]) -> Part:
        grouped: dict[int, tuple[Job, list[int]]] = {}
        for job, index in items:
            grouped.setdefault(id(job), (job, []))[1].append(index)
        return Part(list(grouped.values()), self.attempts)

    def deliver(
        self,
        vectors: NDArray[np.float32],
        refused: Mapping[int, VLLMEmbedError] = MappingProxyType({}),
        refuse: Callable[[Job, int, VLLMEmbedError], None] = Job.refuse,
    ) -> None:
        """Hand each job its rows, and its refusals.

        Args:
            vectors: a row for each text that is not refused, in order.
            refused: the others, by position.
            refuse: settles one of them.
        """
        at = row = 0
        for job, indexes in self.segments:
            bad = [k for k in range(len(indexes)) if at + k in refused] if refused else []
            good = [index for k, index in enumerate(indexes) if at + k not in refused] if bad else indexes
            if good:
                job.fill(good, vectors[row : row + len(good)])
            for k in bad:
                refuse(job, indexes[k], refused[at + k].copy(attempts=self.attempts))
            at += len(indexes)
            row += len(good)

    def deliver_finite(self, error: BadReplyError) -> None:
        """Hand over the rows that are finite and refuse the others."""
        assert error.vectors is not None  # noqa: S101 - the caller looked
        self.deliver(
            np.delete(error.vectors, error.indexes, axis=0),
            dict.fromkeys(error.indexes, error.copy(indexes=(), vectors=None)),
        )

    def refuse(self, error: VLLMEmbedError, refuse: Callable[[Job, int, VLLMEmbedError], None]) -> None:
        """Settle its only text, which was refused."""
        job, indexes = self.segments[0]
        refuse(job, indexes[0], error.copy(attempts=self.attempts))

    def fail(self, error: BaseException) -> None:
        """End every job in it, each with an error of its own."""
        for job, _ in self.segments:
            job.fail(error.copy(attempts=self.attempts) if isinstance(error, VLLMEmbedError) else error)


_NAMED = 5


def refusal(refused: dict[int, VLLMEmbedError], count: int, vectors: NDArray[np.float32] | None) -> VLLMEmbedError:
    """One error for all refused texts of a call, of their common class, with everyone else's vectors."""
    reasons = {index: str(refused[index]) for index in sorted(refused)}
    kinds = {type(error) for error in refused.values()}
    kind = kinds.pop() if len(kinds) == 1 else InvalidInputError
    if vectors is not None:
        vectors[list(reasons)] = np.nan
    told = "; ".join(f"[{index}] {reason}" for index, reason in list(reasons.items())[:_NAMED])
    more = f"; and {len(reasons) - _NAMED} more, see reasons" if len(reasons) > _NAMED else ""
    advice = ' Shorten them, or set long_text="truncate".' if kind is InputTooLongError else ""
    kept = " The vectors of the others are in this error's vectors." if vectors is not None else ""
    sample = next(iter(refused.values()))
    whole = f"{len(reasons)} of {count} texts cannot be embedded: {told}{more}"
    if count == 1:
        whole = f"the text cannot be embedded: {next(iter(reasons.values()))}"
    return kind(
        f"{whole}.{advice}{kept if count > 1 else ''}",
        endpoint=sample.endpoint,
        model=sample.model,
        status=sample.status,
        attempts=max(error.attempts for error in refused.values()),
        indexes=reasons,
        reasons=reasons,
        vectors=vectors,
    )
