"""The vectors are those of sentence-transformers, whatever the text and whichever method embeds it.

The model is all-MiniLM-L6-v2. Where it cuts a text is said in four places: `tokenizer.json` has a truncation (and a
fixed padding) at 128 tokens, `tokenizer_config.json` a length of 512, the position embeddings end at 512, and
`sentence_bert_config.json` says `max_seq_length: 256`. sentence-transformers takes the last and sets its tokenizer to
it; vLLM derives its `max_model_len` from it too, and cuts there with `truncate_prompt_tokens: -1`. So both embed the
first 254 tokens between [CLS] and [SEP], and the texts here stand on both sides of 128 and of 256. vLLM (0.32) also
refuses a text by its characters, here over 4,608, before it counts tokens; not so where it is told to truncate.
"""

from __future__ import annotations

import asyncio
import unicodedata
from pathlib import Path

import httpx
import llama_index.core
import numpy as np
import pytest

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder
from vllm_embed.errors import AuthenticationError, InputTooLongError, ModelNotFoundError, ServerStatusError

pytestmark = pytest.mark.live

LEAST_COSINE = 0.99999

_CODE = 'def greet(name: str) -> None:\n\tif name:\n\t\tprint(f"hello, {name}")\r\n\treturn None\n'
_LONG = " ".join(f"Paragraph {number} tells of rivers, bridges and the people who cross them." for number in range(120))

TEXTS = {
    "English": ("Saturn has rings of ice and rock.", "Saturn has rings of ice and rock."),
    "Korean, NFC": ("서울은 대한민국의 수도이다.", "서울은 대한민국의 수도이다."),
    "Korean, NFD as from macOS": (
        unicodedata.normalize("NFD", "서울은 대한민국의 수도이다."),
        "서울은 대한민국의 수도이다.",
    ),
    "Japanese": ("東京は日本の首都です。", "東京は日本の首都です。"),
    "Arabic": ("القاهرة هي عاصمة مصر.", "القاهرة هي عاصمة مصر."),
    "accents, NFD": ("Cafe\u0301 cre\u0300me, s'il vous plai\u0302t", "Café crème, s'il vous plaît"),
    "emoji with joiners": ("A family 👨‍👩‍👧‍👦 under a flag 🏳️‍🌈", "A family 👨‍👩‍👧‍👦 under a flag 🏳️‍🌈"),
    "code with tabs and newlines": (_CODE, _CODE),
    "over 128 tokens": (_LONG[:900], _LONG[:900]),
    "over 256 tokens": (_LONG, _LONG),
    "a word of 10,000 characters": ("a" * 10_000, "a" * 10_000),
    "10,000 characters without a space": ("가나다라마" * 2_000, "가나다라마" * 2_000),
    "words after 5,000 characters": ("a" * 5_000 + " hello world", "a" * 5_000 + " hello world"),
    "words after 5,000 blanks": ("hello" + " " * 5_000 + "world", "hello" + " " * 5_000 + "world"),
    "empty": ("", ""),
    "blank": (" \t\n ", " \t\n "),
    "NULs": ("zero\0 and\0\0 zero\0", "zero and zero"),
    "a BOM": ("\ufeffThe first line of a file.", "The first line of a file."),
    "a lone high surrogate": ("half \ud83d of an emoji", "half \ufffd of an emoji"),
    "a lone low surrogate at the end": ("the other half is lost \ude00", "the other half is lost \ufffd"),
    "a surrogate pair": ("a whole \ud83d\ude00 emoji", "a whole 😀 emoji"),
}
"""Each text, and what is left of it after the cleaning that is promised: written out, not computed."""


SENT = [text for text, _ in TEXTS.values()]
CLEANED = [cleaned for _, cleaned in TEXTS.values()]


class Made:
    """Both adapters and the embedder, with the same settings."""

    def __init__(self, server, **options):
        options = {**server.options, "long_text": "truncate", **options}
        self.langchain = VLLMEmbeddings(**options)
        self.llama_index = VLLMEmbedding(**options)
        self.embedder = Embedder(**options)


def _awaited(method, *arguments):
    async def call():
        return await method(*arguments)

    return asyncio.run(call())


