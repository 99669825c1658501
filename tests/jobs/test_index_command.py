"""`vllm-embed index` and `search`: what they print, and their exit status."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _outputs import write_lines
from typer.testing import CliRunner

from vllm_embed.cli import app
from vllm_embed.errors import ConfigurationError, FingerprintMismatchError
from vllm_embed.testing import FakeVLLMServer

ROWS = [{"id": str(number), "text": f"Fact {number} about the planets."} for number in range(20)]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FakeVLLMServer) -> str:
    """What `index` printed, having filled lancedb:store in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", ROWS)
    result = CliRunner().invoke(app, ["index", "in.jsonl", "--store", "lancedb:store", "--base-url", server.base_url])
    assert result.exit_code == 0, result.output
    return result.stdout


def search(server: FakeVLLMServer, *arguments: str):
    return CliRunner().invoke(app, ["search", *arguments, "--store", "lancedb:store", "--base-url", server.base_url])


def test_index_tells_what_it_did_and_how_to_open_the_store(filled: str) -> None:
    assert filled.startswith("lancedb:store: 20 rows. 20 embedded by fake-model in ")
    assert "\n# LangChain\n" in filled
    assert "\n# LlamaIndex\n" in filled


def test_search_prints_the_nearest_rows_with_their_cosine(filled: str, server: FakeVLLMServer) -> None:
    result = search(server, "Fact 7 about the planets.", "-k", "2")
    assert result.exit_code == 0
    assert result.stdout.startswith("1.000  7\n       Fact 7 about the planets.\n")
    assert result.stdout.count("about the planets.") == 2


def test_search_as_json_has_id_score_text_and_metadata(filled: str, server: FakeVLLMServer) -> None:
    hits = json.loads(search(server, "Fact 7 about the planets.", "--json", "-k", "1").stdout)
    assert [(hit["id"], hit["text"]) for hit in hits] == [("7", "Fact 7 about the planets.")]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert "metadata" in hits[0]


def test_search_with_another_prompt_than_the_stores_is_refused(filled: str, server: FakeVLLMServer) -> None:
    result = search(server, "Fact 7", "--document-prompt", "passage: ")
    assert isinstance(result.exception, FingerprintMismatchError)


def test_search_in_a_store_that_is_not_there_says_so(
    server: FakeVLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = search(server, "anything")
    assert isinstance(result.exception, ConfigurationError)
    assert "vllm-embed index" in str(result.exception)
