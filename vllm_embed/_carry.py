"""What becomes of one part: attempts with pauses, halves when it is too large, single texts when one is refused."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

from tenacity import RetryCallState, Retrying, retry_if_exception

from vllm_embed import _wire
from vllm_embed._backend import Failed
from vllm_embed._chunk import Chunker
from vllm_embed._shape import Shape
from vllm_embed.errors import (
    BadReplyError,
    ClosedError,
    InputTooLongError,
    InvalidInputError,
    ServerStatusError,
    ServerTimeoutError,
    ServerUnreachableError,
    VLLMEmbedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from vllm_embed._backend import Backend, Limits
    from vllm_embed._dispatch import Counters
    from vllm_embed._job import Job, Part
    from vllm_embed._wire import Reply
    from vllm_embed.settings import Settings

__all__ = ["Carrier"]

_log = logging.getLogger("vllm_embed")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_BROKEN = (ServerUnreachableError, ServerTimeoutError, BadReplyError)
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_PROBE = "a"
"""A text that any embedding model takes: refused, the request is at fault and not a text."""


class _TooLarge(Exception):  # noqa: N818 - never leaves this file
    """The server has no room for so many texts (503), or for so many bytes (413), at once."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


class Carrier:
    """Carries parts to the backend, from any thread, and settles every text of them.

    Args:
        backend: where to.
        settings: `max_retries` and `retry_deadline`.
        limits: lowered to what passed when a request turns out too large.
        counters: counted up.
        pause: sleeps that many seconds, or less when the predicate turns true.
        start: queues a job, here one of a text's pieces.
        cancel: sends nothing more of a job.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        *,
        limits: Limits,
        counters: Counters,
        pause: Callable[[float, Callable[[], bool]], None],
        start: Callable[[Job], None],
        cancel: Callable[[Job], None],
    ) -> None:
        self._backend = backend
        self._attempts = settings.max_retries + 1
        self._deadline_s = settings.retry_deadline
        self._limits = limits
        self._counters = counters
        self._pause = pause
        self._proven: list[Mapping[str, Any]] = []
        self._shape = Shape(backend, settings)
        self._chunker = Chunker(backend, start, cancel) if settings.long_text == "chunk" else None

    def carry(self, part: Part) -> None:
        """Settle every text: a vector, a refusal, or the job's error. Raises only what is not an Exception."""
        todo = [part]
        too_large: int | None = None
        passed: list[Part] = []
        while todo:
            part = self._without_suspects(todo.pop().live())
            if not part.segments:
                continue
            trial = _Trial(self, part)
            try:
                reply = self._persist(trial)
                vectors = self._shape.finish(reply.vectors) if len(reply.vectors) else reply.vectors
            except _TooLarge as exc:
                too_large = exc.status
                todo.extend(reversed(trial.part.halves(by_length=False)))
            except VLLMEmbedError as exc:
                todo.extend(self._refused(trial.part, exc, trial.fields))
            except Exception as exc:  # noqa: BLE001 - a defect of ours must not leave a caller waiting
                trial.part.fail(exc)
            else:
                if part.fields not in self._proven:
                    self._proven.append(part.fields)
                passed.append(trial.part)
                trial.part.deliver(vectors, reply.refused, self._refuse)
        if too_large and passed:
            self._limits.remember(too_large, passed)

    def _refused(self, part: Part, error: VLLMEmbedError, sent: Mapping[str, Any]) -> Sequence[Part]:
        """Settle a part that got no vectors; what is returned is to be tried by itself."""
        if isinstance(error, BadReplyError) and error.vectors is not None:
            part.deliver_finite(error.copy(vectors=self._shape.finish(error.vectors)))
        elif self._shape.cuts_instead(error, sent):
            return (part,)
        elif not isinstance(error, InvalidInputError):
            part.fail(error)
        elif not _wire.blames_text(error) and (culprit := self._probe(part, error)) is not None:
            part.fail(culprit)
        elif len(part) > 1:
            return part.halves(by_length=True)
        else:
            part.refuse(error, self._refuse)
        return ()

    def _refuse(self, job: Job, index: int, error: VLLMEmbedError) -> None:
        """Settle a text that was refused: too long and to be chunked, by its pieces."""
        if self._chunker is not None and isinstance(error, InputTooLongError):
            self._chunker.settle(job, index, refused=True)
        else:
            job.refuse(index, error)

    def _without_suspects(self, part: Part) -> Part:
        """The same without texts that are split without being tried whole."""
        chunker = self._chunker
        if chunker is None:
            return part
        try:
            suspects = [(job, i) for job, indexes in part.segments for i in indexes if chunker.suspicious(job.texts[i])]
        except VLLMEmbedError as exc:
            part.fail(exc)
            return part.live()
        for job, index in suspects:
            chunker.settle(job, index, refused=False)
        return part.without(suspects) if suspects else part

    def _probe(self, part: Part, refused: VLLMEmbedError) -> VLLMEmbedError | None:
        """The request's own error when even the simplest text is refused; None when a text must be at fault."""
        if part.fields in self._proven:
            return None
        try:
            self._backend.send([_PROBE], part.fields)
        except Failed as failed:
            if not isinstance(failed.error, InvalidInputError):
                return failed.error
            told = f"the server refuses the request, whatever its text: {refused.status} {refused}"
            return ServerStatusError(told, endpoint=refused.endpoint, model=refused.model, status=refused.status)
        self._proven.append(part.fields)
        return None

    def _persist(self, trial: _Trial) -> Reply:
        """The reply to one request, after as many attempts as are allowed.

        Raises:
            _TooLarge: it must be halved.
            VLLMEmbedError: the last attempt's, with what was tried.
        """
        try:
            return trial.once()  # as a rule that is all, and tenacity costs as much as the rest of our own work
        except Failed as failed:
            trial.seen = failed
        retrying = Retrying(
            retry=retry_if_exception(trial.passing),
            wait=trial.wait,
            stop=trial.stop,
            before_sleep=trial.count,
            sleep=trial.sleep,
            reraise=True,
        )
        try:
            return retrying(trial.again)
        except Failed as failed:
            raise trial.told(failed) from failed.error.__cause__


