"""The queue between callers and requests: who waits, what travels together, and how much at once."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
import weakref
from typing import TYPE_CHECKING

from vllm_embed._carry import Carrier
from vllm_embed._job import Part
from vllm_embed.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_embed._backend import Backend
    from vllm_embed._job import Job
    from vllm_embed.settings import Settings

__all__ = ["Counters", "Dispatcher"]

_IDLE_S = 5.0
"""A worker thread without work ends after this long."""


class Counters:
    """What happened since the start, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.texts = self.requests = self.retries = self.prompt_tokens = self.in_flight = self.most_in_flight = 0

    @contextlib.contextmanager
    def flying(self, texts: int) -> Iterator[None]:
        """Count a request in and out."""
        with self._lock:
            self.requests += 1
            self.texts += texts
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def retried(self) -> None:
        """Count a further attempt."""
        with self._lock:
            self.retries += 1

    def forked(self) -> None:
        """Nothing of the parent's is in flight here."""
        self._lock = threading.Lock()
        self.in_flight = 0

    def tokens(self, count: int) -> None:
        """Count tokens as the server did."""
        with self._lock:
            self.prompt_tokens += count


class Dispatcher:
    """Carries jobs over at most `backend.slots` requests at once, whichever calls and threads they come from.

    Worker threads start when there is work, are daemons, and end when idle. A sync caller that finds a place free
    carries its own texts in its own thread: a hand-over to another thread costs up to 1 ms.

    Args:
        backend: where requests go, and what one of them may hold.
        settings: retry options.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.counters = Counters()
        self.limits = backend.limits
        self._backend = backend
        self._carrier = Carrier(
            backend,
            settings,
            limits=self.limits,
            counters=self.counters,
            pause=self._pause,
            start=self.start,
            cancel=self.cancel,
        )
        self.closed = False
        self._afresh()
        _all.add(self)

    def _afresh(self) -> None:
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # idle workers wait here
        self._paused = threading.Condition(lock)  # and here those that pause before another attempt
        self._jobs: dict[int, Job] = {}
        self._queries: collections.deque[Job] = collections.deque()
        self._documents: collections.deque[Job] = collections.deque()
        self._busy = self._idle = 0

    def start(self, job: Job) -> None:
        """Queue a job; workers carry it."""
        with self._changed:
            self._enqueue(job)
            self._wake()

    def run(self, job: Job) -> None:
        """Queue a job and help carry it; returns when its future is resolved.

        Ctrl-C, or anything else that is raised in this thread, cancels the job.
        """
        try:
            with self._changed:
                self._enqueue(job)
                mine = self._busy < self._backend.slots
                part = self._cut(job) if mine else None
                self._busy += mine
                self._wake()
            while part is not None:
                try:
                    self._carrier.carry(part)
                except BaseException:
                    self._freed()
                    raise
                with self._changed:
                    part = self._cut(job) if job.queued else None
                if part is None:
                    self._freed()
            job.future.exception()
        except BaseException:
            self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """Send nothing more of a job; what is in flight ends by itself."""
        job.future.cancel()
        with self._changed:
            job.drop()
            self._paused.notify_all()  # they look whether anyone still waits for them

    def _enqueue(self, job: Job) -> None:
        if self.closed:
            raise ClosedError
        self._jobs[id(job)] = job
        # by its id: a callback that held the job would be a cycle, and its array would wait for the collector
        job.future.add_done_callback(functools.partial(self._forget, id(job)))
        (self._queries if job.query else self._documents).append(job)

    def _forget(self, key: int, _: object) -> None:
        self._jobs.pop(key, None)

    def _waiting(self) -> collections.deque[Job] | None:
        """The lane to serve next, its first job with texts to send; queries go ahead."""
        for lane in (self._queries, self._documents):
            while lane and not lane[0].queued:
                lane.popleft()
            if lane:
                return lane
        return None

    def _cut(self, job: Job) -> Part:
        """The next part of one job alone."""
        return Part([(job, job.take(self.limits.texts, self.limits.chars, first=True)[0])])

    def _next(self) -> Part | None:
        """The next part, of as many waiting jobs as fit into one request; bulk jobs take turns."""
        lane = self._waiting()
        if lane is None:
            return None
        segments: list[tuple[Job, Sequence[int]]] = []
        texts, chars = self.limits.texts, self.limits.chars
        fields = lane[0].fields
        while texts > 0 and lane and lane[0].fields is fields:
            job = lane[0]
            indexes, used = job.take(texts, chars, first=not segments)
            if not indexes:
                break
            segments.append((job, indexes))
            texts -= len(indexes)
            chars -= used
            if job.queued:
                lane.rotate(-1)
                break
            lane.popleft()
        return Part(segments)

    def _wake(self) -> None:
        """See that someone takes the next part, if there is one and a place free; who takes it looks for the next."""
        if self._busy < self._backend.slots and self._waiting() is not None:
            if self._idle:
                self._changed.notify()
            else:
                threading.Thread(target=self._work, name="vllm-embed", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                part = None
                while self._busy >= self._backend.slots or (part := self._next()) is None:
                    self._idle += 1
                    woken = self.closed or self._changed.wait(_IDLE_S)
                    self._idle -= 1
                    if self.closed or (not woken and (self._busy >= self._backend.slots or self._waiting() is None)):
                        return
                self._busy += 1
                self._wake()
            try:
                self._carrier.carry(part)
            finally:
                self._freed()

    def _freed(self) -> None:
        with self._changed:
            self._busy -= 1
            self._wake()

    def _pause(self, seconds: float, enough: Callable[[], bool]) -> None:
        with self._paused:
            self._paused.wait_for(lambda: self.closed or enough(), seconds)

    def close(self) -> None:
        """End every job with ClosedError and close the connections; workers end by themselves."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            jobs = list(self._jobs.values())
            self._changed.notify_all()
            self._paused.notify_all()
        for job in jobs:
            job.fail(ClosedError())
        self._backend.close()

    def forked(self) -> None:
        """In a forked child: the parent's threads, queue and connections are not ours."""
        self._afresh()
        self.counters.forked()
        self._backend.forked()


_all: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _after_fork() -> None:
    for dispatcher in list(_all):
        dispatcher.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
