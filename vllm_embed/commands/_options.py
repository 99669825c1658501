"""Options that several commands share: every setting by its name, made from `Settings`, and those of jobs."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import os
import types
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import typer

from vllm_embed.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["job_options", "setting_options", "with_options"]

_LEFT_OUT: Final = frozenset({"http_client", "show_progress"})
"""No text can name a client; progress is shown at a terminal."""
_ENVIRONMENT: Final = {"base_url": "VLLM_BASE_URL", "api_key": "VLLM_API_KEY"}
_PANEL: Final = "Settings of the embedder"


def with_options(*templates: Callable[..., object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets the options of the templates, and those that were given as its `**options`."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in _parameters(command) if p.kind is not p.VAR_KEYWORD]
        more = [parameter for template in templates for parameter in _parameters(template)]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            shared = {p.name: arguments.pop(p.name) for p in more}
            command(**arguments, **{name: value for name, value in shared.items() if value is not None})

        run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *more]}
        del run.__wrapped__
        return run

    return extend


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [p.replace(annotation=hints.get(p.name)) for p in inspect.signature(function).parameters.values()]


def setting_options(**_: Any) -> None:
    """A template: every setting as an option of the same name."""


def job_options(
    *,
    text_column: Annotated[
        str | None, typer.Option(show_default=False, help='Column of the text. Default: "text", or the only one.')
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(show_default=False, help='Column of the id. Default: "id", else file and line.')
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", show_default=False, help="Carry only this one along; repeat it.")
    ] = None,
    format: Annotated[  # noqa: A002 - what users call it
        Literal["text", "lines", "jsonl", "csv", "tsv", "parquet"] | None,
        typer.Option(
            show_default=False,
            help="What every input is. Default: by its ending; standard input by its first line.",
        ),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(show_default=False, help="Of text. Default: UTF-8, or a guess, which is told.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Split texts into pieces of at most so much.")
    ] = None,
    chunk_overlap: Annotated[
        int | None, typer.Option(min=0, show_default=False, help="How much, about, a piece repeats of the last.")
    ] = None,
    chunk_unit: Annotated[
        Literal["tokens", "characters"] | None,
        typer.Option(
            show_default=False,
            help="Of both. Default: tokens, counted by the server: one small request a piece.",
        ),
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(show_default=False, help="File for rows that cannot be embedded. Default: beside the output."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, show_default=False, help="Read so many rows only.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, embed a sample to tell the time, and write nothing.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Take rows out of the output that the input no longer has.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the output and start anew.")] = False,
    engine: Annotated[
        Literal["local", "ray"] | None, typer.Option(show_default=False, help="Who embeds. Default: local.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, show_default=False, help="Ray actors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """A template: what a job can be told."""


def _setting(name: str, annotation: Any, told: str) -> inspect.Parameter:
    """One setting as an option; None means that it was not given."""
    kinds = [kind for kind in _flat(annotation) if kind is not type(None)]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    extra: dict[str, Any] = {"help": told, "show_default": False, "rich_help_panel": _PANEL}
    if name in _ENVIRONMENT:
        extra["envvar"] = _ENVIRONMENT[name]
    value: Any = str
    if name == "base_url":
        value = list[str]
    elif choices:
        value = Literal[(*choices, *(["none"] if name == "unicode" else []))]
    elif any(getattr(kind, "__origin__", kind) is dict for kind in kinds):
        extra |= {"parser": functools.partial(_object, name), "metavar": "JSON"}
        value = dict
    elif bool in kinds and str in kinds:
        extra["metavar"] = "FILE|false"
    elif len(kinds) == 1 and kinds[0] in (bool, int, float):
        value = kinds[0]
    option = Annotated[value | None, typer.Option(**extra)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _flat(annotation: Any) -> list[Any]:
    """The members of a union, without their validators."""
    if get_origin(annotation) is Annotated:
        return _flat(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, Union):
        return [kind for member in get_args(annotation) for kind in _flat(member)]
    return [annotation]


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise typer.BadParameter(f"no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise typer.BadParameter(f'{name} takes a JSON object, such as {{"name": "value"}}')
    return value


def _docstrings() -> dict[str, str]:
    """First lines of what stands below each field of `Settings`."""
    body = ast.parse(inspect.getsource(Settings)).body[0].body  # type: ignore[attr-defined]
    told = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            told[field.target.id] = ast.literal_eval(text.value).split("\n\n")[0]
    return told


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take the settings out of a command's options, as `Settings` wants them."""
    settings = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
    if urls := settings.get("base_url"):
        settings["base_url"] = ",".join(urls)
    if settings.get("in_process"):  # what the environment says of servers is no contradiction
        for name, variable in _ENVIRONMENT.items():
            if settings.get(name) == os.environ.get(variable):
                settings.pop(name, None)
    if settings.get("unicode") == "none":
        settings["unicode"] = None
    if str(settings.get("verify")).lower() in ("false", "0", "no"):
        settings["verify"] = False
    return settings


_told = _docstrings()
setting_options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        _setting(name, field.annotation, _told[name])
        for name, field in Settings.model_fields.items()
        if name not in _LEFT_OUT
    ]
)
setting_options.__annotations__ = {
    parameter.name: parameter.annotation
    for parameter in setting_options.__signature__.parameters.values()  # type: ignore[attr-defined]
}
