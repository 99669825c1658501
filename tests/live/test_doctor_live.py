"""The doctor at real vLLM, beside references that differ from it in one thing each.

What differs is put into the reference, not into the server: the vectors differ in the same way, and
one server is enough. Servers that differ are in test_fidelity_other_servers.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from _models import chat_model
from typer.testing import CliRunner

from vllm_embed import Embedder, errors
from vllm_embed._launch import Launch
from vllm_embed._process import ServerProcess, stop
from vllm_embed.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import LiveServer

pytestmark = pytest.mark.live

needs_reference = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="NOT TESTED against sentence-transformers: pip install sentence-transformers",
)


def doctor(server: LiveServer, *arguments: str) -> tuple[int, dict[str, Any]]:
    options = ["--base-url", server.base_url, "--model", server.model]
    options += ["--api-key", server.api_key] if server.api_key else []
    result = CliRunner().invoke(app, ["doctor", "--json", *options, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def found(report: dict[str, Any], name: str) -> dict[str, str]:
    (finding,) = [finding for finding in report["findings"] if finding["id"] == name]
    return finding


def pooled_by_cls(folder: Path) -> None:
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))


def not_normalized(folder: Path) -> None:
    path = folder / "modules.json"
    path.write_text(json.dumps([module for module in json.loads(path.read_text()) if module["name"] != "2"]))


def test_the_server_is_sound(live_server: LiveServer) -> None:
    status, report = doctor(live_server)
    assert (status, report["verdict"]) == (0, "sound")
    assert not [f for f in report["findings"] if f["level"] != "info"]
    assert "384 dimensions" in found(report, "server")["text"]
    assert "[UNK]) of Japanese, emoji" in found(report, "text")["text"]
    assert "as the model says" in found(report, "normalize")["text"]
    assert "MEAN" in found(report, "pooling")["text"]
    assert "256 tokens a text; a longer one is refused" in found(report, "limit")["text"]
    assert "--hf-overrides '{\"is_matryoshka\": true}'" in found(report, "matryoshka")["fix"]
    assert "[unused" in found(report, "tiktoken")["text"]
    assert "texts/s" in found(report, "speed")["text"]


@needs_reference
def test_the_same_vectors_as_sentence_transformers(live_server: LiveServer) -> None:
    status, report = doctor(live_server, "--reference", live_server.folder)
    assert (status, report["verdict"]) == (0, "same vectors")
    assert "nearest neighbours shared 100%" in found(report, "reference")["text"]


@needs_reference
@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (pooled_by_cls, "reference-pooling", "the server pools by MEAN, the reference by CLS"),
        (not_normalized, "reference-normalize", "the server normalizes and the reference has no Normalize module"),
    ],
)
def test_the_cause_is_named(
    change: Callable[[Path], None], name: str, words: str, live_server: LiveServer, tmp_path: Path
) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(live_server.folder, folder)
    change(folder)
    status, report = doctor(live_server, "--reference", str(folder))
    assert (status, report["verdict"]) == (1, "re-index needed")
    assert report["findings"][0]["id"] == name
    assert words in report["findings"][0]["text"]


def test_a_fingerprint_of_this_server(live_server: LiveServer, tmp_path: Path) -> None:
    path = str(tmp_path / "index.json")
    with Embedder(**live_server.options) as embedder:
        embedder.fingerprint().save(path)
    status, report = doctor(live_server, "--reference", path)
    assert (status, report["verdict"]) == (0, "same vectors")


def test_a_wrong_key_is_one_finding(live_server: LiveServer) -> None:
    if not live_server.api_key:
        pytest.skip("NOT TESTED: the server at VLLM_EMBED_TEST_BASE_URL asks for no key")
    result = CliRunner().invoke(app, ["doctor", "--json", "--base-url", live_server.base_url, "--api-key", "wrong-key"])
    assert result.exit_code == 2
    assert [finding["id"] for finding in json.loads(result.stdout)["findings"]] == ["key"]
    assert "wrong-key" not in result.output


@pytest.fixture
def chat_server(tmp_path: Path) -> Iterator[str]:
    """Real vLLM that serves a chat model; 40 to 60 seconds on two cores."""
    folder = chat_model(tmp_path / "chat")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    options = ["--model", folder, "--runner", "generate", "--served-model-name", "chat", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = ServerProcess(Launch(port, tuple(command), env, "cpu"), tmp_path / "log")
    try:
        until = time.monotonic() + 300
        while not _healthy(port):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3_000:]
            assert time.monotonic() < until, "the chat model's server is not healthy after 300 s"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop([server])


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="NOT TESTED on a chat model: vLLM is not installed"
)
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_a_chat_model_is_one_finding(chat_server: str) -> None:
    for model in ([], ["--model", "chat"]):
        result = CliRunner().invoke(app, ["doctor", "--json", "--base-url", chat_server, *model])
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 2
        (finding,) = json.loads(result.stdout)["findings"]
        assert (finding["id"], finding["level"]) == ("model", "blocked")
        assert "lists 'chat', but answers 404 to /embeddings: it serves a chat model" in finding["text"]
        assert "--runner pooling" in finding["fix"]
    with Embedder(base_url=chat_server) as embedder, pytest.raises(errors.ModelNotFoundError, match="--runner pooling"):
        embedder.embed(["a"])
