"""The clients that are compared: ours, and what people point at vLLM today.

Each is made afresh for a server, as its documentation says, with its own defaults but for what its name says. All are
told the key and the URL, so no `OPENAI_*` variable is needed or read, and all send texts as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
from fast_server import MODEL
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["BASELINE", "CLIENTS", "Client"]

_KEY = "none"
BASELINE = "langchain"
"""What the ratios are to: OpenAIEmbeddings with 128 texts a request, the size of ours that it costs least at."""


@dataclass(frozen=True)
class Client:
    """One client, ready to be measured."""

    bulk: Callable[[list[str]], Any]
    query: Callable[[str], Any]
    aquery: Callable[[str], Awaitable[Any]]
    close: Callable[[], object] = lambda: None


def _embedder(url: str, batch_size: int) -> Client:
    embedder = Embedder(model=MODEL, base_url=url, batch_size=batch_size)

    async def aquery(text: str) -> Any:
        return await embedder.aembed([text], "query")

    return Client(embedder.embed, lambda text: embedder.embed([text], "query"), aquery, embedder.close)


def _vllm_embeddings(url: str, batch_size: int) -> Client:
    ours = VLLMEmbeddings(model=MODEL, base_url=url, batch_size=batch_size)
    return Client(ours.embed_documents, ours.embed_query, ours.aembed_query, ours.embedder.close)


def _vllm_embedding(url: str, batch_size: int) -> Client:
    ours = VLLMEmbedding(model=MODEL, base_url=url, batch_size=batch_size)
    return Client(
        ours.get_text_embedding_batch, ours.get_query_embedding, ours.aget_query_embedding, ours.embedder.close
    )


def _langchain(url: str, batch_size: int) -> Client:
    peer = OpenAIEmbeddings(
        model=MODEL, base_url=url, api_key=_KEY, check_embedding_ctx_length=False, chunk_size=batch_size
    )
    return Client(peer.embed_documents, peer.embed_query, peer.aembed_query)


def _llama_index(url: str, batch_size: int) -> Client:
    peer = OpenAILikeEmbedding(model_name=MODEL, api_base=url, api_key=_KEY, embed_batch_size=batch_size)
    return Client(peer.get_text_embedding_batch, peer.get_query_embedding, peer.aget_query_embedding)


def _sdk(url: str, batch_size: int, **options: Any) -> Client:
    client = openai.OpenAI(base_url=url, api_key=_KEY)
    aclient = openai.AsyncOpenAI(base_url=url, api_key=_KEY)

    def bulk(texts: list[str]) -> list[list[float]]:
        rows: list[list[float]] = []
        for start in range(0, len(texts), batch_size):
            reply = client.embeddings.create(model=MODEL, input=texts[start : start + batch_size], **options)
            rows += [item.embedding for item in reply.data]
        return rows

    def query(text: str) -> list[float]:
        return client.embeddings.create(model=MODEL, input=text, **options).data[0].embedding

    async def aquery(text: str) -> list[float]:
        return (await aclient.embeddings.create(model=MODEL, input=text, **options)).data[0].embedding

    return Client(bulk, query, aquery, client.close)


CLIENTS: dict[str, tuple[str, Callable[[str], Client]]] = {
    "arrays": ("ours: Embedder, arrays (64)", lambda url: _embedder(url, 64)),
    "arrays-128": ("ours: Embedder, arrays (128)", lambda url: _embedder(url, 128)),
    "lists": ("ours: VLLMEmbeddings, lists (64)", lambda url: _vllm_embeddings(url, 64)),
    "lists-128": ("ours: VLLMEmbeddings, lists (128)", lambda url: _vllm_embeddings(url, 128)),
    "lists-llama-index": ("ours: VLLMEmbedding, lists (64)", lambda url: _vllm_embedding(url, 64)),
    BASELINE: ("LangChain OpenAIEmbeddings (128)", lambda url: _langchain(url, 128)),
    "langchain-1000": ("LangChain OpenAIEmbeddings (1000)", lambda url: _langchain(url, 1000)),
    "llama-index": ("LlamaIndex OpenAILikeEmbedding (10)", lambda url: _llama_index(url, 10)),
    "llama-index-100": ("LlamaIndex OpenAILikeEmbedding (100)", lambda url: _llama_index(url, 100)),
    "sdk": ("openai SDK, base64 (128)", lambda url: _sdk(url, 128)),
    "sdk-float": ("openai SDK, float (128)", lambda url: _sdk(url, 128, encoding_format="float")),
}
"""By key: what the table calls it, with the texts of one request, and how it is made. 64, 1000 and 10 are defaults."""
