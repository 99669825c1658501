"""`IN...`: files, globs, folders and standard input, as a list of sources in a fixed order."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

__all__ = ["STDIN", "Format", "Source", "sources"]

Format = Literal["text", "lines", "jsonl", "csv", "tsv", "parquet"]

STDIN: Final = "-"

_ENDINGS: Final[dict[str, Format]] = {
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


class Source(NamedTuple):
    """One file, or standard input."""

    name: str
    """As it is told and as ids begin: the path as given, "-" for standard input."""
    path: Path | None
    """None: standard input."""
    format: Format | None
    """None: standard input, told by its first line."""


def sources(inputs: Iterable[str | os.PathLike[str]], form: Format | None = None) -> list[Source]:
    """The files that inputs stand for, each once, in the order given; those of a folder or glob sorted.

    Args:
        inputs: files, globs, folders (their .txt, .md and .markdown, below it too), folders of Parquet files named
            `*.parquet`, and "-" for standard input.
        form: what every file is, whatever it is called.

    Raises:
        ConfigurationError: an input that is not there, holds nothing, or has an unknown ending.
    """
    found: dict[str, Source] = {}
    for given in inputs:
        text = str(given)
        if text == STDIN:
            found.setdefault(STDIN, Source(STDIN, None, form))
            continue
        for path in _files(text):
            found.setdefault(path.as_posix(), Source(path.as_posix(), path, form or _format(path)))
    if not found:
        raise ConfigurationError('no input: name files, globs, folders, or "-" for standard input')
    return list(found.values())


def _files(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _below(path)
    if glob.has_magic(given):
        matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - any pattern
        files = [file for name in matched for file in ([name] if name.is_file() else [])]
        if files:
            return files
        raise ConfigurationError(f"{given!r} matches no file")
    raise ConfigurationError(f"{given!r} does not exist")


def _below(folder: Path) -> list[Path]:
    endings = [".parquet"] if folder.suffix == ".parquet" else [e for e, form in _ENDINGS.items() if form == "text"]
    hidden = (".", "_")
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    ]
    if not files:
        others = sorted({path.suffix for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS})
        hint = f"; it does hold {', '.join(others)}: name them by a glob" if others else ""
        raise ConfigurationError(f"no {', '.join(endings)} file in the folder {str(folder)!r}{hint}")
    return files


def _format(path: Path) -> Format:
    if (form := _ENDINGS.get(path.suffix.lower())) is None:
        raise ConfigurationError(
            f"{str(path)!r}: the ending {path.suffix!r} is none of {', '.join(_ENDINGS)}; say what it is with format "
            "(--format)"
        )
    return form
