"""`VLLMEmbedding`: LlamaIndex's shape over the core. No loop, no retry, no HTTP."""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import Field, PrivateAttr, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from llama_index_vllm_embed._openai_like import options_of
from vllm_embed import Embedder, Settings
from vllm_embed._engine_args import deciding
from vllm_embed._lists import alists, lists

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

__all__ = ["VLLMEmbedding"]

_log = logging.getLogger("vllm_embed")

_IDENTITY = (
    "model",
    "query_prompt",
    "document_prompt",
    "dimensions",
    "dimensions_fallback",
    "normalize",
    "long_text",
    "blank_text",
    "unicode",
    "extra_body",
    "engine_args",
)
"""Settings that decide a vector. `to_dict()` holds these and nothing of transport."""

_FRAMEWORK = ("callback_manager", "embeddings_cache", "rate_limiter")
"""LlamaIndex's own run-time objects: not ours to copy, and they may not pickle."""


class VLLMEmbedding(Settings, BaseEmbedding):
    """Embeddings of a running vLLM server, or of vLLM in this process, for LlamaIndex.

    All settings are in `vllm_embed.Settings` and the README. `model_name`, `api_base`, `query_instruction` and
    `text_instruction` are understood too.

    Example:
        ```python
        from llama_index.core import Settings
        from llama_index_vllm_embed import VLLMEmbedding

        Settings.embed_model = VLLMEmbedding(model="BAAI/bge-m3", base_url="http://localhost:8000/v1")
        ```

    `to_dict()` is the identity under which `IngestionPipeline` caches vectors: what decides a vector, and nothing of
    transport, so a new key, URL or timeout embeds nothing again. A pickle, which `IngestionPipeline(num_workers=...)`
    makes, holds everything, the key too.

    Arrays instead of lists of floats, streams, counters: `.embedder`, a `vllm_embed.Embedder`.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        **Settings.aliases,
        "model_name": "model",
        "query_instruction": "query_prompt",
        "text_instruction": "document_prompt",
    }

    model_name: str = Field(default="unknown", exclude=True, description="The same as model, under LlamaIndex's name.")
    embed_batch_size: int = Field(
        default=10_000,
        gt=0,
        exclude=True,
        description="Texts that LlamaIndex hands over at once. The texts of one request are batch_size.",
    )
    num_workers: int | None = Field(default=None, exclude=True, description="Not needed: max_concurrency is the bound.")
    embeddings_cache: Any | None = Field(default=None, exclude=True, description="LlamaIndex's cache by text alone.")

    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Make the embedder, which opens nothing yet."""
        super().model_post_init(context)
        self._embedder = Embedder(self)
        self.__dict__["model_name"] = self.model or "unknown"  # frozen, as every name of a setting

    @property
    def embedder(self) -> Embedder:
        """The `vllm_embed.Embedder` behind this object."""
        return self._embedder

    @property
    def namespace(self) -> str:
        """A short stable name of what decides a vector, for caches and files; see `vllm_embed.Embedder.namespace`."""
        return self._embedder.namespace

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serializations."""
        return "VLLMEmbedding"

    def to_payload(self) -> dict[str, Any]:
        """For LlamaIndex's events: never a key or a URL."""
        return {**super().to_payload(), "dimensions": self.dimensions}

    @model_serializer(mode="wrap")
    def custom_model_dump(
        self,
        handler: SerializerFunctionWrapHandler,
        info: SerializationInfo,  # noqa: ARG002 - as LlamaIndex declares it
    ) -> dict[str, Any]:
        """LlamaIndex's dump: what decides a vector. A model of None and "auto" prompts are looked up first."""
        dumped = handler(self)
        model, prompts = self._embedder.model(), self._embedder.prompts()
        return {
            **{name: dumped[name] for name in _IDENTITY if name in dumped},
            **({"in_process": True, "engine_args": deciding(self.engine_args)} if self.in_process else {}),
            "query_prompt": prompts.query or None,
            "document_prompt": prompts.document or None,
            "model": model,
            "model_name": model,
            "class_name": self.class_name(),
        }

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As `to_dict`. What is looked up is so here: an error in a serializer comes out as pydantic's, not as ours."""
        self._look_up()
        return super().model_dump(**options)

    def model_dump_json(self, **options: Any) -> str:
        """As `to_json`."""
        self._look_up()
        return super().model_dump_json(**options)

    def _look_up(self) -> None:
        self._embedder.model()
        self._embedder.prompts()

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "embed_batch_size": self.embed_batch_size, "num_workers": self.num_workers}

    def _framework(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FRAMEWORK}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some settings changed; LlamaIndex's own objects are shared with it."""
        return super().model_copy(update={**self._framework(), **(update or {})}, deep=deep)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (cls, arguments) = super().__reduce__()
        for name, value in self._framework().items():
            try:
                pickle.dumps(value)
            except Exception:  # noqa: BLE001 - as LlamaIndex does: locks, clients, handlers of any kind
                _log.warning("%s does not pickle; the copy has the default", name)
            else:
                arguments[name] = value
        return rebuild, (cls, arguments)

    def _get_query_embedding(self, query: str) -> list[float]:
        return lists(self._embedder.embed([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return lists(self._embedder.embed([text], "document"))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return lists(self._embedder.embed(texts, "document"))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return lists(await self._embedder.aembed([query], "query"))[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return lists(await self._embedder.aembed([text], "document"))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await alists(await self._embedder.aembed(texts, "document"))

    def with_prompts(self, **prompts: str | None) -> Self:
        """A sibling with other prompts (`query`, `document`) that shares connections, queue and bound."""
        embedder = self._embedder.with_prompts(**prompts)
        changed = ("query_prompt", "document_prompt", "expect")
        sibling = self.model_copy(update={name: getattr(embedder.settings, name) for name in changed})
        sibling._embedder = embedder  # noqa: SLF001 - our own class
        return sibling

    @classmethod
    def from_openai_like(cls, embedding: OpenAILikeEmbedding, **options: Any) -> Self:
        """The same model, server, key and headers as an `OpenAILikeEmbedding` that points at vLLM.

        Args:
            embedding: the object to carry over.
            **options: settings that win over what it says.

        Raises:
            ConfigurationError: when it points at OpenAI itself.

        Warns:
            UserWarning: naming what has no counterpart here, such as its HTTP clients.
        """
        return cls(**{**options_of(embedding), **options})
