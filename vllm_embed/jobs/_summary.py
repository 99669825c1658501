"""What a job tells: while it runs, and at its end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Progress", "Summary"]


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    rows: int
    """Read so far."""
    written: int
    """Rows that are safe in the output."""
    rejected: int
    skipped: int
    """Rows that were in the output before."""
    tokens: int
    seconds: float
    share: float | None
    """Of the input that was read, 0 to 1, in bytes; None where it cannot be told."""

    @property
    def documents_per_s(self) -> float:
        """Rows written a second."""
        return self.written / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """As the server counts them."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None where it cannot be told."""
        return self.seconds * (1 - self.share) / self.share if self.share else None


@dataclass(frozen=True)
class Summary:
    """What a job did. Of rows: `read = embedded + same + skipped + rejected`."""

    output: str
    model: str
    dimension: int
    """0 when nothing was embedded."""
    read: int
    embedded: int
    """Rows whose text was embedded and written."""
    same: int
    """Rows written with the vector of another row that has the same text."""
    skipped: int
    """Rows that were in the output already, unchanged."""
    replaced: int
    """Rows, of those embedded or the same, that were in the output with another text or for other settings."""
    rejected: int
    removed: int
    """Rows of the output that the input no longer has."""
    pruned: int
    """Rows that were taken out of the output: with `prune` those, and always surplus pieces of a changed text."""
    foreign: int
    """Rows left in the output whose vectors were made with another model or other settings."""
    rows: int
    """Rows in the output now."""
    requests: int
    tokens: int
    seconds: float
    rejects: str | None
    """File with the rejected rows and the reasons; None when there are none."""
    fingerprint: str | None
    """File that `expect=` takes; None when nothing was ever embedded."""
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    to_embed: int = 0
    """In a dry run: rows that would be embedded."""
    estimated_seconds: float | None = None
    """In a dry run: for those, at the speed of the first of them."""
    how_to_open: dict[str, str] = field(default_factory=dict)
    """Lines of Python that open the output, by framework or library."""

    @property
    def status(self) -> int:
        """For a command: 0 all rows are in the output, 1 some are not, or are beside rows of another model."""
        return 1 if self.rejected or self.foreign else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"status": self.status}
