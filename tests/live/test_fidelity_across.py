"""The same vectors in the other framework and place: from LangChain to LlamaIndex, over HTTP and in process."""

from __future__ import annotations

import importlib.util
import json
import logging
from typing import TYPE_CHECKING

import pytest
from _models import variant
from _reference import LEAST_COSINE, LIMIT, PROMPTS, SENTENCES, TEXTS, cosines, of_tokens

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder, Fingerprint
from vllm_embed.errors import FingerprintMismatchError
from vllm_embed.testing import FakeVLLMServer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT TESTED in process: vLLM is not installed"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # vLLM and torch are loaded into this process, and they warn
]

SETTINGS = {"query_prompt": PROMPTS["query"], "long_text": "truncate"}


@pytest.fixture(scope="module")
def here(live_model, tmp_path_factory):
    """Options of an engine in this process, which is kept until the last test; the model has prompts of its own."""
    folder = variant(live_model, tmp_path_factory.mktemp("models") / "prompted", prompts=PROMPTS)
    options = {"model": folder, "in_process": True, "engine_args": {"dtype": "float32"}}
    with Embedder(**options) as embedder:
        embedder.embed(["load"])
        yield options


@pytest.fixture(params=["HTTP", "in process"])
def place(request):
    """Where the vectors come from: options of an adapter or an embedder."""
    if request.param == "HTTP":
        return request.getfixturevalue("live_server").options
    return request.getfixturevalue("here")


# --- fingerprints


def saved_by(adapter, options, path: Path) -> Path:
    embeddings = adapter(**options, **SETTINGS)
    embeddings.embedder.embed(["a text of the user's"])
    embeddings.embedder.fingerprint().save(path)
    embeddings.embedder.close()
    return path


@pytest.fixture(scope="module")
def saved(live_server, tmp_path_factory):
    """By the LangChain adapter over HTTP, beside its index."""
    return saved_by(VLLMEmbeddings, live_server.options, tmp_path_factory.mktemp("index") / "index.fingerprint.json")


def test_llama_index_accepts_a_fingerprint_that_langchain_saved(place, live_server, saved, caplog):
    embedding = VLLMEmbedding(**place, **SETTINGS, expect=saved)
    with caplog.at_level(logging.INFO, logger="vllm_embed"):
        vector = embedding.get_query_embedding("mine")
    embedding.embedder.close()
    (told,) = (record.getMessage() for record in caplog.records if "expect" in record.getMessage())
    assert "the same vectors: least cosine 1" in told or "the same vectors: least cosine 0.999999" in told
    right = VLLMEmbeddings(**live_server.options, **SETTINGS).embed_query("mine")
    assert cosines(vector, right) >= LEAST_COSINE


def test_langchain_accepts_over_http_what_llama_index_saved_in_process(here, live_server, tmp_path):
    path = saved_by(VLLMEmbedding, here, tmp_path / "index.json")
    assert len(VLLMEmbeddings(**live_server.options, **SETTINGS, expect=path).embed_query("mine")) == 384


@pytest.mark.parametrize("adapter", [VLLMEmbeddings, VLLMEmbedding], ids=["langchain", "llama_index"])
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
def test_it_is_refused_with_other_settings(place, saved, adapter, options, said):
    embeddings = adapter(**{**place, **SETTINGS, **options, "expect": saved})
    embed = embeddings.embed_query if adapter is VLLMEmbeddings else embeddings.get_text_embedding
    with pytest.raises(FingerprintMismatchError, match=said):
        embed("mine")
    embeddings.embedder.close()


def test_it_is_refused_with_another_model_of_the_same_name(live_server, saved):
    with FakeVLLMServer(model=live_server.model, dimension=384) as other:
        options = {**SETTINGS, "base_url": other.base_url, "model": live_server.model, "expect": saved}
        with pytest.raises(FingerprintMismatchError, match=r"canaries' cosine"):
            VLLMEmbedding(**options).get_text_embedding("mine")


def test_another_models_fingerprint_is_refused_in_process(here, tmp_path):
    with FakeVLLMServer(dimension=384) as other:
        path = saved_by(VLLMEmbeddings, {"base_url": other.base_url}, tmp_path / "index.json")
    embedding = VLLMEmbedding(**here, **SETTINGS, expect=path)
    with pytest.raises(FingerprintMismatchError, match=r"canaries' cosine"):
        embedding.get_text_embedding("mine")
    embedding.embedder.close()


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


# --- long texts and prompts in process, as test_fidelity.py has them over HTTP


@pytest.mark.parametrize("script", SENTENCES)
def test_truncate_in_process_is_the_vector_of_sentence_transformers(here, reference, embed, script):
    texts = [of_tokens(reference, SENTENCES[script], tokens) for tokens in (1, 100, 253, 254, 255, 300, 1_000, 5_000)]
    with Embedder(**here, long_text="truncate", unicode=None) as embedder:
        assert cosines(embed(embedder, texts), reference.encode(texts)).min() >= LEAST_COSINE


@pytest.mark.parametrize("script", SENTENCES)
def test_chunk_in_process_is_the_weighted_mean_of_pieces(here, reference, embed, script):
    texts = [of_tokens(reference, SENTENCES[script], times * LIMIT) for times in (0.5, 1.1, 3.3, 10, 50)]
    with Embedder(**here, long_text="chunk") as embedder:
        assert cosines(embed(embedder, texts), [reference.chunked(text) for text in texts]).min() >= LEAST_COSINE


def test_auto_prompts_in_process_are_those_of_the_models_folder(here, reference, embed):
    with Embedder(**here, query_prompt="auto", document_prompt="auto") as embedder:
        for kind, prompt in PROMPTS.items():
            assert embedder.preview("x", kind=kind) == f"{prompt}x"
            right = reference.encode(TEXTS, prompt=prompt)
            assert cosines(embed(embedder, TEXTS, kind=kind), right).min() >= LEAST_COSINE
