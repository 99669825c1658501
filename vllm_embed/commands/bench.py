"""`vllm-embed bench`: this server's best size and number of requests, beside other clients."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_embed.commands._options import setting_options, settings_of, with_options

if TYPE_CHECKING:
    from vllm_embed._bench import Result

__all__ = ["bench"]


@with_options(setting_options)
def bench(
    *,
    texts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            help="File with a text a line, best your own. Default: paragraphs of about 90 tokens.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FOLDER",
            show_default=False,
            help="Also sentence-transformers with this model, on this machine.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of one measurement, about.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each client, in turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    **options: Any,
) -> None:
    """Measure a running server: documents a second at several sizes of request, beside the other clients installed.

    Other clients have their own defaults, but send text as text. Exit status: 0 done, 1 failed, 2 misuse.
    """
    from vllm_embed._bench import measure, some_texts  # noqa: PLC0415 - not for --help
    from vllm_embed.settings import Settings  # noqa: PLC0415

    for name in ("batch_size", "max_concurrency"):
        if name in options:
            raise typer.BadParameter("that is what bench varies", param_hint=f"--{name.replace('_', '-')}")
    given = some_texts() if texts is None else [line for line in texts.read_text("utf8").splitlines() if line.strip()]
    if not given:
        raise typer.BadParameter("it holds no text", param_hint="--texts")
    results = measure(
        Settings(**settings_of(options)),
        given,
        seconds=seconds,
        rounds=rounds,
        reference=reference,
        tell=(lambda line: typer.echo(line, err=True)) if sys.stderr.isatty() else lambda _: None,
    )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    else:
        _show(results)


def _show(results: list[Result]) -> None:
    default = results[0].documents_per_s
    typer.echo(f"{'':<44}{'documents/s':>12}{'ratio':>8}{'query ms':>10}")
    for result in results:
        if result.error:
            typer.echo(f"{result.name:<44}{'failed':>12}  {result.error}")
            continue
        query = f"{result.query_ms:.1f}" if result.query_ms is not None else ""
        speed, ratio = f"{result.documents_per_s:,.0f}", f"{result.documents_per_s / default:.2f}"
        typer.echo(f"{result.name:<44}{speed:>12}{ratio:>8}{query:>10}")
    best = max((result for result in results if result.batch_size), key=lambda result: result.documents_per_s)
    if best.documents_per_s > 1.05 * default:
        typer.echo(f"\nBest here: --batch-size {best.batch_size} --max-concurrency {best.max_concurrency}")
    else:
        typer.echo("\nThe defaults are as good as any here.")
