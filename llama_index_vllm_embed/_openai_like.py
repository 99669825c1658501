"""What of an `OpenAILikeEmbedding` carries over."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

__all__ = ["options_of"]

_NO_KEYS = ("fake", "")
"""What people give where the class insists on a key and the server has none."""


def options_of(embedding: OpenAILikeEmbedding) -> dict[str, Any]:
    """Our options for what it was told. `embed_batch_size`, its request size, becomes ours when it is not the default."""
    base_url = embedding.api_base
    if not base_url or "api.openai.com" in base_url:
        raise ConfigurationError(
            "this OpenAILikeEmbedding points at OpenAI itself (no api_base); vLLM serves no OpenAI model. Make a "
            'VLLMEmbedding(model="...", base_url="http://localhost:8000/v1") instead'
        )
    options: dict[str, Any] = {
        "model": embedding.model_name,
        "base_url": base_url,
        "dimensions": embedding.dimensions,
        "callback_manager": embedding.callback_manager,
    }
    if embedding.api_key not in _NO_KEYS:
        options["api_key"] = embedding.api_key
    if embedding.default_headers:
        options["default_headers"] = embedding.default_headers
    if embedding.timeout != type(embedding).model_fields["timeout"].default:
        options["timeout"] = embedding.timeout
    if embedding.max_retries != type(embedding).model_fields["max_retries"].default:
        options["max_retries"] = embedding.max_retries
    ours = ("encoding_format", "dimensions")
    body = {name: value for name, value in embedding.additional_kwargs.items() if name not in ours}
    body = {**body, **(body.pop("extra_body", None) or {})}
    headers = body.pop("extra_headers", None)
    if headers:
        options["default_headers"] = {**headers, **options.get("default_headers", {})}
    if body:
        options["extra_body"] = body
    lost = [
        name
        for name, value in (
            ("http_client", embedding._http_client),  # noqa: SLF001 - it has no public name
            ("async_http_client", embedding._async_http_client),  # noqa: SLF001
            ("api_version", embedding.api_version),
            ("embeddings_cache", embedding.embeddings_cache),
            ("rate_limiter", embedding.rate_limiter),
        )
        if value
    ]
    if lost:
        warnings.warn(
            f"not carried over, no counterpart in VLLMEmbedding: {', '.join(lost)}", UserWarning, stacklevel=3
        )
    return options
