"""A dry run: everything is read and planned, nothing is written."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Final

from vllm_embed.jobs._ledger import Ledger
from vllm_embed.jobs._plan import Planner
from vllm_embed.jobs._row import Reject, Row
from vllm_embed.jobs._summary import Summary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_embed.embedder import Embedder
    from vllm_embed.jobs._targets import Target

__all__ = ["look"]

_SAMPLE: Final = 512
"""Texts that are embedded to tell the speed."""
_SLICE: Final = 1_000


def look(items: Iterable[Row | Reject], target: Target, embedder: Embedder, notes: list[str]) -> Summary:
    """Count what a job would do, and embed the first texts to tell how long it would take."""
    path = target.folder / "ledger.sqlite"
    ledger = Ledger(path) if path.exists() else None
    try:
        planner = Planner(embedder.namespace, ledger.total if ledger else 0)
        sample: list[str] = []
        count = rejected = to_embed = replaced = 0
        iterator = iter(items)
        while batch := list(itertools.islice(iterator, _SLICE)):
            found = ledger.find([item.id for item in batch if isinstance(item, Row)]) if ledger else {}
            for planned in planner.plan(batch, found):
                if isinstance(planned, Reject):
                    rejected += 1
                    continue
                count += 1
                planned.shared.waiting = 0
                replaced += planned.replaces
                to_embed += planned.first
                if planned.first and len(sample) < _SAMPLE:
                    sample.append(planned.text)
        removed = sum(1 for _ in ledger.unseen(planner.seen)) if ledger else 0
        rows = ledger.count() if ledger else 0
    finally:
        if ledger:
            ledger.close()
    before, started, dimension = embedder.stats(), 0.0, 0
    estimate: float | None = 0.0
    if sample:
        embedder.info()  # connected, and loaded, before the clock starts
        started = time.monotonic()
        for block in embedder.stream(sample, on_error="yield"):
            dimension = block.vectors.shape[1]
            rejected += len(block.failures)
        estimate = (time.monotonic() - started) / len(sample) * to_embed
    after = embedder.stats()
    return Summary(
        output=target.name,
        model=embedder.model(),
        dimension=dimension,
        read=planner.read,
        embedded=0,
        same=count - to_embed,
        skipped=planner.skipped,
        replaced=replaced,
        rejected=rejected,
        removed=removed,
        pruned=0,
        foreign=0,
        rows=rows,
        requests=after.requests - before.requests,
        tokens=after.prompt_tokens - before.prompt_tokens,
        seconds=time.monotonic() - started if started else 0.0,
        rejects=None,
        fingerprint=None,
        notes=tuple(notes),
        dry_run=True,
        to_embed=to_embed,
        estimated_seconds=estimate,
    )
