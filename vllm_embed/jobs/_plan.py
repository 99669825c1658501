"""What becomes of each row: embedded, the same as one before, skipped, or rejected. No thread, no socket."""

from __future__ import annotations

import collections
import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

import orjson

from vllm_embed.jobs._row import Reject, Row, sound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vllm_embed.jobs._ledger import Place

__all__ = ["Known", "Planned", "Planner", "Shared"]

_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
_REMEMBERED: Final = 4096
"""Texts whose vectors are kept for rows with the same text; those that are waited for are kept beyond it."""


class Shared:
    """The vector of a text, or why it has none, for every row that holds this text."""

    __slots__ = ("error", "slot", "vector", "waiting")

    def __init__(self) -> None:
        self.vector: memoryview | None = None
        self.error: str | None = None
        self.waiting = 1
        """Rows that are not written yet."""
        self.slot = -1
        """Where `vector` lies among those that are kept; -1: on its own."""


class Known:
    """The texts that were met lately, and their vectors, in one buffer that is written over again and again."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._texts: collections.OrderedDict[bytes, Shared] = collections.OrderedDict()
        self._vectors = memoryview(b"")
        self._free = list(range(most))

    def meet(self, digest: bytes) -> tuple[Shared, bool]:
        """What the rows with a text share, and whether this row is the first."""
        if (shared := self._texts.get(digest)) is not None:
            shared.waiting += 1
            self._texts.move_to_end(digest)
            return shared, False
        self._texts[digest] = shared = Shared()
        while len(self._texts) > self._most:
            oldest, least = next(iter(self._texts.items()))
            if least.waiting:
                break
            del self._texts[oldest]
            if least.slot >= 0:
                self._free.append(least.slot)
        return shared, True

    def keep(self, shared: Shared, vector: memoryview) -> None:
        """A text's vector is there, as bytes; they may change afterwards."""
        size = len(vector)
        if not self._vectors:
            self._vectors = memoryview(bytearray(self._most * size))
        if not self._free:
            shared.vector = memoryview(bytes(vector))
            return
        shared.slot = self._free.pop()
        shared.vector = self._vectors[shared.slot * size : (shared.slot + 1) * size]
        shared.vector[:] = vector


class Planned(NamedTuple):
    """A row that is to be written."""

    row: Row
    """As it is stored."""
    text: str
    """As it was read."""
    hash: bytes
    shared: Shared
    first: bool
    """Whether its text is to be embedded; if not, a row before it has the same."""
    replaces: bool


class Planner:
    """Decides about rows in their order, and counts.

    Args:
        decides: what beside text and columns decides a vector; part of every hash.
        before: rows that the output had when the job began.
    """

    def __init__(self, decides: str, before: int) -> None:
        self._person = hashlib.blake2b(decides.encode(), digest_size=16).digest()
        self.seen = bytearray(before)
        """1 for each row of the output that the input still has."""
        self.pending: dict[str, None] = {}
        """Ids on their way to the output."""
        self.known = Known()
        self.read = self.skipped = self.same = 0

    def plan(self, items: Sequence[Row | Reject], found: Mapping[str, Place]) -> Iterator[Planned | Reject]:
        """Decide about rows, of which `found` are in the output; skipped ones are only counted."""
        for item in items:
            self.read += 1
            if isinstance(item, Reject):
                yield item
                continue
            key = item.id
            place = found.get(key)
            if key in self.pending or (place is not None and (place.at >= len(self.seen) or self.seen[place.at])):
                yield Reject(item.source, item.line, key, f"the id {key!r:.200} was there before in this input")
                continue
            row, text, digest = self._hashed(item)
            if place is not None:
                self.seen[place.at] = 1
                if place.hash == digest:
                    self.skipped += 1
                    continue
            self.pending[key] = None
            shared, first = self.known.meet(text)
            self.same += not first
            yield Planned(row, item.text, digest, shared, first, place is not None)

    def _hashed(self, row: Row) -> tuple[Row, bytes, bytes]:
        """The row as it can be stored, its text's hash and its own."""
        try:
            data = row.text.encode()
        except UnicodeEncodeError:
            data = row.text.encode("utf-8", "surrogatepass")
            row = row._replace(text=sound(row.text))
        text = hashlib.blake2b(data, digest_size=16, person=self._person)
        digest = text.digest()
        if not row.columns:
            return row, digest, digest
        try:
            columns = orjson.dumps(row.columns, default=repr, option=_OPTIONS)
        except TypeError:  # half a surrogate pair, an integer of over 64 bits
            row = row._replace(columns={sound(name): sound(value) for name, value in row.columns.items()})
            columns = repr(sorted(row.columns.items())).encode()
        text.update(b"\0" + columns)
        return row, digest, text.digest()

    def written(self, ids: Iterable[str]) -> None:
        """Those are in the output now."""
        for key in ids:
            self.pending.pop(key, None)
