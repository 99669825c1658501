"""Jobs: a corpus goes in, a filled output comes out; stopped and resumed at will.

A row's identity is its id and the hash of its text, its carried columns, and of the model and settings that decide its
vector. What is in the output is skipped; a kill at any moment loses nothing and repeats nothing but what was in flight
or not yet committed; a row that cannot be embedded goes to the rejects with its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_embed.jobs._job import embed
from vllm_embed.jobs._search import search
from vllm_embed.jobs._store import Hit
from vllm_embed.jobs._stores import DEFAULT_COLLECTION as _DEFAULT_COLLECTION
from vllm_embed.jobs._stores import store_target as _store_target
from vllm_embed.jobs._summary import Progress, Summary

if TYPE_CHECKING:
    from vllm_embed.jobs._job import Inputs

__all__ = ["Hit", "Progress", "Summary", "embed", "index", "search"]


def index(inputs: Inputs, store: str, *, collection: str = _DEFAULT_COLLECTION, **options: Any) -> Summary:
    """Fill a vector store through LangChain's class for it; stopped at any moment, the same call goes on.

    `Summary.how_to_open` has the lines that open it from LangChain and LlamaIndex.

    Args:
        inputs: as in `embed`.
        store: `chroma:PATH`, `qdrant:PATH-OR-URL`, `lancedb:PATH` or `faiss:PATH`.
        collection: name of the collection or table.
        **options: as in `embed`.

    Raises:
        VLLMEmbedError: as in `embed`.
    """
    return embed(inputs, _store_target(store, collection), **options)
