"""One running engine: the thread that makes it, uses it and ends it, and those who wait for it."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing.connection
import os
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_embed import _engine_args
from vllm_embed._llm import LLM, cores, explained, kill, refuses
from vllm_embed.errors import ClosedError, EngineError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed._engines import Engines

__all__ = ["Running"]

_MOST = 4096
"""Texts of waiting calls that go into the engine as one batch."""
_END_S = 60.0
"""Most seconds that the end of an engine is waited for."""
_STOP_S = 10.0
"""The same for one that is still loading when the interpreter ends."""


class _Task(NamedTuple):
    prompts: Sequence[Any]
    how: tuple[Mapping[str, Any], Mapping[str, Any]]
    """Arguments of `vllm.PoolingParams`, and of the tokenizer."""
    done: Future[NDArray[np.float32]]

    def fail(self, error: BaseException) -> None:
        """Tell who waits, unless he was told."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error.copy() if isinstance(error, VLLMEmbedError) else error)


class Running:
    """An engine and the one thread that touches it.

    `vllm.LLM` is not thread-safe. A lock would not do: Ctrl-C in the middle of `LLM.encode` leaves requests in the
    engine, whose outputs come with the next call. So callers' threads only wait, and may be interrupted.

    Args:
        model: hub id or folder.
        arguments: further ones of `vllm.LLM`.
        engines: told when this one is over, and when it is gone.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any], engines: Engines) -> None:
        self.key = _engine_args.key(model, arguments)
        self.users = 0
        self.process = os.getpid()
        self.gone = False
        """Whether its thread is done with it; guarded by the lock of all engines."""
        self.rate = 0.0
        """Texts a second of the last batch."""
        self.thread = threading.Thread(target=self._run, name="vllm-embed-engine", daemon=True)
        self._model = model
        self._arguments = arguments
        self._engines = engines
        self._loaded: Future[LLM] = Future()
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._at: list[_Task] = []
        self._error: VLLMEmbedError | None = None
        self._end = False
        self._others: set[Any] = set()

    def llm(self) -> LLM:
        """What it says of itself, once it is loaded. Only this engine's own thread may use it.

        Raises:
            VLLMEmbedError: it cannot be loaded, or is over.
        """
        if self._error is not None:
            raise self._error.copy()
        try:
            return self._loaded.result()
        except VLLMEmbedError as exc:
            raise exc.copy() from exc.__cause__

    def encode(
        self, prompts: Sequence[Any], pooling: Mapping[str, Any], tokenizing: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """`LLM.encode` in the engine's thread; what waits at the same time goes as one batch.

        Raises:
            VLLMEmbedError: the engine is over.
            Exception: vLLM's, when it refuses a prompt or the arguments, and goes on.
        """
        task = _Task(prompts, (pooling, tokenizing), Future())
        with self._changed:
            if self._error is not None:
                raise self._error.copy()
            self._waiting.append(task)
            self._changed.notify()
        try:
            return task.done.result()
        except BaseException:
            task.done.cancel()  # interrupted before its turn: it is left out
            raise

    def _run(self) -> None:
        llm = None
        try:
            with self._engines.loading():
                self._others = set(multiprocessing.active_children())
                llm = LLM(self._model, self._arguments)
                if llm.cores:
                    threading.Thread(target=self._watch, args=(llm,), name="vllm-embed-watch", daemon=True).start()
                llm.compare_reading()
                llm.check_adapter()
            self._loaded.set_result(llm)
            while not self._end and self._error is None:
                if tasks := self._next():
                    self._do(llm, tasks)
            self._over(ClosedError())
        except BaseException as exc:  # noqa: BLE001 - whoever waits must know
            self._over(explained(exc, self._model, running=self._loaded.done()))
        if llm is not None:
            llm.close()
        self._engines.gone(self)

    def _watch(self, llm: LLM) -> None:
        """Tell everyone when the core dies: killed from outside, it leaves `LLM.encode` waiting for ever (0.32)."""
        multiprocessing.connection.wait([core.sentinel for core in llm.cores])
        if not self._end and self._error is None:
            died = EngineError(
                f"the engine of {self._model!r} ended: its process died, perhaps killed for its memory. A new embedder "
                "tries again",
                model=self._model,
            )
            self._over(died)
            llm.wake(died)

    def _next(self) -> list[_Task]:
        """The waiting tasks that can go together. None when it is to end, or nobody waits for them any more."""
        tasks: list[_Task] = []
        texts = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end or self._error)
            while self._waiting and not self._end:
                task = self._waiting[0]
                texts += len(task.prompts)
                if tasks and (task.how != tasks[0].how or texts > _MOST):
                    break
                self._waiting.popleft()
                if task.done.set_running_or_notify_cancel():
                    tasks.append(task)
            self._at = tasks
        return tasks

    def _do(self, llm: LLM, tasks: list[_Task]) -> None:
        start = time.monotonic()
        try:
            rows = llm.encode([prompt for task in tasks for prompt in task.prompts], *tasks[0].how)
        except Exception as exc:  # noqa: BLE001 - told apart here
            if not refuses(exc):
                self._over(explained(exc, self._model, running=True))
            elif len(tasks) > 1:
                for task in tasks:
                    self._do(llm, [task])
            else:
                tasks[0].fail(exc)
            return
        self.rate = len(rows) / max(time.monotonic() - start, 1e-6)
        at = 0
        for task in tasks:
            with contextlib.suppress(InvalidStateError):
                task.done.set_result(rows[at : at + len(task.prompts)])
            at += len(task.prompts)

    def _over(self, error: VLLMEmbedError) -> None:
        """Take nothing more and tell those who wait."""
        self._engines.over(self)  # first, so that who sees the error and tries anew gets another engine
        with self._changed:
            self._error = self._error or error
            waiting = [task for task in self._waiting if task.done.set_running_or_notify_cancel()]
            waiting += self._at
            self._waiting.clear()
            self._changed.notify_all()
        with contextlib.suppress(InvalidStateError):
            self._loaded.set_exception(self._error)
        for task in waiting:
            task.fail(self._error)

    def end(self) -> None:
        """Have it end after the batch that it is at."""
        with self._changed:
            self._end = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of an engine; one that is loading ends when it is loaded, and is not waited for."""
        if self._loaded.done():
            self.thread.join(_END_S)

    def stop(self) -> None:
        """Wait for the end when the interpreter ends; one that is loading is stopped."""
        self.join()
        until = time.monotonic() + _STOP_S
        while self.thread.is_alive() and not self._loaded.done() and time.monotonic() < until:
            for core in cores(self._others):
                kill(core)
            self.thread.join(0.1)

    def forked(self) -> None:
        """In a forked child: neither the thread nor the core is ours."""
        self._changed = threading.Condition()
        self._waiting.clear()
        self._error = EngineError(
            f"vLLM's engine was started by process {self.process}, which this one was forked from; it cannot be used "
            "here. Start children with multiprocessing's spawn method and make their embedders there, fork before the "
            "first text is embedded, or let all processes use a server (vllm-embed serve)",
            model=self._model,
        )
        if self._loaded.done() and self._loaded.exception() is None:
            self._loaded.result().disown()
