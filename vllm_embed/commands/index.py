"""`vllm-embed index` and `search`: text into a vector store, and out of it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vllm_embed.commands._jobs import run
from vllm_embed.commands._options import job_options, setting_options, settings_of, with_options

__all__ = ["index", "search"]

_Store = Annotated[
    str, typer.Option(metavar="KIND:PLACE", help="chroma:PATH, qdrant:PATH-OR-URL, lancedb:PATH or faiss:PATH.")
]
_Collection = Annotated[str, typer.Option(help="Name of the collection or table in the store.")]


@with_options(job_options, setting_options)
def index(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="As in `embed`.")],
    *,
    store: _Store,
    collection: _Collection = "documents",
    **options: Any,
) -> None:
    """Fill a vector store, and print how to open it from LangChain and LlamaIndex.

    Stop it at will; the same command goes on where it was. Exit status: 0 done, 1 some rows were rejected or it
    failed, 2 misuse.
    """
    from vllm_embed import jobs  # noqa: PLC0415 - not for --help

    run(jobs.index, inputs, store, {**options, "collection": collection})


@with_options(setting_options)
def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    store: _Store,
    collection: _Collection = "documents",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many rows to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    **options: Any,
) -> None:
    """Show the rows of a store that are nearest to a question; their score is the cosine.

    Refuses a server whose vectors are not the store's. Exit status: 0 done, 1 failed, 2 misuse.
    """
    from vllm_embed import jobs  # noqa: PLC0415 - not for --help

    hits = jobs.search(question, store, collection=collection, k=k, **settings_of(options))
    if as_json:
        typer.echo(json.dumps([hit._asdict() for hit in hits], ensure_ascii=False, indent=1, default=str))
        return
    for hit in hits:
        typer.echo(f"{hit.score:.3f}  {hit.id}\n       {' '.join(hit.text.split())[:300]}")
