"""What the sinks of vector stores share: where a store lies, whose it is, and what of a row it holds."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from abc import ABC, abstractmethod
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import orjson

from vllm_embed.errors import OutputError, VLLMEmbedError
from vllm_embed.jobs._sink import told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed.jobs._row import Row

__all__ = ["Hit", "Place", "Store", "as_json", "metadata", "storable"]

_SOURCELESS: Final = ("rows", "-")
"""Sources that name no file."""
_READ_BY_LLAMA_INDEX: Final = {"_node_content", "_node_type", "node_info", "ref_doc_id", "relationships"}
"""Names that LlamaIndex's stores parse or drop when they make a node of a row (0.14)."""
_OPTIONS: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
_REASON: Final = 500


class Hit(NamedTuple):
    """One answer of a search."""

    id: str
    score: float
    """Cosine of the question's vector and the row's: 1 the same direction, 0 unrelated. In every store."""
    text: str
    metadata: dict[str, Any]
    """The carried columns and, where there is one, `source`."""


class Place(NamedTuple):
    """Where a store lies."""

    kind: str
    address: str
    """Path or URL."""
    path: Path | None
    """None: a server."""
    collection: str
    folder: Path
    """Of the ledger and the fingerprint."""

    @property
    def name(self) -> str:
        """As it is told."""
        return f"{self.kind}:{self.address}"


class Store(ABC):
    """A sink that knows ids: `write` replaces. Opened anew by each job.

    The state says which store the ledger is of, and the width of its vectors.
    """

    kind: ClassVar[str]
    knows_ids = True

    def __init__(self, place: Place) -> None:
        self.place = place
        self._width = 0

    @abstractmethod
    def exists(self) -> bool:
        """Whether the collection is there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove the collection; others in the same place stay."""

    @abstractmethod
    def nearest(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        """The rows nearest to a vector, through LangChain's class, best first."""

    @abstractmethod
    def how_to_open(self, fingerprint: str) -> dict[str, str]:
        """Python that opens it, by framework."""

    @abstractmethod
    def _upsert(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None: ...

    @abstractmethod
    def _delete(self, ids: Sequence[str]) -> None: ...

    def open(self, state: dict[str, Any]) -> None:
        """See `Sink`."""
        self._own(state)
        with self.reported():
            self._writable()
            if state and not self.exists():
                raise OutputError(
                    f"the collection {self.place.collection!r} of {self.place.name} is gone: choose another, or start "
                    "anew with overwrite"
                )
        self._width = state.get("dimension", 0)

    def _own(self, state: dict[str, Any]) -> None:
        if state and (state.get("store"), state.get("collection")) != (self.kind, self.place.collection):
            other = f"{state.get('store', 'a file')}, {state.get('collection', 'no collection')}"
            raise OutputError(
                f"{self.place.folder} says what is in another output ({other}): choose another path than "
                f"{self.place.address}"
            )

    def _writable(self) -> None:
        if self.place.path is not None:
            with told(self.place.path):
                self.place.path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.place.path):
                    pass

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> dict[str, Any]:
        """See `Sink`."""
        width = vectors.shape[1]
        if self._width not in (0, width):
            raise OutputError(
                f"the collection {self.place.collection!r} of {self.place.name} holds vectors of {self._width} "
                f"numbers, and these have {width}: choose another collection, or start anew with overwrite"
            )
        with self.reported():
            self._upsert(rows, vectors)
        self._width = width
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {"store": self.kind, "collection": self.place.collection, "dimension": self._width}

    def remove(self, ids: Sequence[str]) -> None:
        """See `Sink`."""
        with self.reported():
            if self.exists():
                self._delete(ids)

    def compact(self, live: NDArray[np.int64], total: int) -> dict[str, Any] | None:  # noqa: ARG002 - see `Sink`
        """See `Sink`."""
        return None

    def settle(self) -> None:  # noqa: B027 - nothing to do in some
        """See `Sink`."""

    def finish(self) -> None:  # noqa: B027 - nothing to do in some
        """See `Sink`."""

    def close(self) -> None:  # noqa: B027 - nothing to do in some
        """See `Sink`."""

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """A store's own error becomes an `OutputError` that names the store."""
        try:
            yield
        except VLLMEmbedError:
            raise
        except Exception as exc:
            reason = str(exc)[:_REASON] or type(exc).__name__
            if "already accessed" in reason or "database is locked" in reason:
                raise OutputError(
                    f"{self.place.name} is open in another process or object: close it there first"
                ) from exc
            raise OutputError(f"{self.place.name}, collection {self.place.collection!r}: {reason}") from exc


def metadata(row: Row) -> dict[str, Any]:
    """What a store holds of a row beside its text and vector: `id`, `source` and the carried columns."""
    found: dict[str, Any] = {"id": row.id}
    if row.source and row.source not in _SOURCELESS:
        found["source"] = row.source
    for name, value in row.columns.items():
        found[f"{name}_" if name in _READ_BY_LLAMA_INDEX else name] = value
    return found


def storable(value: Any) -> str | int | float | bool:
    """A value for stores of flat metadata: text, number, truth value; anything else as JSON text ("null" for None)."""
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _text(value)


def as_json(value: Any) -> Any:
    """A value for stores of JSON: as it is, where JSON has it; dates and the like as text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value if value is None else storable(value)
    try:
        return orjson.loads(orjson.dumps(value, default=str, option=_OPTIONS))
    except TypeError:  # an integer of over 64 bits
        return json.loads(json.dumps(value, default=str))


def _text(value: Any) -> str:
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    try:
        text = orjson.dumps(value, default=str, option=_OPTIONS).decode()
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return str(orjson.loads(text)) if text.startswith('"') else text
