"""The `vllm-embed` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_embed._version import __version__
from vllm_embed.commands.bench import bench
from vllm_embed.commands.demo import demo
from vllm_embed.commands.doctor import doctor
from vllm_embed.commands.embed import embed
from vllm_embed.commands.index import index, search
from vllm_embed.commands.serve import serve
from vllm_embed.errors import ConfigurationError, VLLMEmbedError

__all__ = ["app", "main"]

app = typer.Typer(
    name="vllm-embed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold a key
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(demo)
app.command()(doctor)
app.command()(embed)
app.command()(index)
app.command()(search)
app.command()(bench)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vllm-embed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Make vLLM the embedding backend of LangChain and LlamaIndex: text in, the right vectors out."""


def main() -> None:
    """Run the command; exit 0 done, 1 failed, 2 misuse. An error of ours is a sentence, not a traceback."""
    try:
        app()
    except VLLMEmbedError as exc:
        typer.echo(f"Error: {exc}", err=True)
        sys.exit(2 if isinstance(exc, ConfigurationError) else 1)


if __name__ == "__main__":
    main()
