"""Running engines: one for all embedders of this process that ask for the same, each in a thread of its own."""

from __future__ import annotations

import atexit
import collections
import contextlib
import multiprocessing
import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_embed import _engine_args, _spawn
from vllm_embed._llm import LLM, explained, refuses
from vllm_embed.errors import ClosedError, EngineError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Running", "acquire", "release"]

_MOST = 4096
"""Texts of waiting calls that go into the engine as one batch."""
_END_S = 60.0
"""Most seconds that the end of an engine is waited for."""
_STOP_S = 10.0
"""The same for one that is still loading when the interpreter ends."""

_lock = threading.Lock()
_running: dict[str, Running] = {}
_ending: set[Running] = set()
_loading = threading.Lock()
_foreign: list[Running] = []
"""Of the process that this one was forked from; kept, so that nothing of them is cleaned up here."""


class _Task(NamedTuple):
    prompts: Sequence[Any]
    how: tuple[Mapping[str, Any], Mapping[str, Any]]
    """Arguments of `vllm.PoolingParams`, and of the tokenizer."""
    done: Future[NDArray[np.float32]]


class Running:
    """An engine and the one thread that makes it, uses it and ends it.

    `vllm.LLM` is not thread-safe. A lock would not do: Ctrl-C in the middle of `LLM.encode` leaves requests in the
    engine, whose outputs come with the next call. So no caller's thread touches it: they wait, and may be interrupted.

    Args:
        model: hub id or folder.
        arguments: further ones of `vllm.LLM`.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        self.key = _engine_args.key(model, arguments)
        self.users = 0
        self.process = os.getpid()
        self.gone = False
        """Whether its thread is done with it; guarded by the lock of all engines."""
        self.rate = 0.0
        """Texts a second of the last batch."""
        self._model = model
        self._arguments = arguments
        self._loaded: Future[LLM] = Future()
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._error: VLLMEmbedError | None = None
        self._end = False
        self._children: set[Any] = set()
        self.thread = threading.Thread(target=self._run, name="vllm-embed-engine", daemon=True)

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
        try:
            with _loading:
                for engine in list(_ending):
                    engine.thread.join(_END_S)  # its memory is needed
                self._children.update(multiprocessing.active_children())
                llm = LLM(self._model, self._arguments)
        except BaseException as exc:  # noqa: BLE001 - whoever waits must know
            self._over(explained(exc, self._model, running=False))
        else:
            _end_all_first()
            self._loaded.set_result(llm)
            while not self._end and self._error is None:
                if tasks := self._next():
                    self._do(llm, tasks)
            self._over(ClosedError())
            llm.close()
        with _lock:
            self.gone = True
            _ending.discard(self)

    def _next(self) -> list[_Task]:
        """The waiting tasks that can go together. None when it is to end, or nobody waits for them any more."""
        tasks: list[_Task] = []
        texts = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end)
            while self._waiting and not self._end:
                task = self._waiting[0]
                texts += len(task.prompts)
                if tasks and (task.how != tasks[0].how or texts > _MOST):
                    break
                self._waiting.popleft()
                if task.done.set_running_or_notify_cancel():
                    tasks.append(task)
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
                return
            for task in tasks:
                task.done.set_exception(self._error.copy() if self._error else exc)
            return
        self.rate = len(rows) / max(time.monotonic() - start, 1e-6)
        at = 0
        for task in tasks:
            task.done.set_result(rows[at : at + len(task.prompts)])
            at += len(task.prompts)

    def _over(self, error: VLLMEmbedError) -> None:
        """Take nothing more, tell those who wait, and let the next `acquire` make another."""
        with _lock:  # first, so that who sees the error and tries anew gets another
            if _running.get(self.key) is self:
                del _running[self.key]
        with self._changed:
            self._error = self._error or error
            waiting, self._waiting = self._waiting, collections.deque()
        if not self._loaded.done():
            self._loaded.set_exception(self._error)
        for task in waiting:
            if task.done.set_running_or_notify_cancel():
                task.done.set_exception(self._error.copy())

    def end(self) -> None:
        """Have it end after the batch that it is at."""
        with self._changed:
            self._end = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of an engine; one that is loading ends when it is loaded, and is not waited for."""
        if self._loaded.done():
            self.thread.join(_END_S)

    def stop(self) -> None:
        """Wait for the end when the interpreter ends; one that is loading is stopped."""
        self.join()
        until = time.monotonic() + _STOP_S
        while self.thread.is_alive() and not self._loaded.done() and time.monotonic() < until:
            for child in set(multiprocessing.active_children()) - self._children:
                child.terminate()
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
            with contextlib.suppress(Exception):
                self._loaded.result().disown()


def acquire(model: str, arguments: Mapping[str, Any]) -> Running:
    """The running engine of a model and arguments, started unless it is there. `release` it.

    Raises:
        EngineError: this process cannot start one.
    """
    key = _engine_args.key(model, arguments)
    with _lock:
        engine = _running.get(key)
        if engine is None:
            _spawn.check()
            engine = _running[key] = Running(model, arguments)
            _end_all_first()
            engine.thread.start()
        engine.users += 1
    return engine


def release(engine: Running) -> None:
    """Give an engine back; the last one ends it and frees its memory."""
    if engine.process != os.getpid():
        return
    with _lock:
        engine.users -= 1
        if engine.users:
            return
        if _running.get(engine.key) is engine:
            del _running[engine.key]
        if not engine.gone:
            _ending.add(engine)
    engine.end()
    engine.join()


def _end_all_first() -> None:
    """Have our clean-up at exit come before vLLM's own, which has less patience: the last registered runs first."""
    atexit.unregister(_end_all)
    atexit.register(_end_all)


def _end_all() -> None:
    with _lock:
        engines = [*_running.values(), *_ending]
    for engine in engines:
        engine.end()
    for engine in engines:
        engine.stop()


def _after_fork() -> None:
    global _lock, _loading  # whoever held them is not in this process
    _lock, _loading = threading.Lock(), threading.Lock()
    _foreign.extend([*_running.values(), *_ending])
    _running.clear()
    _ending.clear()
    for engine in _foreign:
        engine.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
