"""LangChain's `Embeddings` over vLLM."""

from vllm_embed._version import __version__

try:
    import langchain_core  # noqa: F401
except ImportError as exc:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError('langchain_vllm_embed needs langchain-core: pip install "vllm-embed[langchain]"') from exc

from langchain_vllm_embed.embeddings import VLLMEmbeddings

__all__ = ["VLLMEmbeddings", "__version__"]
