"""`vllm-embed serve`: vLLM servers for embedding, from the terminal."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vllm_embed.serving import VLLMServer

__all__ = ["serve"]

_EXAMPLE = """
# LangChain
from langchain_vllm_embed import VLLMEmbeddings
embeddings = VLLMEmbeddings(model={model!r}, base_url={url!r})
vectors = embeddings.embed_documents(["A GPU is fed by many requests."])

# LlamaIndex
from llama_index_vllm_embed import VLLMEmbedding
embed_model = VLLMEmbedding(model={model!r}, base_url={url!r})
vectors = embed_model.get_text_embedding_batch(["A GPU is fed by many requests."])
"""


def serve(
    model: Annotated[str, typer.Argument(help="Name on the hub, or a folder.")],
    vllm_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM ARGS", help="After --: options of `vllm serve`.")
    ] = None,
    *,
    replicas: Annotated[
        int, typer.Option(min=1, help="Servers: one for each GPU, or several that share one, or the CPU.")
    ] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the first replica, the others follow; 0 picks free ones.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_API_KEY",
            show_default=False,
            help="What clients must send. Others see it in `ps` when it is here.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name for requests, MODEL when not given.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision: auto, float16, bfloat16, float32.", show_default=False)
    ] = None,
) -> None:
    """Start vLLM for embedding, wait until it is healthy, show how to use it, and stop it all on Ctrl-C.

    Exit status: 0 after Ctrl-C or SIGTERM, 1 when a server failed to start or ended, 2 for misuse.
    """
    from vllm_embed.serving import VLLMServer  # noqa: PLC0415 - httpx and pydantic, not for --help

    if vllm_args and not vllm_args[0].startswith("-"):
        raise typer.BadParameter(
            f"{vllm_args[0]!r}: options of vLLM's follow --, as in: serve MODEL -- --enforce-eager"
        )
    try:
        _stop_on_signals()
        with VLLMServer(
            model,
            replicas=replicas,
            host=host,
            port=port,
            api_key=api_key,
            served_model_name=served_model_name,
            dtype=dtype,
            vllm_args=vllm_args or (),
            on_progress=lambda line: typer.echo(line, err=True),
        ) as server:
            _introduce(server, with_key=bool(api_key))
            server.wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)


def _stop_on_signals() -> None:
    """Let every signal that asks us to go end the `with` block, as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, signal.default_int_handler)


def _introduce(server: VLLMServer, *, with_key: bool) -> None:
    typer.echo(f"{server.model_name} is served at")
    for url in server.base_urls:
        typer.echo(f"  {url}")
    if with_key:
        typer.echo("\n# the key is read from the environment: export VLLM_API_KEY=...", nl=False)
    typer.echo(_EXAMPLE.format(model=server.model_name, url=server.base_url))
    typer.echo(f"Logs: {', '.join(map(str, server.log_paths))}\nCtrl-C stops it.", err=True)
