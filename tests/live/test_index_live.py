"""2,000 documents in each store, searched from both frameworks: what exact search by sentence-transformers finds."""

from __future__ import annotations

import itertools
import os
import random
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vllm_embed import Embedder
from vllm_embed._stream import PAUSE
from vllm_embed.errors import ConfigurationError
from vllm_embed.info import Block
from vllm_embed.jobs import embed
from vllm_embed.jobs._search import search
from vllm_embed.jobs._stores import store_target

if TYPE_CHECKING:
    from conftest import LiveServer

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore:.*langchain-community.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:table_names:DeprecationWarning"),  # LlamaIndex asks LanceDB so
]

WHO = "the farmer, my neighbour, a young doctor, the old captain, our teacher, the engineer, a thief, the queen, \
two children, the baker, a tired nurse, the new mayor, his sister, an astronomer, the gardener, the pilot"
DID = "sold, repaired, painted, lost, borrowed, found, measured, hid, photographed, forgot, stole, cleaned, inherited"
WHAT = "a red bicycle, the wooden boat, three old books, a broken clock, the telescope, a sack of potatoes, the bank \
account, a violin, the password, an electric car, the map of the island, a vaccine, the wedding ring, a stray dog"
WHERE = (
    "near the harbour, in Berlin, on the train, before the storm, at the market, during the war, after lunch, in the \
laboratory, at midnight, behind the school, on the moon, in the mountains, last winter"
)
ASKED = "Who {did} {what}?, What happened {where}?, What about {who} {where}?, Where was {what} {did}?"

K = 10


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(", ")]


def _documents() -> list[dict[str, str]]:
    drawn = random.Random(0).sample(list(itertools.product(*map(_parts, (WHO, DID, WHAT, WHERE)))), 2_000)
    return [{"id": f"d{i}", "text": f"{' '.join(each)}.".capitalize()} for i, each in enumerate(drawn)]


def _questions() -> list[str]:
    draw, names = random.Random(1), ("who", "did", "what", "where")
    found: dict[str, None] = {}
    while len(found) < 200:
        parts = {name: draw.choice(_parts(text)) for name, text in zip(names, (WHO, DID, WHAT, WHERE), strict=True)}
        found[draw.choice(_parts(ASKED)).format(**parts)] = None
    return list(found)


DOCUMENTS, QUESTIONS = _documents(), _questions()


class Once(Embedder):
    """Gives a job the vectors that vLLM made for the job before."""

    kept: dict[str, Any]

    def stream(self, texts: Any, **options: Any) -> Any:
        for number, text in enumerate(text for text in texts if text is not PAUSE):
            yield Block(number, self.kept[text][None], {})


@pytest.fixture(scope="module")
def once(live_server: LiveServer) -> Any:
    texts = [row["text"] for row in DOCUMENTS]
    with Once(**live_server.options) as embedder:
        embedder.kept = dict(zip(texts, embedder.embed(texts), strict=True))
        yield embedder


@pytest.fixture(scope="module")
def right(live_model: str, one_thread: None) -> list[list[str]]:
    """For each question the ids of the ten documents nearest to it, by sentence-transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer = pytest.importorskip("sentence_transformers").SentenceTransformer(live_model, device="cpu")
        options = {"batch_size": 64, "normalize_embeddings": True, "show_progress_bar": False}
        rows = transformer.encode([row["text"] for row in DOCUMENTS], **options)
        questions = transformer.encode(QUESTIONS, **options)
    return [[DOCUMENTS[i]["id"] for i in np.argsort(-each)[:K]] for each in questions @ rows.T]


@pytest.fixture(scope="module", params=["chroma", "qdrant", "lancedb", "faiss"])
def filled(request: pytest.FixtureRequest, once: Once, tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = f"{request.param}:{tmp_path_factory.mktemp(request.param) / 'index'}"
    try:
        target = store_target(spec)
    except ConfigurationError as exc:
        (pytest.fail if os.environ.get("VLLM_EMBED_REQUIRE_LIVE") else pytest.skip)(f"NOT TESTED: {exc}")
    started = time.monotonic()
    summary = embed(DOCUMENTS, target, embedder=once)
    print(f"{request.param}: {len(DOCUMENTS) / (time.monotonic() - started):,.0f} rows/s")  # noqa: T201
    assert (summary.rows, summary.rejected) == (len(DOCUMENTS), 0)
    return spec


def _overlap(found: list[list[str]], right: list[list[str]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, right, strict=True)]))


def _opened(spec: str, framework: str, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("VLLM_BASE_URL", server.base_url)
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)
    names: dict[str, Any] = {}
    exec(store_target(spec).how_to_open[framework], names)
    return names


def _close(names: dict[str, Any]) -> None:
    client = getattr(names["store"], "_client", None)
    if hasattr(client, "close"):
        client.close()


def test_langchain_finds_what_exact_search_over_sentence_transformers_finds(
    filled: str, right: list[list[str]], live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _opened(filled, "LangChain", live_server, monkeypatch)
    try:
        found = [[doc.metadata["id"] for doc in names["store"].similarity_search(q, k=K)] for q in QUESTIONS]
    finally:
        _close(names)
    overlap = _overlap(found, right)
    print(f"{filled.partition(':')[0]} from LangChain: {overlap:.4f}")  # noqa: T201
    assert overlap >= 0.99


def test_llama_index_finds_what_exact_search_over_sentence_transformers_finds(
    filled: str, right: list[list[str]], live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _opened(filled, "LlamaIndex", live_server, monkeypatch)
    try:
        retriever = names["index"].as_retriever(similarity_top_k=K)
        found = [[each.metadata["id"] for each in retriever.retrieve(q)] for q in QUESTIONS]
    finally:
        _close(names)
    overlap = _overlap(found, right)
    print(f"{filled.partition(':')[0]} from LlamaIndex: {overlap:.4f}")  # noqa: T201
    assert overlap >= 0.99


def test_search_answers_the_same(filled: str, right: list[list[str]], once: Once) -> None:
    for question, ids in list(zip(QUESTIONS, right, strict=True))[::20]:
        hits = search(question, filled, k=K, embedder=once)
        assert len({hit.id for hit in hits} & set(ids)) >= K - 1
        assert sorted((hit.score for hit in hits), reverse=True) == [hit.score for hit in hits]


def test_a_job_by_vllm_itself_gives_the_same_store(
    live_server: LiveServer, once: Once, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not by the vectors that were kept."""
    spec = f"lancedb:{tmp_path_factory.mktemp('own') / 'index'}"
    summary = embed(DOCUMENTS[:300], store_target(spec), **live_server.options)
    assert (summary.embedded, summary.rows) == (300, 300)
    assert embed(DOCUMENTS[:300], store_target(spec), **live_server.options).requests == 0
    hits = search(DOCUMENTS[7]["text"], spec, k=1, embedder=once)
    assert hits[0].id == "d7"
    assert hits[0].score == pytest.approx(1, abs=1e-5)
