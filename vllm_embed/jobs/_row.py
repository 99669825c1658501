"""What a job reads: rows, and what is no row."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Reject", "Row", "kind", "sound"]


class Row(NamedTuple):
    """One text of the input."""

    id: str
    """The `id_column`'s value, else its position: `corpus.jsonl:17`, `notes.md`, with `#2` for the third piece."""
    text: str
    columns: dict[str, Any]
    """Carried along."""
    source: str
    """File, or "-" for standard input."""
    line: int
    """Line of the file, from 1; row number for Parquet and for rows given as such; 1 for a whole file."""


class Reject(NamedTuple):
    """What could not be embedded, and why."""

    source: str
    line: int
    id: str | None
    reason: str


def sound(value: Any) -> Any:
    """A value as UTF-8 can hold it: surrogate pairs joined, half pairs replaced by U+FFFD; in lists and dicts too."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [sound(item) for item in value]
    if isinstance(value, dict):
        return {sound(name): sound(item) for name, item in value.items()}
    return value


def kind(value: object) -> str:
    """What a value is, in words for a reason."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a string",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
