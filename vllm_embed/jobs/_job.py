"""A job from its input to its summary."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import numpy as np

from vllm_embed._stream import PAUSE
from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError, FingerprintMismatchError, OutputError
from vllm_embed.fingerprint import Fingerprint
from vllm_embed.jobs._inputs import sources
from vllm_embed.jobs._ledger import Ledger
from vllm_embed.jobs._pieces import Splitter, pieces
from vllm_embed.jobs._pipeline import Pipeline
from vllm_embed.jobs._plan import Planner
from vllm_embed.jobs._readers import Reader
from vllm_embed.jobs._rejects import Rejects
from vllm_embed.jobs._row import Reject, Row
from vllm_embed.jobs._sink import told
from vllm_embed.jobs._summary import Progress, Summary
from vllm_embed.jobs._targets import Target, file_target, remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_embed.info import Block
    from vllm_embed.jobs._inputs import Format, Source
    from vllm_embed.jobs._pieces import Unit
    from vllm_embed.jobs._sink import Sink

__all__ = ["Inputs", "Stream", "embed"]

Inputs: TypeAlias = "str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]"
Stream: TypeAlias = "Callable[[Iterator[Any]], Iterator[Block]]"

_PROGRESS_S: Final = 0.2
_SAMPLE: Final = 512
"""Texts that a dry run embeds to tell the speed."""
_SLICE: Final = 1_000


def embed(
    inputs: Inputs,
    output: str | os.PathLike[str] | Target,
    *,
    embedder: Embedder | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    columns: Iterable[str] | None = None,
    format: Format | None = None,  # noqa: A002 - what users call it
    encoding: str | None = None,
    chunk_size: int | None = None,
    chunk_overlap: int = 0,
    chunk_unit: Unit = "tokens",
    rejects: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    prune: bool = False,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    **settings: Any,
) -> Summary:
    """Embed a corpus into files; stopped at any moment, the same call goes on where it was.

    Reading, embedding and writing overlap, in bounded memory. Rows are written in input order; a changed row is
    embedded again and moves to the end. Rows with the same text cost one embedding.

    Args:
        inputs: files (.txt and .md, a text each; .jsonl, .csv, .tsv, .parquet, a text a row), globs, folders (their
            .txt and .md), "-" for standard input, or rows as mappings.
        output: `x.parquet` (a folder of files; `embedding` is a fixed-size list of float32), `x.jsonl`, or `x.npy`
            (float32, shape (n, d), with `x.ids.jsonl`). Beside it `x.parquet.job` holds what is done, and the
            fingerprint for `expect=`.
        embedder: what embeds; None: one made of `settings`.
        text_column: column of the text. None: "text", or the only column of a CSV or Parquet file.
        id_column: column of the id, strings or integers. None: "id" where a row has one, else its file and line.
        columns: carried along. None: all.
        format: what every input is: "text", "lines", "jsonl", "csv", "tsv" or "parquet". None: by the ending.
        encoding: of text. None: UTF-8, or a guess where a file is not; it is told in `Summary.notes`.
        chunk_size: split texts into pieces of at most so many `chunk_unit`; `#0`, `#1`, ... is put behind the id.
        chunk_overlap: so many, about, of a piece are those at the end of the one before.
        chunk_unit: "tokens", counted by the server with one small request a piece, or "characters".
        rejects: file for rows that cannot be embedded, with their lines and reasons. None: `x.rejects.jsonl`.
        limit: read so many rows only.
        dry_run: count, embed some texts to estimate the time, and write nothing.
        prune: take rows out that the input no longer has. Surplus pieces of a changed text go always.
        overwrite: remove the output and start anew.
        engine: "local", or "ray": as many actors as `workers`, with an embedder each.
        workers: 1 where it is not told.
        on_progress: called a few times a second, in this thread.
        **settings: of `Embedder`.

    Returns:
        What was done; its `status` is 1 where rows were rejected.

    Raises:
        ConfigurationError: an input or option that cannot work, or a missing package with its `pip install`.
        OutputError: the output cannot be written, is in use, or is not this job's.
        FingerprintMismatchError: the server's vectors are not those of the rows that are there.
        VLLMEmbedError: embedding failed; what has its vector is written.
    """
    target = output if isinstance(output, Target) else file_target(output)
    if embedder is not None and settings:
        raise ConfigurationError(f"{', '.join(settings)}: not beside embedder=, which has its settings")
    notes: list[str] = []
    reader = Reader(
        *_sources(inputs, format),
        text_column=text_column,
        id_column=id_column,
        columns=None if columns is None else list(columns),
        encoding=encoding,
        note=notes.append,
    )
    with contextlib.ExitStack() as stack:
        if embedder is None:
            embedder = stack.enter_context(Embedder(**settings))
        items: Iterable[Row | Reject] = reader
        if chunk_size is not None:
            items = pieces(items, _splitter(embedder, chunk_size, chunk_overlap, chunk_unit))
        if limit is not None:
            items = itertools.islice(items, limit)
        if dry_run:
            return _dry_run(items, target, embedder, notes)
        stream: Stream = partial(_local, embedder)
        if engine == "ray":
            from vllm_embed.ray import stream as ray_stream  # noqa: PLC0415 - extra

            stream = stack.enter_context(ray_stream(embedder.settings, workers=workers))
        job = _Job(target, embedder, notes, Path(rejects) if rejects else target.rejects, overwrite=overwrite)
        stack.callback(job.close)
        return job.run(
            items, reader, stream, whole=limit is None, chunked=chunk_size is not None, prune=prune, tell=on_progress
        )


class _Job:
    """One output at work."""

    def __init__(self, target: Target, embedder: Embedder, notes: list[str], rejects: Path, *, overwrite: bool) -> None:
        self._target = target
        self._embedder = embedder
        self._notes = notes
        self._decides = embedder.namespace
        ledger = target.folder / "ledger.sqlite"
        with told(target.path):
            if overwrite:
                if ledger.exists():
                    Ledger(ledger).close()  # refused while another job is at work
                target.clear()
                remove(target.folder)
            if not ledger.exists() and target.exists():
                raise OutputError(
                    f"{target.name} exists, and {target.folder}, which says what is in it, does not: choose another "
                    "output, or start anew with overwrite"
                )
            target.folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(ledger)
        self._sink: Sink | None = None
        try:
            self._rejects = Rejects(rejects)
            self._sink = target.make()
            self._sink.open(self._ledger.state)
        except BaseException:
            self.close()
            raise
        self._planner = Planner(self._decides, self._ledger.total)

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
        assert self._sink is not None  # noqa: S101 - opened
        started, before = time.monotonic(), self._embedder.stats()

        def progress() -> Progress:
            return Progress(
                rows=self._planner.read,
                written=pipeline.written,
                rejected=self._rejects.count,
                skipped=self._planner.skipped,
                tokens=self._embedder.stats().prompt_tokens - before.prompt_tokens,
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
        removed, pruned = self._swept(chunked=chunked, prune=prune) if whole else (0, 0)
        self._compact()
        self._sink.finish()
        if tell:
            tell(progress())
        after, info = self._embedder.stats(), self._embedder
        return Summary(
            output=self._target.name,
            model=info.model(),
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
            requests=after.requests - before.requests,
            tokens=after.prompt_tokens - before.prompt_tokens,
            seconds=time.monotonic() - started,
            rejects=str(self._rejects.path) if self._rejects.count else None,
            fingerprint=str(self._target.fingerprint) if self._target.fingerprint.exists() else None,
            notes=tuple(self._notes),
            how_to_open=self._target.how_to_open,
        )

    _width = 0

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
        assert self._sink is not None  # noqa: S101 - opened
        removed = pruned = 0
        unseen = self._ledger.unseen(self._planner.seen)
        while some := list(itertools.islice(unseen, _SLICE)):
            surplus = self._surplus([key for _, key in some]) if chunked else set()
            out = [(at, key) for at, key in some if prune or key in surplus]
            removed += sum(key not in surplus for _, key in some)
            pruned += len(out)
            if out:
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
        assert self._sink is not None  # noqa: S101 - opened
        total = self._ledger.total
        live = np.arange(total) if self._ledger.count() == total else self._ledger.live()
        if (state := self._sink.compact(live, total)) is not None:
            self._ledger.renumber(state)
            self._sink.settle()

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
        self._ledger.close()


def _local(embedder: Embedder, texts: Iterator[Any]) -> Iterator[Block]:
    return embedder.stream(texts, on_error="yield")


def _sources(inputs: Inputs, form: Format | None) -> tuple[list[Source], Iterable[Mapping[str, Any]]]:
    """Files, or rows that are here already."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    iterator = iter(inputs)
    first = next(iterator, None)
    if isinstance(first, Mapping):
        return [], cast("Iterable[Mapping[str, Any]]", itertools.chain([first], iterator))
    if first is None:
        raise ConfigurationError('no input: name files, globs, folders, "-" for standard input, or give rows')
    paths = cast("Iterable[str | os.PathLike[str]]", itertools.chain([first], iterator))
    return sources(paths, form), ()


def _splitter(embedder: Embedder, size: int, overlap: int, unit: Unit) -> Splitter:
    if unit not in ("tokens", "characters"):
        raise ConfigurationError(f'chunk_unit={unit!r}: "tokens" or "characters"')
    if unit == "characters":
        return Splitter(size, overlap)
    extra, limit = embedder.count(""), embedder.limit()
    if size + extra > limit and embedder.settings.long_text == "error":
        raise ConfigurationError(
            f"chunk_size={size} tokens and {extra} for the prompt and special tokens are over the model's limit of "
            f"{limit}: at most {limit - extra}"
        )
    return Splitter(size, overlap, lambda text: embedder.count(text) - extra)


def _seldom(tell: Callable[[], object]) -> Callable[[], None]:
    last = 0.0

    def now_and_then() -> None:
        nonlocal last
        if (now := time.monotonic()) - last > _PROGRESS_S:
            last = now
            tell()

    return now_and_then


def _dry_run(items: Iterable[Row | Reject], target: Target, embedder: Embedder, notes: list[str]) -> Summary:
    """Read everything, write nothing; embed the first texts to tell the speed."""
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
