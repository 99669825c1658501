"""Arrays to the lists of floats that LangChain and LlamaIndex ask for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["alists", "lists"]

_ROWS = 64
"""Rows between two looks at the event loop: 1 to 3 ms of 1,024-d vectors."""

_lock = threading.Lock()
_pausing = 0
_was_on = False


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cyclic collector from walking millions of floats that cannot form a cycle.

    It is process-wide, so the pauses of several threads are counted, and only what was on is turned on again.
    """
    global _pausing, _was_on  # noqa: PLW0603 - the collector is global
    with _lock:
        if _pausing == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _pausing += 1
    try:
        yield
    finally:
        with _lock:
            _pausing -= 1
            if _pausing == 0 and _was_on:
                gc.enable()


def lists(vectors: NDArray[np.float32]) -> list[list[float]]:
    """Rows as lists of Python floats: 40 KiB per 1,024-d row, ten times the array's."""
    with _no_collection():
        rows: list[list[float]] = vectors.tolist()
    return rows


async def alists(vectors: NDArray[np.float32]) -> list[list[float]]:
    """The same, letting the event loop run in between."""
    rows: list[list[float]] = []
    for start in range(0, len(vectors), _ROWS):
        rows += lists(vectors[start : start + _ROWS])
        if start + _ROWS < len(vectors):
            await asyncio.sleep(0)
    return rows
