"""Jobs: a corpus goes in, a filled output comes out; stopped and resumed at will.

A row's identity is its id and the hash of its text, its carried columns, and of the model and settings that decide its
vector. What is in the output is skipped; a kill at any moment loses nothing and repeats nothing but the requests that
were in flight; a row that cannot be embedded goes to the rejects with its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_embed.jobs._job import run as _run
from vllm_embed.jobs._summary import Progress, Summary
from vllm_embed.jobs._targets import file_target as _file_target

if TYPE_CHECKING:
    import os

    from vllm_embed.jobs._job import Inputs

__all__ = ["Progress", "Summary", "embed"]


def embed(inputs: Inputs, output: str | os.PathLike[str], **options: Any) -> Summary:
    """Embed a corpus into files.

    Args:
        inputs: files (.txt, .md, .jsonl, .csv, .tsv, .parquet), globs, folders, "-" for standard input, or rows as
            mappings.
        output: `x.parquet` (a folder of files), `x.jsonl`, or `x.npy` (with `x.ids.jsonl`).
        **options: see below; every other one is a setting of `Embedder`.
    """
    return _run(inputs, _file_target(output), **options)
