"""What a server gives: this client at several sizes of request, its peers, and sentence-transformers, in turns."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from vllm_embed import _address
from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_embed.settings import Settings

__all__ = ["Result", "measure", "some_texts"]

_SIZES: Final = ((64, 16), (32, 16), (128, 16), (256, 8), (64, 32), (32, 64))
"""Texts of a request, and requests in flight to each replica; the first is the default."""
_LEAST: Final = 64
_QUERIES: Final = 20
_REASON: Final = 200
_CHARS: Final = 400
_MADE: Final = 20_000


@dataclass(frozen=True)
class Result:
    """One way to embed, measured."""

    name: str
    batch_size: int | None
    """None for peers."""
    max_concurrency: int | None
    documents_per_s: float
    """Median of the rounds; 0 where it failed."""
    runs: tuple[float, ...]
    query_ms: float | None
    """Median of single queries, one after another; None where it was not measured."""
    error: str | None
    """Why a peer failed."""


class _Way:
    def __init__(
        self,
        name: str,
        embed: Callable[[list[str]], object],
        query: Callable[[str], object] | None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.name = name
        self.embed = embed
        self.query = query
        self.size = size
        self.error: str | None = None
        self._runs: list[float] = []
        self._query_ms: list[float] = []

    def turn(self, texts: list[str]) -> None:
        begin = time.perf_counter()
        self.embed(texts)
        self._runs.append(len(texts) / (time.perf_counter() - begin))
        ask = self.query
        for query in texts[:_QUERIES] if ask else ():
            begin = time.perf_counter()
            ask(query)  # type: ignore[misc]
            self._query_ms.append((time.perf_counter() - begin) * 1e3)

    def result(self) -> Result:
        speed = 0.0 if self.error else statistics.median(self._runs)
        query_ms = statistics.median(self._query_ms) if self._query_ms else None
        batch_size, max_concurrency = self.size or (None, None)
        return Result(self.name, batch_size, max_concurrency, speed, tuple(self._runs), query_ms, self.error)


def measure(
    settings: Settings,
    texts: Sequence[str],
    *,
    seconds: float = 3.0,
    rounds: int = 3,
    reference: str | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Result]:
    """Documents a second of each way, this client's sizes first, its default the very first.

    Each way has its turn in every round, so that a machine that is busy for a while slows all of them. A turn embeds
    as many texts as the default size does in `seconds`, another part of them each time.

    Args:
        settings: of the server; their `batch_size` and `max_concurrency` are what is varied.
        texts: what to embed; repeated where they are too few.
        seconds: of one turn, about.
        rounds: turns of each.
        reference: model or folder for sentence-transformers, in this process; None: without it.
        tell: told of each turn.

    Raises:
        VLLMEmbedError: the server does not embed these texts. What a peer fails with is in its result.
    """
    if settings.in_process:
        raise ConfigurationError("bench measures a server: leave in_process out")
    endless = itertools.cycle(texts)
    with ExitStack() as stack:
        ways = [_ours(stack, settings, *size) for size in _SIZES] + _peers(settings, reference)
        ways[0].embed(list(itertools.islice(endless, _LEAST)))
        begin = time.perf_counter()
        ways[0].embed(list(itertools.islice(endless, 8 * _LEAST)))
        count = max(_LEAST, int(8 * _LEAST / (time.perf_counter() - begin) * seconds))
        for turn, way in itertools.product(range(rounds), ways):
            if way.error:
                continue
            tell(f"round {turn + 1} of {rounds}: {way.name}")
            try:
                way.turn(list(itertools.islice(endless, count)))
            except Exception as exc:
                if way.size:
                    raise
                way.error = f"{type(exc).__name__}: {exc}"[:_REASON]
    return [way.result() for way in ways]


def _ours(stack: ExitStack, settings: Settings, batch_size: int, max_concurrency: int) -> _Way:
    sizes = {"batch_size": batch_size, "max_concurrency": max_concurrency}
    embedder = stack.enter_context(Embedder(settings, **sizes, show_progress=False))
    default = (batch_size, max_concurrency) == _SIZES[0]
    return _Way(
        f"vllm-embed, {batch_size} texts x {max_concurrency} in flight",
        embedder.embed,
        (lambda text: embedder.embed([text], "query")) if default else None,
        (batch_size, max_concurrency),
    )


def _peers(settings: Settings, reference: str | None) -> list[_Way]:
    """Those that are installed, with their own defaults, but text sent as text."""
    with Embedder(settings) as embedder:
        model = embedder.model()
    url = _address.addresses(settings.base_url)[0].url
    key = settings.api_key.get_secret_value() if settings.api_key else "none"
    ways = []
    if _found("langchain_openai"):
        from langchain_openai import OpenAIEmbeddings  # noqa: PLC0415 - a peer, not a need

        options: dict[str, Any] = {"model": model, "base_url": url, "api_key": key, "check_embedding_ctx_length": False}
        peer = OpenAIEmbeddings(**options)
        ways.append(_Way("LangChain OpenAIEmbeddings", peer.embed_documents, peer.embed_query))
    if _found("llama_index.embeddings.openai_like"):
        from llama_index.embeddings.openai_like import OpenAILikeEmbedding  # noqa: PLC0415 - likewise

        other = OpenAILikeEmbedding(model_name=model, api_base=url, api_key=key)
        ways.append(_Way("LlamaIndex OpenAILikeEmbedding", other.get_text_embedding_batch, other.get_query_embedding))
    if reference is not None:
        if not _found("sentence_transformers"):
            raise ConfigurationError("reference needs sentence-transformers: pip install sentence-transformers")
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - likewise

        local = SentenceTransformer(reference)
        ways.append(_Way("sentence-transformers, here", local.encode, local.encode))
    return ways


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def some_texts() -> list[str]:
    """Paragraphs of the English texts that ship with the package, each with another number: no two are the same.

    Of at most 400 characters, which is about 90 tokens.
    """
    shipped = sorted((files("vllm_embed") / "demo").iterdir(), key=lambda file: file.name)
    paragraphs = [
        " ".join(paragraph.split())[:_CHARS]
        for file in shipped
        if file.name.endswith((".md", ".txt")) and ".ko." not in file.name
        for paragraph in file.read_text(encoding="utf8").split("\n\n")
        if len(paragraph) > _CHARS // 2
    ]
    return [f"{number}. {paragraphs[number % len(paragraphs)]}" for number in range(_MADE)]
