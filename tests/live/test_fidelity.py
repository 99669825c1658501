"""The same vectors as sentence-transformers gives: prompts, long texts, raw vectors, dimensions cut here."""

from __future__ import annotations

import random

import numpy as np
import pytest
from _models import variant
from _reference import LEAST_COSINE, LIMIT, PROMPTS, SENTENCES, TEXTS, Reference, cosines, of_tokens

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("one_thread")]


# --- prompts


@pytest.mark.parametrize("kind", ["query", "document"])
def test_each_way_to_give_a_prompt_is_that_prompt(live_server, reference, embed, kind):
    task = "Cluster these: "
    prefixed = {f"{kind}_prompt": PROMPTS[kind]}
    template = {f"{kind}_prompt": "title: none | text: {text} | end"}
    with (
        Embedder(**live_server.options, **prefixed) as prefix,
        Embedder(**live_server.options, **template) as around,
        prefix.with_prompts(**{kind: task}) as sibling,
    ):
        found = {
            "prefix": (embed(prefix, TEXTS, kind=kind), [PROMPTS[kind] + text for text in TEXTS]),
            "template": (embed(around, TEXTS, kind=kind), [f"title: none | text: {text} | end" for text in TEXTS]),
            "of the call": (embed(prefix, TEXTS, kind=kind, prompt=task), [task + text for text in TEXTS]),
            "template of the call": (
                embed(prefix, TEXTS, kind=kind, prompt="<{text}>"),
                [f"<{text}>" for text in TEXTS],
            ),
            "none of the call": (embed(prefix, TEXTS, kind=kind, prompt=""), TEXTS),
            "with_prompts": (embed(sibling, TEXTS, kind=kind), [task + text for text in TEXTS]),
        }
    plain = reference.encode(TEXTS)
    for mode, (vectors, sent) in found.items():
        assert cosines(vectors, reference.encode(sent)).min() >= LEAST_COSINE, mode
        if mode != "none of the call":
            assert cosines(vectors, plain).min() < 0.99, mode


@pytest.mark.parametrize("adapter", [VLLMEmbeddings, VLLMEmbedding], ids=["langchain", "llama_index"])
def test_a_sibling_of_an_adapter_has_its_own_prompts(live_server, reference, adapter):
    sibling = adapter(**live_server.options, query_prompt="never seen: ").with_prompts(**PROMPTS)
    if adapter is VLLMEmbeddings:
        query, documents = sibling.embed_query(TEXTS[0]), sibling.embed_documents(TEXTS)
    else:
        query, documents = sibling.get_query_embedding(TEXTS[0]), sibling.get_text_embedding_batch(TEXTS)
    assert cosines(query, reference.encode(TEXTS[:1], prompt=PROMPTS["query"])[0]) >= LEAST_COSINE
    assert cosines(documents, reference.encode(TEXTS, prompt=PROMPTS["document"])).min() >= LEAST_COSINE


# --- long texts

TOKENS = [1, 2, 64, 126, 127, 128, 129, 200, 252, 253, 254, 255, 256, 257, 300, 510, 511, 512, 513, 1_000, 2_500, 5_000]


def words(reference, count: int, seed: int, *, script: str) -> str:
    """A text of `count` tokens without the special ones."""
    drawn = random.Random(seed)
    if script == "English":
        known = sorted(token for token in reference.tokenizer.get_vocab() if token.isascii() and token.isalpha())
        return " ".join(drawn.choice(known) for _ in range(count))
    known = sorted(
        token for token in reference.tokenizer.get_vocab() if len(token) == 1 and "\u1100" <= token <= "\u11ff"
    )
    return " ".join(drawn.choice(known) for _ in range(count))


@pytest.mark.parametrize("script", ["English", "Korean"])
def test_truncate_is_the_vector_of_sentence_transformers_at_every_length(live_server, reference, embed, script):
    texts = [words(reference, count, count, script=script) for count in TOKENS]
    with Embedder(**live_server.options, long_text="truncate", unicode=None) as embedder:
        vectors = embed(embedder, texts)
        prompted = embed(embedder, texts, prompt="passage: ")
    assert [reference.count(text) - 2 for text in texts] == TOKENS
    found = cosines(vectors, reference.encode(texts))
    assert found.min() >= LEAST_COSINE, dict(zip(TOKENS, found, strict=True))
    assert cosines(prompted, reference.encode(texts, prompt="passage: ")).min() >= LEAST_COSINE


