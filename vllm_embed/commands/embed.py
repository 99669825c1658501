"""`vllm-embed embed`: text to vectors, in files."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vllm_embed.commands._jobs import run
from vllm_embed.commands._options import job_options, setting_options, with_options

__all__ = ["embed"]


@with_options(job_options, setting_options)
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...", help="Files (.txt .md .jsonl .csv .tsv .parquet), folders (.txt .md), globs, - for stdin."
        ),
    ],
    *,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="OUT", help="x.parquet (a folder of files), x.jsonl, or x.npy (and x.ids.jsonl)."
        ),
    ],
    **options: Any,
) -> None:
    """Embed a corpus into files. Stop it at will; the same command goes on where it was.

    Rows hold id, text, embedding and the carried columns. What is in OUT is skipped; changed rows are replaced. Exit
    status: 0 done, 1 some rows were rejected or it failed, 2 misuse.
    """
    from vllm_embed import jobs  # noqa: PLC0415 - not for --help

    run(jobs.embed, inputs, output, options)
