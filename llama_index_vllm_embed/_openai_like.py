"""What of an `OpenAILikeEmbedding` carries over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_embed._migrate import request_options, require_vllm, warn_of

if TYPE_CHECKING:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

__all__ = ["options_of"]

_NO_KEYS = ("fake", "")
"""What people give where the class insists on a key and the server has none."""

_UNLESS_DEFAULT = {
    "embed_batch_size": "batch_size",  # its size of a request; LlamaIndex's slice stays large
    "max_retries": "max_retries",
    "timeout": "timeout",
}


def options_of(embedding: OpenAILikeEmbedding) -> dict[str, Any]:
    """Our options for what it was told; where it has its default, ours stays."""
    requests, lost = request_options(embedding.additional_kwargs, embedding.default_headers)
    options: dict[str, Any] = {
        "base_url": require_vllm(embedding.api_base, "OpenAILikeEmbedding", "VLLMEmbedding"),
        "model": embedding.model_name,
        "callback_manager": embedding.callback_manager,
        **requests,
    }
    if embedding.api_key not in _NO_KEYS:
        options["api_key"] = embedding.api_key
    fields = type(embedding).model_fields
    for theirs, ours in _UNLESS_DEFAULT.items():
        if (value := getattr(embedding, theirs)) != fields[theirs].default:
            options[ours] = value
    lost += [
        name
        for name, value in (
            ("http_client", embedding._http_client),  # noqa: SLF001 - it has no public name
            ("async_http_client", embedding._async_http_client),  # noqa: SLF001
            ("api_version", embedding.api_version),
            ("embeddings_cache (its texts were sent without their newlines)", embedding.embeddings_cache),
            ("rate_limiter (max_concurrency is the bound)", embedding.rate_limiter),
        )
        if value
    ]
    warn_of(lost, "VLLMEmbedding")
    return options