OF_ONE_TEXT = {
    "embed_query": lambda made, text: made.langchain.embed_query(text),
    "aembed_query": lambda made, text: _awaited(made.langchain.aembed_query, text),
    "get_query_embedding": lambda made, text: made.llama_index.get_query_embedding(text),
    "aget_query_embedding": lambda made, text: _awaited(made.llama_index.aget_query_embedding, text),
    "get_text_embedding": lambda made, text: made.llama_index.get_text_embedding(text),
    "aget_text_embedding": lambda made, text: _awaited(made.llama_index.aget_text_embedding, text),
}
OF_TEXTS = {
    "embed_documents": lambda made, texts: made.langchain.embed_documents(texts),
    "aembed_documents": lambda made, texts: _awaited(made.langchain.aembed_documents, texts),
    "get_text_embedding_batch": lambda made, texts: made.llama_index.get_text_embedding_batch(texts),
    "aget_text_embedding_batch": lambda made, texts: _awaited(made.llama_index.aget_text_embedding_batch, texts),
    "Embedder.embed": lambda made, texts: made.embedder.embed(texts),
    "Embedder.aembed": lambda made, texts: _awaited(made.embedder.aembed, texts),
    "Embedder.stream": lambda made, texts: np.vstack([block.vectors for block in made.embedder.stream(iter(texts))]),
}


@pytest.fixture(scope="module")
def made(live_server):
    return Made(live_server)


@pytest.fixture
def embeddings(live_server):
    return VLLMEmbeddings(**live_server.options)


def cosine(one, other):
    return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("method", OF_ONE_TEXT)
def test_the_vector_of_one_text(made, encode, method, name):
    text, cleaned = TEXTS[name]
    assert cosine(OF_ONE_TEXT[method](made, text), encode(cleaned)) >= LEAST_COSINE


@pytest.mark.parametrize("method", OF_TEXTS)
def test_the_vectors_of_all_texts_in_one_call(made, encode, method):
    vectors = OF_TEXTS[method](made, SENT * 5)  # more than one request, and their order matters
    wrong = {
        name: cosine(vector, encode(cleaned))
        for name, vector, cleaned in zip(list(TEXTS) * 5, vectors, CLEANED * 5, strict=True)
        if cosine(vector, encode(cleaned)) < LEAST_COSINE
    }
    assert wrong == {}


def test_the_texts_are_far_enough_apart_for_parity_to_mean_something(encode):
    """Of two texts that clean to different ones, only those that BERT itself reads alike may be near."""
    near = {
        (one, other)
        for one in TEXTS
        for other in TEXTS
        if one < other
        and TEXTS[one][1] != TEXTS[other][1]
        and cosine(encode(TEXTS[one][1]), encode(TEXTS[other][1])) > 0.99
    }
    read_alike = {"empty", "blank"}, {"a word of 10,000 characters", "10,000 characters without a space"}
    assert all({one, other} in read_alike for one, other in near)


@pytest.mark.parametrize("kind", ["query", "document"])
def test_a_prompt_is_the_prompt_of_sentence_transformers(live_server, encode, kind):
    prompt, text = "Represent this sentence for searching relevant passages: ", TEXTS["English"][0]
    prompted = Made(live_server, **{f"{kind}_prompt": prompt})
    right, without = encode(text, prompt=prompt), encode(text)
    assert cosine(right, without) < 0.99
    for method, embed in OF_ONE_TEXT.items():
        asks = "query" if "query" in method else "document"
        assert cosine(embed(prompted, text), right if asks == kind else without) >= LEAST_COSINE, method
    for method, embed in OF_TEXTS.items():
        (vector,) = embed(prompted, [text])
        assert cosine(vector, right if kind == "document" else without) >= LEAST_COSINE, method


def test_a_template_puts_the_text_in_its_middle(live_server, encode):
    embeddings = VLLMEmbeddings(**live_server.options, query_prompt="title: none | text: {text} | end")
    right = encode("title: none | text: Saturn has rings. | end")
    assert cosine(embeddings.embed_query("Saturn has rings."), right) >= LEAST_COSINE


def test_vectors_are_of_unit_length_and_of_the_models_width(made):
    vectors = made.embedder.embed(SENT)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(SENT), 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_the_line_that_people_have_runs_with_only_the_class_changed(live_server, encode):
    vector = VLLMEmbeddings(
        model=live_server.model, openai_api_base=live_server.base_url, openai_api_key=live_server.api_key
    ).embed_query("A sentence to encode.")
    assert cosine(vector, encode("A sentence to encode.")) >= LEAST_COSINE


def test_the_line_that_people_have_runs_in_llama_index_too(live_server, encode):
    vector = VLLMEmbedding(
        model_name=live_server.model, api_base=live_server.base_url, api_key=live_server.api_key
    ).get_text_embedding("A sentence to encode.")
    assert cosine(vector, encode("A sentence to encode.")) >= LEAST_COSINE


