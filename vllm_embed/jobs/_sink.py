"""Where a job's rows go: the seam, and what the sinks that write files share."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Protocol

from vllm_embed.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["Sink", "durable", "durable_folder", "told"]


class Sink(Protocol):
    """An output. One thread at a time.

    Its `state` is a JSON object that the ledger keeps: what the sink needs to find itself again after a kill. `{}` is
    the state of an output that holds nothing.
    """

    knows_ids: bool
    """Whether `write` replaces rows and `remove` takes them out. If not, `compact` does both."""

    def open(self, state: dict[str, Any]) -> None:
        """Make ready to write, and drop whatever is there beyond `state`.

        Raises:
            OutputError: it cannot be written, or is in use.
        """

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """Make rows durable, behind all others.

        Args:
            rows: no id twice.
            vectors: shape (n, d).

        Returns:
            The new state.
        """

    def remove(self, ids: Sequence[str]) -> None:
        """Take rows out, for sinks that know ids; some may not be there."""

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:
        """Prepare an output of nothing but the rows numbered `live`, of `total` that were written.

        Nothing of the present output is touched before `settle`.

        Returns:
            The state after `settle`; None when there is nothing to do.
        """

    def settle(self) -> None:
        """Carry out what `compact` prepared and the ledger has recorded. `open` does so after a kill."""

    def finish(self) -> None:
        """All rows are there: what is made of them as a whole, such as an index, is made now."""

    def close(self) -> None:
        """Release files and locks. Idempotent."""


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """An OSError becomes an `OutputError` that names the path."""
    try:
        yield
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def durable(file: Any) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def durable_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
