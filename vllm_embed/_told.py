"""What is said of an option that cannot work: in our words, and without quoting a secret."""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["in_our_words", "told", "unknown"]

_SECRET = frozenset({"api_key", "base_url", "default_headers", "engine_args", "http_client", "proxy"})
"""Options whose values no message may quote."""

_HINTS = {
    "additional_kwargs": "extra_body takes the request fields",
    "async_http_client": "http_client (an httpx.Client) serves sync and async calls alike",
    "http_async_client": "http_client (an httpx.Client) serves sync and async calls alike",
    "headers": "did you mean default_headers?",
    "model_kwargs": "extra_body takes the request fields",
    "openai_proxy": "did you mean proxy?",
    "organization": "vLLM has no organizations; default_headers takes any header",
}


def unknown(owner: str, name: str, known: list[str]) -> str:
    """An option that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = _HINTS.get(name) or (f"did you mean {near[0]}?" if near else "see the settings table in the README")
    return f"{owner} has no option {name!r}: {hint}"


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Pydantic's error as a `ConfigurationError`; what is wrapped in it said no value that may hold a secret."""
    try:
        yield
    except ValidationError as exc:
        raise ConfigurationError(told(exc, {})) from None


def told(exc: ValidationError, options: Mapping[str, Any]) -> str:
    """A pydantic error in our words: the option, its value unless it may hold a secret, and what is allowed."""
    lines = []
    for error in exc.errors(include_url=False, include_context=False, include_input=False):
        name = str(error["loc"][0]) if error["loc"] else ""
        reason = error["msg"].removeprefix("Value error, ")
        given = f"={options[name]!r:.80}" if name in options and name not in _SECRET else ""
        line = f"{name}{given}: {reason}" if name else reason
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)
