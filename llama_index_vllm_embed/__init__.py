"""LlamaIndex's `BaseEmbedding` over vLLM."""

from vllm_embed._version import __version__

try:
    import llama_index.core  # noqa: F401
except ImportError as exc:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError('llama_index_vllm_embed needs llama-index-core: pip install "vllm-embed[llama-index]"') from exc

from llama_index_vllm_embed.embedding import VLLMEmbedding

__all__ = ["VLLMEmbedding", "__version__"]
