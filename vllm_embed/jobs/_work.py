"""One output at work: opened, filled, swept, summed up."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from vllm_embed._stream import PAUSE
from vllm_embed.errors import FingerprintMismatchError, OutputError
from vllm_embed.fingerprint import Fingerprint
from vllm_embed.jobs._ledger import Ledger
from vllm_embed.jobs._pipeline import Pipeline
from vllm_embed.jobs._plan import Planner
from vllm_embed.jobs._rejects import Rejects
from vllm_embed.jobs._sink import told
from vllm_embed.jobs._summary import Progress, Summary
from vllm_embed.jobs._targets import remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from vllm_embed.embedder import Embedder
    from vllm_embed.info import Block
    from vllm_embed.jobs._readers import Reader
    from vllm_embed.jobs._row import Reject, Row
    from vllm_embed.jobs._targets import Target

__all__ = ["Stream", "Work"]

Stream: TypeAlias = "Callable[[Iterator[Any]], Iterator[Block]]"

_PROGRESS_S: Final = 0.2
_SLICE: Final = 1_000


class Work:
    """One output at work.

    Args:
        target: where rows go.
        embedder: tells the model and what decides its vectors.
        notes: for the summary; others add to it.
        rejects: file for rows without a vector.
        overwrite: remove the output first.

    Raises:
        OutputError: it cannot be written, is in use, or is not this job's.
    """

    def __init__(self, target: Target, embedder: Embedder, notes: list[str], rejects: Path, *, overwrite: bool) -> None:
        self._target = target
        self._embedder = embedder
        self._notes = notes
        self._decides = embedder.namespace
        ledger = target.folder / "ledger.sqlite"
        with told(target.path):
            if overwrite:
                if ledger.exists():
                    Ledger.free(ledger)
                target.clear()
                remove(target.folder)
            if not ledger.exists() and target.exists():
                raise OutputError(
                    f"{target.name} exists, and {target.folder}, which says what is in it, does not: choose another "
                    "output, or start anew with overwrite"
                )
            target.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._ledger = Ledger(ledger)
            undo.callback(self._ledger.close)
            self._rejects = Rejects(rejects)
            self._sink = target.make()
            undo.callback(self._sink.close)
            self._sink.open(self._ledger.state)
            if self._sink.knows_ids and (unknown := self._ledger.intended()):
                self._sink.remove(unknown)
                self._ledger.forget_intended()
            self._release = undo.pop_all()
        self._planner = Planner(self._decides, self._ledger.total)
        self._width = 0

    def run(
        self,
        items: Iterable[Row | Reject],
        reader: Reader,
        stream: Stream,
        *,
        whole: bool,
        chunked: bool,
        prune: bool,
        tell: Callable[[Progress], object] | None,
    ) -> Summary:
        """Fill the output.

        Args:
            items: what is read.
            reader: tells how far.
            stream: embeds.
            whole: whether `items` is all of the input, so that what it lacks was removed.
            chunked: whether ids are those of pieces.
            prune: take removed rows out.
            tell: told of progress.
        """
        started, before = time.monotonic(), self._embedder.stats()

        def spent() -> tuple[int, int]:
            """Requests and tokens of this run; Ray's actors count their own."""
            now, others = self._embedder.stats(), (getattr(stream, "requests", 0), getattr(stream, "prompt_tokens", 0))
            return now.requests - before.requests + others[0], now.prompt_tokens - before.prompt_tokens + others[1]

        def progress() -> Progress:
            return Progress(
                rows=self._planner.read,
                written=pipeline.written,
                rejected=self._rejects.count,
                skipped=self._planner.skipped,
                tokens=spent()[1],
                seconds=time.monotonic() - started,
                share=min(1.0, reader.bytes_read / reader.bytes_total) if reader.bytes_total else None,
            )

        pipeline = Pipeline(
            items,
            self._planner,
            self._ledger,
            self._sink,
            lambda texts: stream(self._checked(texts)),
            on_reject=self._rejects.add,
            on_rows=_seldom(lambda: tell(progress())) if tell else lambda: None,
        )
        try:
            pipeline.run()
        finally:
            self._rejects.close()
        if self._planner.skipped and self._ledger.identity != self._decides:
            self._identify()  # another model was tried in between, and what was skipped is of this one
        removed, pruned = self._swept(chunked=chunked, prune=prune) if whole else (0, 0)
        self._compact()
        self._sink.finish()
        if tell:
            tell(progress())
        requests, tokens = spent()
        return Summary(
            output=self._target.name,
            model=self._embedder.model(),
            dimension=self._width,
            read=self._planner.read,
            embedded=pipeline.embedded,
            same=pipeline.written - pipeline.embedded,
            skipped=self._planner.skipped,
            replaced=pipeline.replaced,
            rejected=self._rejects.count,
            removed=removed,
            pruned=pruned,
            foreign=self._ledger.foreign(),
            rows=self._ledger.count(),
            requests=requests,
            tokens=tokens,
            seconds=time.monotonic() - started,
            rejects=str(self._rejects.path) if self._rejects.count else None,
            fingerprint=str(self._target.fingerprint) if self._target.fingerprint.exists() else None,
            notes=tuple(self._notes),
            how_to_open=self._target.how_to_open,
        )

    def _checked(self, texts: Iterator[Any]) -> Iterator[Any]:
        """The texts; before the first of them, that their vectors may stand beside those that are there."""
        for text in texts:
            if text is not PAUSE:
                self._identify()
                yield text
                break
            yield text
        yield from texts

    def _identify(self) -> None:
        found = self._embedder.fingerprint()
        self._width = found.dimension
        path = self._target.fingerprint
        if self._ledger.identity == self._decides and path.exists():
            comparison = Fingerprint.load(path).compare(found)
            if not comparison.same:
                raise FingerprintMismatchError(
                    f"the model has the name and settings that {self._target.name} was filled with, and gives other "
                    f"vectors:\n{comparison}\nServe it as it was, or start anew with overwrite",
                    model=found.model,
                )
            return
        with told(path):
            found.save(path)
        self._ledger.identify(self._decides)

    def _swept(self, *, chunked: bool, prune: bool) -> tuple[int, int]:
        """How many rows the input no longer has, and how many were taken out of the output."""
        removed = pruned = 0
        unseen = self._ledger.unseen(self._planner.seen)
        while some := list(itertools.islice(unseen, _SLICE)):
            surplus = self._surplus([key for _, key in some]) if chunked else set()
            out = [(at, key) for at, key in some if prune or key in surplus]
            removed += sum(key not in surplus for _, key in some)
            pruned += len(out)
            if out:
                if self._sink.knows_ids:
                    self._ledger.intend(key for _, key in out)
                    self._sink.remove([key for _, key in out])
                self._ledger.delete(at for at, _ in out)
        return removed, pruned

    def _surplus(self, ids: list[str]) -> set[str]:
        """Pieces of a text that the input has, with fewer pieces now."""
        firsts = {key: f"{key.rpartition('#')[0]}#0" for key in ids if "#" in key}
        seen = self._planner.seen
        here = {
            key
            for key, place in self._ledger.find(list(set(firsts.values()))).items()
            if place.at >= len(seen) or seen[place.at]
        }
        return {key for key, first in firsts.items() if first in here}

    def _compact(self) -> None:
        """Leave in files only the rows that count."""
        total = self._ledger.total
        live = np.arange(total) if self._ledger.count() == total else self._ledger.live()
        if (state := self._sink.compact(live, total)) is not None:
            self._ledger.renumber(state)
            self._sink.settle()

    def close(self) -> None:
        """Let another job have the output."""
        self._release.close()


def _seldom(tell: Callable[[], object]) -> Callable[[], None]:
    last = 0.0

    def now_and_then() -> None:
        nonlocal last
        if (now := time.monotonic()) - last > _PROGRESS_S:
            last = now
            tell()

    return now_and_then
