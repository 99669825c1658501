"""A job from its input to its summary."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError
from vllm_embed.jobs._dry import look
from vllm_embed.jobs._inputs import sources
from vllm_embed.jobs._pieces import Splitter, pieces
from vllm_embed.jobs._readers import Reader
from vllm_embed.jobs._targets import Target, file_target, refuse_own
from vllm_embed.jobs._work import Stream, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_embed.info import Block
    from vllm_embed.jobs._inputs import Format, Source
    from vllm_embed.jobs._pieces import Unit
    from vllm_embed.jobs._row import Reject, Row
    from vllm_embed.jobs._summary import Progress, Summary

__all__ = ["Inputs", "embed"]

Inputs: TypeAlias = "str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]]"


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
        workers: actors on Ray; None: 2, in process one for each GPU.
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
    files, rows = _sources(inputs, format)
    refuse_own(files, target, rejects)
    reader = Reader(
        files,
        rows,
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
        if limit is not None:
            items = itertools.islice(items, limit)
        if chunk_size is not None:
            items = pieces(items, _splitter(embedder, chunk_size, chunk_overlap, chunk_unit))
        if dry_run:
            return look(items, target, embedder, notes)
        stream: Stream = partial(_local, embedder)
        if engine == "ray":
            from vllm_embed.ray import stream as ray_stream  # noqa: PLC0415 - extra

            stream = stack.enter_context(ray_stream(embedder.settings, workers=workers))
        work = Work(target, embedder, notes, Path(rejects) if rejects else target.rejects, overwrite=overwrite)
        stack.callback(work.close)
        return work.run(
            items, reader, stream, whole=limit is None, chunked=chunk_size is not None, prune=prune, tell=on_progress
        )


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
    with Embedder(embedder.settings, blank_text="send") as plain:  # no text at all has its prompt and special tokens
        extra, limit = plain.count(""), plain.limit()
    if size + extra > limit and embedder.settings.long_text == "error":
        raise ConfigurationError(
            f"chunk_size={size} tokens and {extra} for the prompt and special tokens are over the model's limit of "
            f"{limit}: at most {limit - extra}"
        )
    return Splitter(size, overlap, lambda text: embedder.count(text) - extra)
