"""Checks of single options, in pydantic's way: the value to keep, or a ValueError that says what is allowed."""

from __future__ import annotations

import os
from typing import Any

from pydantic import SecretStr

__all__ = ["body", "key", "model", "prompt"]

_OURS = {
    "dimensions": "the option dimensions",
    "embed_dtype": "nothing: float32 is what arrives",
    "encoding_format": "nothing: base64 is what arrives",
    "endianness": "nothing: little endian is what arrives",
    "input": "the texts",
    "model": "the option model",
    "truncate_prompt_tokens": 'the option long_text="truncate"',
}
"""Request fields that extra_body may not set, and what sets them."""


def model(value: str | None) -> str | None:
    """A name that is not empty."""
    if value is not None and not value.strip():
        raise ValueError("an empty name; leave it out to take the one model that the server lists")
    return value


def key(value: Any) -> Any:
    """A key that fits into a header; an empty one is none."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        return value
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise ValueError("a key is printable ASCII; this one holds other characters")
    return SecretStr(text) if text else None


def prompt(value: str | None) -> str | None:
    """A prompt that can be sent."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError("a prompt must be valid Unicode; this one holds half a surrogate pair") from None
    return value


def body(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Request fields that are not ours to set."""
    if taken := sorted(set(value or {}) & set(_OURS)):
        raise ValueError("; ".join(f"{name!r} is set by {_OURS[name]}" for name in taken))
    return value


def expectation(value: Any) -> Any:
    """A path as str; anything else is left to its type."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value
