"""What of an `OpenAIEmbeddings` carries over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from vllm_embed._migrate import request_options, require_vllm, warn_of

if TYPE_CHECKING:
    from langchain_openai import OpenAIEmbeddings

__all__ = ["options_of"]

_SAME_MEANING = {
    "dimensions": "dimensions",
    "chunk_size": "batch_size",
    "max_retries": "max_retries",
    "show_progress_bar": "show_progress",
}
_CLIENTS = ("http_client", "http_async_client")
_NO_COUNTERPART = (
    *_CLIENTS,
    "default_query",
    "openai_organization",
    "retry_min_seconds",
    "retry_max_seconds",
    "skip_empty",
)


def options_of(embeddings: OpenAIEmbeddings) -> dict[str, Any]:
    """Our options for what it was told; only what was set by hand, so that our defaults stay ours."""
    base_url = embeddings.openai_api_base or os.environ.get("OPENAI_BASE_URL")  # as the openai package reads it
    given = embeddings.model_fields_set
    headers = {**(embeddings.headers or {}), **(embeddings.default_headers or {})}
    requests, lost = request_options(embeddings.model_kwargs, headers)
    options: dict[str, Any] = {
        "base_url": require_vllm(base_url, "OpenAIEmbeddings", "VLLMEmbeddings"),
        "model": embeddings.model,
        **requests,
        **{ours: getattr(embeddings, theirs) for theirs, ours in _SAME_MEANING.items() if theirs in given},
    }
    lost += [name for name in _NO_COUNTERPART if name in given and getattr(embeddings, name)]
    if embeddings.openai_proxy:
        options["proxy"] = embeddings.openai_proxy
        lost = [name for name in lost if name not in _CLIENTS]  # it made those itself, for the proxy
    key, timeout = embeddings.openai_api_key, embeddings.request_timeout
    if isinstance(key, SecretStr):
        options["api_key"] = key
    elif key is not None:
        lost.append("openai_api_key (a function)")
    if isinstance(timeout, (int, float)):
        options["timeout"] = timeout
    elif timeout is not None:
        lost.append("request_timeout (give seconds)")
    warn_of(lost, "VLLMEmbeddings")
    return options
