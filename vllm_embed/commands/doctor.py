"""`vllm-embed doctor`: is anything about this server going to give wrong vectors?"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vllm_embed._doctor import Report

__all__ = ["doctor"]

_MARKS = {"wrong": "WRONG", "blocked": "STOPPED", "warning": "warning", "info": "info"}
_WIDTH = 116


def doctor(
    *,
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            envvar="VLLM_BASE_URL", show_default="http://localhost:8000/v1", help="The server; repeat it for replicas."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(show_default=False, help="Its model's name. Default: the one it lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", show_default=False, help="Its key, if it asks for one.")
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(show_default=False, help='What your application puts before queries; "auto", or "".')
    ] = None,
    document_prompt: Annotated[str | None, typer.Option(show_default=False, help="The same for documents.")] = None,
    dimensions: Annotated[
        int | None, typer.Option(show_default=False, help="Matryoshka width that your application asks for.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(show_default=False, help="What your application sets; default: as the model does.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 20.0,
    verify: Annotated[
        str | None, typer.Option(show_default=False, help="TLS: file of the CA that signed the server's certificate.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FOLDER|FILE.json",
            show_default=False,
            help="Compare with sentence-transformers (a model's name or folder) or with a saved fingerprint. "
            "Default: the served model's own files, where they are on this machine and under 1.5 GB.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at a running server, and say whether it is going to give wrong vectors, and what to do about it.

    Exit status: 0 sound, 1 findings that make vectors wrong, 2 could not look.
    """
    from vllm_embed._doctor import examine, misuse  # noqa: PLC0415 - httpx, numpy and pydantic, not for --help
    from vllm_embed.errors import ConfigurationError  # noqa: PLC0415
    from vllm_embed.settings import Settings  # noqa: PLC0415

    options = {
        "model": model,
        "api_key": api_key or "",
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "dimensions": dimensions,
        "normalize": normalize,
        "timeout": timeout,
        "verify": verify,
    }
    if base_url:
        options["base_url"] = ",".join(base_url)
    try:
        report = examine(Settings(**options), reference)
    except ConfigurationError as exc:
        report = misuse(exc)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), ensure_ascii=False, indent=1))
    else:
        _show(report)
    raise typer.Exit(report.status)


def _show(report: Report) -> None:
    for finding in report.findings:
        typer.echo(_wrapped(_MARKS[finding.level], finding.id, finding.text))
        if finding.fix:
            typer.echo(_wrapped("", "", f"-> {finding.fix}"))
    typer.echo(f"\nVerdict: {report.verdict}")


def _wrapped(mark: str, name: str, text: str) -> str:
    return textwrap.fill(
        text,
        width=_WIDTH,
        initial_indent=f"{mark:<9}{name:<20}",
        subsequent_indent=" " * 29,
        break_long_words=False,
        break_on_hyphens=False,
    )
