"""What is in an output, row by row: a SQLite file beside it. Its commit is the moment at which rows are done.

A sink makes rows durable first; the ledger's transaction then names them, with the sink's state. After a kill, what the
sink holds beyond that state is dropped, so that nothing is lost and nothing is there twice. A store has no state to go
back to: what is about to be changed in it is noted before, and after a kill those rows are taken out and done again.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from vllm_embed.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Ledger", "Place"]

_FORMAT: Final = 1
_CACHE_KIB: Final = 32 * 1024
_SLICE: Final = 10_000
_IDS: Final = 500
"""Parameters of one query; SQLite allows 999 and more."""


class Place(NamedTuple):
    """A row of the output."""

    at: int
    """Its number: rows are numbered as they are written."""
    hash: bytes
    """Of its text, its columns and of what decides its vector."""


class Ledger:
    """One output's, held by one job at a time. From any thread.

    Args:
        path: of the SQLite file; made when missing.

    Raises:
        OutputError: it cannot be written, is another job's now, or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            self._prepare()
        except sqlite3.Error as exc:
            if hasattr(self, "_db"):
                self._db.close()
            if _busy(exc):
                raise OutputError(f"another job is at work on this output: {path} is in use") from exc
            raise OutputError(f"{path} cannot be written: {exc}") from exc
        self.state: dict[str, Any] = json.loads(self._one("SELECT value FROM state WHERE key = 'sink'") or "{}")
        """The sink's, as of the last commit."""
        self.identity: str = self._one("SELECT value FROM state WHERE key = 'identity'") or ""
        """What decided the vectors of the last job."""
        self.total: int = int(self._one("SELECT value FROM state WHERE key = 'total'") or 0)
        """Rows written so far, those that were replaced since included; the next row's number."""

    def _prepare(self) -> None:
        # Exclusive, so that a second job is told; the write below takes the lock at once.
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", f"cache_size = -{_CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        with self._transaction():
            self._db.execute("CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS rows"
                " (at INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, hash BLOB NOT NULL, job TEXT NOT NULL)"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS intended (id TEXT PRIMARY KEY)")
            self._db.execute("INSERT OR IGNORE INTO state VALUES ('format', ?)", (str(_FORMAT),))
        if self._one("SELECT value FROM state WHERE key = 'format'") != str(_FORMAT):
            raise OutputError(f"{self.path} was made by another version of vllm-embed: choose another output")

    @staticmethod
    def free(path: Path) -> None:
        """Look that no job is at work on an output whose ledger is to be removed.

        Raises:
            OutputError: one is.
        """
        try:
            Ledger(path).close()
        except OutputError as exc:
            if _busy(exc.__cause__):
                raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: object) -> Any:
        row = self._db.execute(query, values).fetchone()
        return row[0] if row else None

    def find(self, ids: Sequence[str]) -> dict[str, Place]:
        """Those of the ids that are in the output, and where."""
        found: dict[str, Place] = {}
        for start in range(0, len(ids), _IDS):
            some = ids[start : start + _IDS]  # as parameters: json_each ends an id at its first NUL
            query = f"SELECT id, at, hash FROM rows WHERE id IN ({', '.join('?' * len(some))})"  # noqa: S608
            with self._lock:
                found.update((key, Place(at, digest)) for key, at, digest in self._db.execute(query, some))
        return found

    def commit(self, rows: Sequence[tuple[str, bytes]], state: dict[str, Any]) -> None:
        """Rows, id and hash, that were written after all others; an id that was there before is replaced."""
        numbered = ((self.total + i, key, digest, self.identity) for i, (key, digest) in enumerate(rows))
        with self._lock, self._told(), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", numbered)
            self._db.execute("DELETE FROM intended")
            self._keep(state, self.total + len(rows))
        self.state, self.total = state, self.total + len(rows)

    def identify(self, identity: str) -> None:
        """From now on rows are of this identity."""
        with self._lock, self._told(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO state VALUES ('identity', ?)", (identity,))
        self.identity = identity

    def count(self) -> int:
        """Rows in the output, each id once."""
        with self._lock:
            return int(self._one("SELECT count(*) FROM rows"))

    def foreign(self) -> int:
        """Rows whose vectors were decided by something else than the present identity."""
        with self._lock:
            return int(self._one("SELECT count(*) FROM rows WHERE job <> ?", self.identity))

    def unseen(self, seen: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Number and id of the rows numbered below `len(seen)` that are not marked in it."""
        start = 0
        while start < len(seen):
            with self._lock:
                rows = self._db.execute(
                    "SELECT at, id FROM rows WHERE at >= ? AND at < ? ORDER BY at", (start, start + _SLICE)
                ).fetchall()
            yield from ((at, key) for at, key in rows if at < len(seen) and not seen[at])
            start += _SLICE

    def delete(self, numbers: Iterable[int]) -> None:
        """Forget rows."""
        with self._lock, self._told(), self._transaction():
            self._db.executemany("DELETE FROM rows WHERE at = ?", ((at,) for at in numbers))
            self._db.execute("DELETE FROM intended")

    def intend(self, ids: Iterable[str]) -> None:
        """These rows are about to be changed in the sink; until `commit` or `delete`, nobody knows how they are."""
        with self._lock, self._told(), self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO intended VALUES (?)", ((key,) for key in ids))

    def intended(self) -> list[str]:
        """Ids of the rows of which a kill left nobody knowing how they are."""
        with self._lock:
            return [key for (key,) in self._db.execute("SELECT id FROM intended")]

    def forget_intended(self) -> None:
        """Those are not in the sink now."""
        with self._lock, self._told(), self._transaction():
            self._db.execute("DELETE FROM rows WHERE id IN (SELECT id FROM intended)")
            self._db.execute("DELETE FROM intended")

    def live(self) -> NDArray[np.int64]:
        """Numbers of the rows that count, ascending; the others were replaced or deleted."""
        with self._lock:
            cursor = self._db.execute("SELECT at FROM rows ORDER BY at")
            return np.fromiter((at for (at,) in cursor), dtype=np.int64)

    def renumber(self, state: dict[str, Any]) -> None:
        """Number the rows anew from 0, in their order, for a sink that now holds just these."""
        with self._lock, self._told(), self._transaction():
            self._db.execute("CREATE TEMP TABLE renumbered AS SELECT id, hash, job FROM rows ORDER BY at")
            self._db.execute("DELETE FROM rows")
            self._db.execute("INSERT INTO rows SELECT rowid - 1, id, hash, job FROM renumbered ORDER BY rowid")
            self._db.execute("DROP TABLE renumbered")
            total = int(self._one("SELECT count(*) FROM rows"))
            self._keep(state, total)
        self.state, self.total = state, total

    def _keep(self, state: dict[str, Any], total: int) -> None:
        # The total beside the rows: of those that were written, the last may have been deleted since.
        values = [("sink", json.dumps(state)), ("total", str(total))]
        self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", values)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise OutputError(f"{self.path} cannot be written: {exc}") from exc

    def close(self) -> None:
        """Let another job have it."""
        with self._lock:
            self._db.close()


def _busy(exc: BaseException | None) -> bool:
    return getattr(exc, "sqlite_errorname", "").startswith("SQLITE_BUSY")