TIMES = [0.5, 0.9, 1.1, 1.5, 2, 3.3, 10, 50]


@pytest.mark.parametrize("spaced", [True, False], ids=["spaces", "no spaces"])
@pytest.mark.parametrize("script", ["English", "Korean"])
def test_chunk_is_the_weighted_mean_of_pieces_by_the_models_own_ids(live_server, reference, embed, script, spaced):
    sentence = SENTENCES[script]
    if not spaced:  # commas between the words: BERT reads a word of over 100 characters as one unknown
        sentence = sentence.replace(", ", ",").replace(" ", ",")
    texts = [of_tokens(reference, sentence, times * LIMIT) for times in TIMES]
    over = [reference.count(text) > LIMIT for text in texts]
    assert over == [times > 1 for times in TIMES]
    assert reference.count(texts[-1]) > 45 * LIMIT
    with Embedder(**live_server.options, long_text="chunk") as embedder:
        vectors = embed(embedder, texts)
    found = cosines(vectors, [reference.chunked(text) for text in texts])
    assert found.min() >= LEAST_COSINE, dict(zip(TIMES, found, strict=True))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for index in np.flatnonzero(~np.array(over)):  # and texts that fit are what they always are
        assert cosines(vectors[index], reference.encode([texts[index]])[0]) >= LEAST_COSINE


def test_chunk_puts_the_prompt_before_every_piece(live_server, reference):
    text = of_tokens(reference, SENTENCES["English"], 4 * LIMIT)
    with Embedder(**live_server.options, long_text="chunk", document_prompt=PROMPTS["document"]) as embedder:
        vector = embedder.embed([text])[0]
    assert cosines(vector, reference.chunked(text, PROMPTS["document"])) >= LEAST_COSINE


def test_one_word_over_every_limit_is_chunked(live_server, reference):
    """BERT reads it as unknown tokens, but vLLM would refuse it by its characters."""
    for text in ("a" * 20_000, "가나다라마" * 4_000):
        with Embedder(**live_server.options, long_text="chunk") as embedder:
            assert cosines(embedder.embed([text])[0], reference.chunked(text)) >= LEAST_COSINE


def test_a_text_of_a_million_characters_is_chunked(live_server, reference):
    """Long lines of base64 between sentences: many characters, few tokens."""
    line = "data:" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo" * 20 + " "
    text = "".join(f"{SENTENCES['English']}{number} {line}" for number in range(1_300))
    assert len(text) > 1_000_000
    with Embedder(**live_server.options, long_text="chunk") as embedder:
        vectors = embedder.embed(["before", text, "after"])
    right = [reference.encode(["before"])[0], reference.chunked(text), reference.encode(["after"])[0]]
    assert cosines(vectors, right).min() >= LEAST_COSINE


# --- raw vectors and dimensions


def test_raw_vectors_are_those_of_the_model_without_normalize(live_server, embed, tmp_path):
    with Embedder(**live_server.options, normalize=False) as embedder:
        vectors = embed(embedder, TEXTS)
    right = Reference(variant(live_server.folder, tmp_path / "raw", normalize=False)).encode(TEXTS)
    assert (np.abs(np.linalg.norm(right, axis=1) - 1) > 0.1).all()
    assert cosines(vectors, right).min() >= LEAST_COSINE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(right, axis=1), rtol=1e-4)


def test_the_mean_of_raw_vectors_is_raw(live_server, reference):
    text = of_tokens(reference, SENTENCES["English"], 3 * LIMIT)
    with Embedder(**live_server.options, normalize=False, long_text="chunk") as embedder:
        np.testing.assert_allclose(
            embedder.embed([text])[0], reference.chunked(text, normalize=False), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("width", [128, 64])
def test_dimensions_cut_here_are_truncate_dim_with_normalization(live_server, reference, embed, width):
    text = of_tokens(reference, SENTENCES["English"], 3 * LIMIT)
    options = {**live_server.options, "dimensions": width, "dimensions_fallback": "client", "long_text": "chunk"}
    with Embedder(**options) as embedder:
        vectors = embed(embedder, [*TEXTS, text])
    right = reference.encode(TEXTS, truncate_dim=width, normalize_embeddings=True)
    assert cosines(vectors[:-1], right).min() >= LEAST_COSINE
    assert cosines(vectors[-1], reference.chunked(text, width=width)) >= LEAST_COSINE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