class _Trial:
    """One request's attempts: the decisions that tenacity asks for."""

    def __init__(self, carrier: Carrier, part: Part) -> None:
        self._carrier = carrier
        self._backend = carrier._backend  # noqa: SLF001 - two halves of one thing
        self.part = part
        """What is being carried: without the jobs that ended meanwhile, so its rows are the reply's."""
        self.fields: Mapping[str, Any] = part.fields
        """As sent."""
        self._texts = part.texts()
        self.seen: Failed | None = None
        self._failed: Failed | None = None
        self._since: float | None = None
        self._refused_503 = 0

    def once(self) -> Reply:
        part, counters, shape = self.part, self._carrier._counters, self._carrier._shape  # noqa: SLF001
        if self._failed is not None:
            part = self.part = part.live()
            if not part.segments:
                raise ClosedError  # every job in it is over: nobody waits
            self._texts = part.texts()
        part.attempts += 1
        with counters.flying(len(self._texts)):
            try:
                self.fields = shape.fields(part.fields)
                reply = self._backend.send(self._texts, self.fields, self._failed.place if self._failed else None)
            except Failed as failed:
                self._failed = failed
                self._since = self._since or time.monotonic()
                status = failed.error.status
                self._refused_503 += status == 503
                if len(self._texts) > 1 and (status == 413 or self._refused_503 >= 2):
                    raise _TooLarge(status) from failed
                raise
        counters.tokens(reply.prompt_tokens)
        return reply

    def again(self) -> Reply:
        """What tenacity calls: first it gets the failure that was seen without it, then another attempt."""
        seen, self.seen = self.seen, None
        if seen is not None:
            raise seen
        return self.once()

    def passing(self, exc: BaseException) -> bool:
        if not isinstance(exc, Failed):
            return False
        error = exc.error
        return isinstance(error, _BROKEN) or error.status in _PASSING

    def wait(self, state: RetryCallState) -> float:
        failed = self._failed
        assert failed is not None  # noqa: S101 - tenacity waits after a failure only
        if failed.place is not None and self._backend.another(failed.place):
            return 0.0
        if failed.retry_after is not None:
            return failed.retry_after * random.uniform(1.0, 1.1)  # noqa: S311 - jitter
        if state.attempt_number == 1 and _connection_was_stale(failed.error):
            return 0.0
        pause = min(_FIRST_PAUSE_S * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE_S)
        return random.uniform(pause / 2, pause)  # noqa: S311 - jitter

    def stop(self, state: RetryCallState) -> bool:
        carrier = self._carrier
        assert self._since is not None  # noqa: S101 - tenacity stops after a failure only
        late = time.monotonic() + state.upcoming_sleep - self._since > carrier._deadline_s  # noqa: SLF001
        return late or state.attempt_number >= carrier._attempts  # noqa: SLF001

    def count(self, state: RetryCallState) -> None:
        assert self._failed is not None  # noqa: S101 - as above
        self._carrier._counters.retried()  # noqa: SLF001
        attempt, pause = state.attempt_number, state.upcoming_sleep
        _log.warning("attempt %d failed, next in %.1f s: %s", attempt, pause, self._failed.error)

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._carrier._pause(seconds, lambda: not self.part.live().segments)  # noqa: SLF001

    def told(self, failed: Failed) -> VLLMEmbedError:
        """The last error, with the attempts and, for several replicas, what each of them said."""
        error = failed.error
        if isinstance(error, ClosedError) or not self.passing(failed):
            return error
        text = str(error)
        if troubles := self._backend.troubles():
            text = f"no replica answered. {troubles}"
        spent = time.monotonic() - (self._since or time.monotonic())
        tried = f"{self.part.attempts} attempts in {spent:.1f} s" if self.part.attempts > 1 else "1 attempt"
        asked = f", the server asked to wait {failed.retry_after:g} s" if failed.retry_after else ""
        return error.copy(f"{text} (gave up after {tried}{asked})")


def _connection_was_stale(error: VLLMEmbedError) -> bool:
    """A reset before any reply: as a rule a kept connection that the server had just closed."""
    return isinstance(error, ServerUnreachableError) and "connection broke" in str(error)
