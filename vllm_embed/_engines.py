"""The engines of this process: one for all embedders that ask for the same, counted, and ended with the interpreter."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from vllm_embed import _engine_args, _spawn
from vllm_embed._running import Running

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Engines", "acquire", "release"]

_END_S = 60.0
"""Most seconds that the memory of an ended engine is waited for before another is loaded."""


class Engines:
    """Who runs, who is ending, and whose turn it is to load."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.ending: set[Running] = set()
        self.lock = threading.Lock()
        self._turn = threading.Lock()
        self._foreign: list[Running] = []
        self._at_exit: multiprocessing.util.Finalize | None = None

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """One engine loads at a time, and after those that are ending: it needs their memory."""
        with self._turn:
            for engine in list(self.ending):
                engine.thread.join(_END_S)
            yield
        self.end_all_first()

    def over(self, engine: Running) -> None:
        """Have the next `acquire` make another."""
        with self.lock:
            if self.running.get(engine.key) is engine:
                del self.running[engine.key]

    def gone(self, engine: Running) -> None:
        """Its thread is done with it."""
        with self.lock:
            engine.gone = True
            self.ending.discard(engine)

    def end_all_first(self) -> None:
        """Have our clean-up at exit come before vLLM's own, which has less patience: the last registered runs first."""
        atexit.unregister(self._end_all)
        atexit.register(self._end_all)
        if self._at_exit is None:  # a child of multiprocessing waits for its own children before it comes to atexit
            self._at_exit = multiprocessing.util.Finalize(None, self._end_all, exitpriority=100)

    def _end_all(self) -> None:
        with self.lock:
            left = [*self.running.values(), *self.ending]
        for engine in left:
            engine.end()
        for engine in left:
            engine.stop()

    def forked(self) -> None:
        """In a forked child: the parent's engines are kept, so that nothing of them is cleaned up, and not used."""
        self._foreign += [*self.running.values(), *self.ending]
        self.running, self.ending, self._at_exit = {}, set(), None
        self.lock, self._turn = threading.Lock(), threading.Lock()  # whoever held them is not in this process
        for engine in self._foreign:
            engine.forked()


engines = Engines()
# The first finalizer registers the clean-up of all, vLLM's too. Ours is registered later, so it runs before.
weakref.finalize(engines, bool)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=engines.forked)


def acquire(model: str, arguments: Mapping[str, Any]) -> Running:
    """The running engine of a model and arguments, started unless it is there. `release` it.

    Raises:
        EngineError: this process cannot start one.
    """
    key = _engine_args.key(model, arguments)
    with engines.lock:
        engine = engines.running.get(key)
        if engine is None:
            _spawn.check()
            engine = engines.running[key] = Running(model, arguments, engines)
            engines.end_all_first()
            engine.thread.start()
        engine.users += 1
    return engine


def release(engine: Running) -> None:
    """Give an engine back; the last one ends it and frees its memory."""
    if engine.process != os.getpid():
        return
    with engines.lock:
        engine.users -= 1
        if engine.users:
            return
        if engines.running.get(engine.key) is engine:
            del engines.running[engine.key]
        if not engine.gone:
            engines.ending.add(engine)
    engine.end()
    engine.join()
