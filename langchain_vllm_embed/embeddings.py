"""`VLLMEmbeddings`: LangChain's shape over the core. No loop, no retry, no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from langchain_core.embeddings import Embeddings
from pydantic import PrivateAttr

from langchain_vllm_embed._openai import options_of
from vllm_embed import Embedder, Settings
from vllm_embed._lists import alists, lists

if TYPE_CHECKING:
    from langchain_openai import OpenAIEmbeddings

__all__ = ["VLLMEmbeddings"]


class VLLMEmbeddings(Settings, Embeddings):
    """Embeddings of a running vLLM server, or of vLLM in this process, for LangChain.

    Setup:
        ```bash
        pip install "vllm-embed[langchain]"
        vllm serve BAAI/bge-m3 --runner pooling     # where the GPU is
        export VLLM_BASE_URL=http://localhost:8000/v1
        export VLLM_API_KEY=...                     # only if the server was started with --api-key
        ```

    Key init args:
        model: Name the server knows the model by. None: the one it lists.
        base_url: The server, or a list of replicas. Default: VLLM_BASE_URL, else http://localhost:8000/v1.
        api_key: The server's key. Default: VLLM_API_KEY, else none.
        query_prompt, document_prompt: Put before each text, or a template with `{text}`.
        long_text: "error", "truncate" or "chunk".
        batch_size, max_concurrency: Texts in one request, requests in flight.

        All of them are in `vllm_embed.Settings` and the README. `openai_api_base`, `openai_api_key`, `chunk_size`,
        `request_timeout` and `show_progress_bar` are understood too.

    Instantiate:
        ```python
        from langchain_vllm_embed import VLLMEmbeddings

        embeddings = VLLMEmbeddings(model="BAAI/bge-m3")
        ```

    Embed single text:
        ```python
        vector = embeddings.embed_query("Which planet has rings?")
        ```

    Embed multiple texts:
        ```python
        vectors = embeddings.embed_documents(["Saturn has rings.", "Mars is red."])
        ```

    Async:
        ```python
        vector = await embeddings.aembed_query("Which planet has rings?")
        vectors = await embeddings.aembed_documents(["Saturn has rings.", "Mars is red."])
        ```

    Arrays instead of lists of floats, streams, counters: `embeddings.embedder`, a `vllm_embed.Embedder`.
    """

    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Make the embedder, which opens nothing yet."""
        super().model_post_init(context)
        self._embedder = Embedder(self)

    @property
    def embedder(self) -> Embedder:
        """The `vllm_embed.Embedder` behind this object."""
        return self._embedder

    @property
    def namespace(self) -> str:
        """A short stable name of what decides a vector, for caches and files; see `vllm_embed.Embedder.namespace`."""
        return self._embedder.namespace

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of documents, in order. Errors: see `vllm_embed.Embedder.embed`."""
        return lists(self._embedder.embed(texts, "document"))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return lists(self._embedder.embed([text], "query"))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of documents, in order; the event loop runs on meanwhile."""
        return await alists(await self._embedder.aembed(texts, "document"))

    async def aembed_query(self, text: str) -> list[float]:
        """The vector of a query; calls that wait at the same time share requests."""
        return lists(await self._embedder.aembed([text], "query"))[0]

    def with_prompts(self, **prompts: str | None) -> Self:
        """A sibling with other prompts (`query`, `document`) that shares connections, queue and bound."""
        embedder = self._embedder.with_prompts(**prompts)
        changed = ("query_prompt", "document_prompt", "expect")
        sibling = self.model_copy(update={name: getattr(embedder.settings, name) for name in changed})
        sibling._embedder = embedder  # noqa: SLF001 - our own class
        return sibling

    @classmethod
    def from_openai(cls, embeddings: OpenAIEmbeddings, **options: Any) -> Self:
        """The same model, server, key and batch size as an `OpenAIEmbeddings` that points at vLLM.

        Args:
            embeddings: the object to carry over.
            **options: settings that win over what it says.

        Raises:
            ConfigurationError: when it points at OpenAI itself.

        Warns:
            UserWarning: naming what has no counterpart here, such as its HTTP clients.
        """
        return cls(**{**options_of(embeddings), **options})
