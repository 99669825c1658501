"""A question in, the nearest rows of a filled store out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError, FingerprintMismatchError
from vllm_embed.fingerprint import Fingerprint
from vllm_embed.jobs._stores import DEFAULT_COLLECTION, store_at, store_target

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_embed.jobs._store import Hit

__all__ = ["search"]


def search(
    question: str,
    spec: str,
    *,
    collection: str = DEFAULT_COLLECTION,
    k: int = 5,
    embedder: Embedder | None = None,
    **settings: Any,
) -> list[Hit]:
    """The rows of a store that are nearest to a question, best first; scores are cosines.

    The fingerprint beside the store is checked first: with another model, prompt or width it answers nothing.

    Args:
        question: embedded as a query.
        spec: as for `index`: `chroma:PATH`, `qdrant:PATH-OR-URL`, `lancedb:PATH` or `faiss:PATH`.
        collection: name of the collection or table.
        k: most rows.
        embedder: ready to use; None: one is made of `settings`.
        **settings: of `Embedder`.

    Raises:
        ConfigurationError: no such store, or none that `index` filled.
        FingerprintMismatchError: the vectors in it were made otherwise.
        OutputError: it cannot be opened.
    """
    if k < 1:
        raise ConfigurationError(f"k={k}: at least 1")
    if embedder is not None and settings:
        raise ConfigurationError(f"{', '.join(settings)}: not beside embedder=, which has its settings")
    target = store_target(spec, collection)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(store_at(spec, collection)))
        with store.reported():
            there = store.exists()
        if not there:
            raise ConfigurationError(
                f"{target.name} has no collection {collection!r}: fill it with vllm-embed index first"
            )
        if not target.fingerprint.exists():
            raise ConfigurationError(
                f"{target.name} has no fingerprint at {target.fingerprint}, which tells how its vectors were made: "
                "fill it with vllm-embed index, or search from the folder that it was filled from"
            )
        if embedder is None:
            embedder = stack.enter_context(Embedder(**{**settings, "expect": str(target.fingerprint)}))
        else:
            _check(target.fingerprint, embedder, target.name)
        vector = embedder.embed([question], kind="query")[0]
        with store.reported():
            return store.nearest(vector, k)


def _check(path: Path, embedder: Embedder, name: str) -> None:
    found = embedder.fingerprint()
    comparison = Fingerprint.load(path).compare(found)
    if not comparison.same:
        raise FingerprintMismatchError(f"{name} holds other vectors than these:\n{comparison}", model=found.model)
