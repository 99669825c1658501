"""What of an `OpenAIEmbeddings` carries over."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from langchain_openai import OpenAIEmbeddings

__all__ = ["options_of"]

_SAME_MEANING = {
    "model": "model",
    "dimensions": "dimensions",
    "chunk_size": "batch_size",
    "max_retries": "max_retries",
    "show_progress_bar": "show_progress",
}
_NO_COUNTERPART = (
    "http_client",
    "http_async_client",
    "default_query",
    "openai_organization",
    "openai_proxy",
    "retry_min_seconds",
    "retry_max_seconds",
    "skip_empty",
)


def options_of(embeddings: OpenAIEmbeddings) -> dict[str, Any]:
    """Our options for what it was told; only what was set by hand, so that our defaults stay ours."""
    base_url = embeddings.openai_api_base or os.environ.get("OPENAI_BASE_URL")
    if not base_url or "api.openai.com" in base_url:
        raise ConfigurationError(
            "this OpenAIEmbeddings points at OpenAI itself (no base_url); vLLM serves no OpenAI model. Make a "
            'VLLMEmbeddings(model="...", base_url="http://localhost:8000/v1") instead'
        )
    given = embeddings.model_fields_set
    options: dict[str, Any] = {"base_url": base_url}
    options |= {ours: getattr(embeddings, theirs) for theirs, ours in _SAME_MEANING.items() if theirs in given}
    options["model"] = embeddings.model
    lost = [name for name in _NO_COUNTERPART if name in given and getattr(embeddings, name)]
    key = embeddings.openai_api_key
    if isinstance(key, SecretStr):
        options["api_key"] = key
    elif key is not None:
        lost.append("openai_api_key (a function)")
    timeout = embeddings.request_timeout
    if isinstance(timeout, (int, float)):
        options["timeout"] = timeout
    elif timeout is not None:
        lost.append("request_timeout (give seconds)")
    headers = {**(embeddings.headers or {}), **(embeddings.default_headers or {})}
    if headers:
        options["default_headers"] = {str(name): str(value) for name, value in headers.items()}
    body = dict(embeddings.model_kwargs)
    body.pop("encoding_format", None)  # base64 always
    extra = body.pop("extra_body", None) or {}
    lost += [f"model_kwargs[{name!r}]" for name in body if name in ("extra_headers", "extra_query", "timeout")]
    body = {name: value for name, value in body.items() if name not in ("extra_headers", "extra_query", "timeout")}
    if body or extra:
        options["extra_body"] = {**body, **extra}
    if lost:
        warnings.warn(
            f"not carried over, no counterpart in VLLMEmbeddings: {', '.join(lost)}", UserWarning, stacklevel=3
        )
    return options
