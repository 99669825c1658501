"""What both adapters carry over from objects that speak to vLLM through the `openai` package."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["request_options", "require_vllm", "warn_of"]

_ANY_TRUNCATION = -1
"""`truncate_prompt_tokens` for the model's own limit."""


def require_vllm(base_url: str | None, theirs: str, ours: str) -> str:
    """The base URL, unless it is OpenAI's.

    Raises:
        ConfigurationError: it is, or there is none, which means the same.
    """
    if not base_url or "api.openai.com" in base_url:
        raise ConfigurationError(
            f"this {theirs} points at OpenAI itself (no base URL of a server of yours); vLLM serves no OpenAI model. "
            f'Make a {ours}(model="...", base_url="http://localhost:8000/v1") instead'
        )
    return base_url


def request_options(
    arguments: Mapping[str, Any], headers: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Our options for further arguments of `openai`'s `embeddings.create`, and the names of those without one.

    Args:
        arguments: such as `extra_body`; other names are request fields.
        headers: sent with every request; they win over `extra_headers`.
    """
    fields = {**arguments, **(arguments.get("extra_body") or {})}
    lost = [name for name in ("extra_query",) if fields.pop(name, None)]
    headers = {**(fields.pop("extra_headers", None) or {}), **(headers or {})}
    timeout = fields.pop("timeout", None)
    options: dict[str, Any] = {
        "default_headers": {str(name): str(value) for name, value in headers.items()},
        "dimensions": fields.pop("dimensions", None),
    }
    if isinstance(timeout, (int, float)):
        options["timeout"] = timeout
    elif timeout is not None:
        lost.append("timeout (give seconds)")
    for name in ("extra_body", "encoding_format"):  # base64 always
        fields.pop(name, None)
    if fields.get("truncate_prompt_tokens") == _ANY_TRUNCATION:
        del fields["truncate_prompt_tokens"]
        options["long_text"] = "truncate"
    options["extra_body"] = fields
    return {name: value for name, value in options.items() if value}, lost


def warn_of(lost: Sequence[str], ours: str) -> None:
    """Warn the caller of our caller's caller of what was left behind, if anything was."""
    if lost:
        told = f"not carried over, no counterpart in {ours}: {', '.join(lost)}"
        warnings.warn(told, UserWarning, stacklevel=4)