TOKEN_IDS = {
    "A sentence to encode.": [32, 11914, 311, 16559, 13],
    "How do I reset my password?": [4438, 656, 358, 7738, 856, 3636, 30],
}
"""By tiktoken's cl100k_base, which OpenAIEmbeddings takes for a model that it does not know."""


@pytest.mark.parametrize("text", TOKEN_IDS)
def test_token_ids_of_another_tokenizer_give_a_vector_of_something_else(live_server, embeddings, encode, text):
    """What OpenAIEmbeddings sends by default, and we never do: vLLM takes the ids for its own model's."""
    reply = httpx.post(
        f"{live_server.base_url}/embeddings",
        json={"model": live_server.model, "input": [TOKEN_IDS[text]]},
        headers={"Authorization": f"Bearer {live_server.api_key}"} if live_server.api_key else {},
    ).raise_for_status()
    assert cosine(reply.json()["data"][0]["embedding"], encode(text)) < 0.5
    assert cosine(embeddings.embed_query(text), encode(text)) >= LEAST_COSINE


@pytest.mark.filterwarnings("ignore")  # openai's own
def test_openai_embeddings_as_commonly_set_up_falls_into_that_trap(live_server, encode, monkeypatch):
    openai = pytest.importorskip("langchain_openai", reason='NOT TESTED: pip install "vllm-embed[openai]"')
    tiktoken_data = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"  # no download
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_data))
    theirs = openai.OpenAIEmbeddings(
        model=live_server.model, base_url=live_server.base_url, api_key=live_server.api_key or "EMPTY"
    )
    text = "A sentence to encode."
    assert cosine(theirs.embed_query(text), encode(text)) < 0.5
    assert cosine(VLLMEmbeddings.from_openai(theirs).embed_query(text), encode(text)) >= LEAST_COSINE


def test_a_wrong_key_is_told_after_one_request(live_server):
    if not live_server.api_key:
        pytest.skip("NOT TESTED: the server that VLLM_EMBED_TEST_BASE_URL names asks for no key")
    embeddings = VLLMEmbeddings(**{**live_server.options, "api_key": "sk-a-wrong-key"})
    with pytest.raises(AuthenticationError, match=r"401 Unauthorized.*VLLM_API_KEY") as caught:
        embeddings.embed_query("x")
    assert embeddings.embedder.stats().requests == 1
    assert "sk-a-wrong-key" not in str(caught.value)


def test_an_unknown_model_is_told_after_one_request(live_server):
    embeddings = VLLMEmbeddings(**{**live_server.options, "model": "BAAI/bge-m3"})
    with pytest.raises(ModelNotFoundError, match=r"BAAI/bge-m3.* does not exist.*/v1/models"):
        embeddings.embed_query("x")
    assert embeddings.embedder.stats().requests == 1


def test_texts_over_the_limit_are_named_with_it_and_the_others_are_kept(embeddings, encode):
    texts = ["Saturn has rings.", _LONG[:4_000], "Bread rises.", _LONG[:900], _LONG]
    with pytest.raises(InputTooLongError, match=r"2 of 5 texts cannot be embedded: .*long_text=\"truncate\"") as caught:
        embeddings.embed_documents(texts)
    assert caught.value.reasons == {
        1: "at least 257 tokens, the limit is 256",
        4: f"{len(_LONG)} characters, more than the 4608 that vLLM takes for its limit of 256 tokens",
    }
    assert caught.value.indexes == (1, 4)
    assert caught.value.vectors is not None
    for index in (0, 2, 3):
        assert cosine(caught.value.vectors[index], encode(texts[index])) >= LEAST_COSINE
    assert np.isnan(caught.value.vectors[[1, 4]]).all()


def test_dimensions_of_a_model_without_them_are_explained(live_server):
    embeddings = VLLMEmbeddings(**live_server.options, dimensions=64)
    with pytest.raises(ServerStatusError, match=r"Matryoshka.*Leave dimensions out.*is_matryoshka"):
        embeddings.embed_query("a")
    native = VLLMEmbeddings(**live_server.options, dimensions=384)  # vLLM refuses it too; so it is not sent
    assert len(native.embed_query("a")) == 384


def test_info_tells_what_is_served(live_server, made):
    info = made.embedder.info()
    assert (info.model, info.dimension, info.max_model_len) == (live_server.model, 384, 256)
    assert info.endpoints[0].healthy
