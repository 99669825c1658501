from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.register_assert_rewrite("llama_index_conformance")


@dataclass(frozen=True)
class Adapter:
    """One of the two classes, and how its framework asks it for vectors."""

    make: Callable[..., Any]
    query: Callable[[Any, str], list[float]]
    documents: Callable[[Any, list[str]], list[list[float]]]
    aquery: Callable[[Any, str], Any]
    adocuments: Callable[[Any, list[str]], Any]


_ADAPTERS = {
    "langchain": Adapter(
        VLLMEmbeddings,
        VLLMEmbeddings.embed_query,
        VLLMEmbeddings.embed_documents,
        VLLMEmbeddings.aembed_query,
        VLLMEmbeddings.aembed_documents,
    ),
    "llama_index": Adapter(
        VLLMEmbedding,
        VLLMEmbedding.get_query_embedding,
        VLLMEmbedding.get_text_embedding_batch,
        VLLMEmbedding.aget_query_embedding,
        VLLMEmbedding.aget_text_embedding_batch,
    ),
}


@pytest.fixture(params=_ADAPTERS.values(), ids=_ADAPTERS.keys())
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Each of the two adapters: what holds for one holds for the other."""
    found: Adapter = request.param
    return found


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ask(adapter, made, "query" or "documents", text or texts)`, through the sync or the async door."""

    async def awaited(adapter: Adapter, made: Any, kind: str, texts: Any) -> Any:
        return await getattr(adapter, f"a{kind}")(made, texts)

    if request.param == "async":
        return lambda *args: asyncio.run(awaited(*args))
    return lambda adapter, made, kind, texts: getattr(adapter, kind)(made, texts)
