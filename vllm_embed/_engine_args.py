"""What `in_process` and `engine_args` allow: pure functions of options. vLLM is not imported here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NEUTRAL", "SERVERS", "check", "deciding", "given", "key"]

NEUTRAL: dict[str, Any] = {"base_url": "http://localhost:8000/v1", "api_key": None}
"""In process, what the environment says of a server is not looked at."""

SERVERS = ("base_url", "api_key", "default_headers", "verify", "proxy", "http_client")
"""Options that mean nothing without a server."""

_TAKEN = {
    "hf_token": "it is a secret: set HF_TOKEN in the environment",
    "model": "the option model names it",
    "runner": 'it is always "pooling" here',
    "task": 'it was removed in vLLM 0.13; runner="pooling" replaced it and is set here, so leave it out',
}

_RESOURCES = frozenset(
    {
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "swap_space",
        "tensor_parallel_size",
    }
)
"""Arguments that say where and how fast, and decide no vector."""


def check(value: dict[str, Any]) -> dict[str, Any]:
    """A copy of arguments that `vllm.LLM` may be given.

    Raises:
        ValueError: naming those that are set here or gone, or lack another.
    """
    if taken := sorted(_TAKEN.keys() & value.keys()):
        raise ValueError("; ".join(f"{name!r}: {_TAKEN[name]}" for name in taken))
    if value.get("lora_request") is not None and not value.get("enable_lora"):
        raise ValueError("'lora_request': it needs \"enable_lora\": True beside it")
    return dict(value)


def given(options: Mapping[str, Any]) -> list[str]:
    """The options of a server that are set beside `in_process`."""
    return [name for name in SERVERS if options.get(name) is not None]


def deciding(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that may decide a vector: not memory, parallelism and scheduling."""
    return {name: value for name, value in sorted(arguments.items()) if name not in _RESOURCES}


def key(model: str, arguments: Mapping[str, Any]) -> str:
    """Equal for the same model and equal arguments, in whatever order they were written."""
    return json.dumps([model, arguments], sort_keys=True, default=repr)
