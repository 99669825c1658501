"""A job at a terminal: progress, summary, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

import typer

from vllm_embed.commands._options import settings_of
from vllm_embed.errors import VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_embed.jobs import Progress, Summary

__all__ = ["run"]


def run(job: Callable[..., Summary], inputs: list[str], output: str, options: dict[str, Any]) -> None:
    """Run a job, show how it goes and what it did, and exit with its status."""
    as_json = options.pop("as_json", False)
    settings = settings_of(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _progress() as tell:
            summary = job(inputs, output, **options, on_progress=tell, **settings)
    except KeyboardInterrupt:
        typer.echo("Stopped. What was embedded is in the output; the same command goes on from there.", err=True)
        raise typer.Exit(1) from None
    except VLLMEmbedError as exc:
        if as_json:
            typer.echo(json.dumps({"error": str(exc), "kind": type(exc).__name__}, ensure_ascii=False, indent=1))
        raise
    if as_json:
        typer.echo(json.dumps(summary.as_dict(), ensure_ascii=False, indent=1))
    else:
        _show(summary)
    raise typer.Exit(summary.status)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A line on stderr, at a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - not for --help
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(progress: Progress) -> None:
            left = progress.seconds_left
            parts = [
                f"{progress.written:,} rows",
                f"{progress.documents_per_s:,.0f}/s",
                f"{progress.tokens_per_s:,.0f} tokens/s",
                *([f"{progress.skipped:,} skipped"] if progress.skipped else []),
                *([f"{progress.rejected:,} rejected"] if progress.rejected else []),
                *([f"{_time(left)} left"] if left is not None else []),
            ]
            bar.update(
                task, description=", ".join(parts), total=1 if progress.share else None, completed=progress.share
            )

        yield tell


def _show(summary: Summary) -> None:
    for note in summary.notes:
        typer.echo(f"Note: {note}", err=True)
    if summary.dry_run:
        typer.echo(f"{summary.read:,} rows read: {summary.to_embed:,} texts to embed, {_counts(summary)}.")
        if summary.to_embed and summary.estimated_seconds is not None:
            typer.echo(
                f"About {_time(summary.estimated_seconds)} at the speed of the first texts. Nothing was written."
            )
        return
    speed = summary.embedded / summary.seconds if summary.seconds else 0
    typer.echo(
        f"{summary.output}: {summary.rows:,} rows. {summary.embedded:,} embedded by {summary.model} in "
        f"{_time(summary.seconds)} ({speed:,.0f}/s, {summary.tokens:,} tokens), {_counts(summary)}."
    )
    if summary.removed and not summary.pruned:
        typer.echo(f"{summary.removed:,} rows of it are not in the input any more: --prune takes them out.")
    if summary.foreign:
        typer.echo(
            f"WRONG: {summary.foreign:,} rows of it were made with another model or other settings and are not in "
            "this input: --prune takes them out."
        )
    if summary.rejects:
        typer.echo(f"{summary.rejected:,} rows could not be embedded; why is in {summary.rejects}")
    for name, lines in summary.how_to_open.items():
        typer.echo(f"\n# {name}\n{lines}")


def _counts(summary: Summary) -> str:
    counts = {
        "with the text of another": summary.same,
        "unchanged": summary.skipped,
        "replaced": summary.replaced,
        "taken out": summary.pruned,
        "rejected": summary.rejected,
    }
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing else"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
