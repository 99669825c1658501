"""`vllm-embed bench`: every way is measured in turns, a peer that fails is told, and the sizes are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_embed import Settings
from vllm_embed._bench import measure, some_texts
from vllm_embed.cli import app
from vllm_embed.errors import ConfigurationError, InvalidInputError
from vllm_embed.testing import FakeVLLMServer

QUICK = ["--seconds", "0.02", "--rounds", "2"]


def bench(server: FakeVLLMServer, *arguments: str):
    return CliRunner().invoke(app, ["bench", "--base-url", server.base_url, *QUICK, *arguments])


def test_each_size_has_its_turns_and_the_default_is_first(server: FakeVLLMServer) -> None:
    told: list[str] = []
    settings = Settings(base_url=server.base_url)
    results = measure(settings, ["one", "two", "three"], seconds=0.02, rounds=2, tell=told.append)
    ours = [(result.batch_size, result.max_concurrency) for result in results if result.batch_size]
    assert ours[0] == (settings.batch_size, settings.max_concurrency)
    assert len(ours) == len(set(ours)) == 6
    assert all(len(result.runs) == 2 and result.documents_per_s > 0 for result in results)
    assert len(told) == 2 * len(results)
    assert results[0].query_ms


def test_a_peer_that_fails_is_told_and_the_others_are_measured(server: FakeVLLMServer) -> None:
    settings = Settings(base_url=server.base_url, default_headers={"X-Here": "1"}, long_text="truncate")
    results = measure(settings, ["far too long " * 200], seconds=0.02, rounds=1)
    ours = [result for result in results if result.batch_size]
    peers = [result for result in results if not result.batch_size]
    assert all(result.error is None and result.documents_per_s for result in ours)
    assert peers
    assert all(result.error and "maximum" in result.error and not result.documents_per_s for result in peers)


def test_texts_that_the_server_refuses_are_an_error(server: FakeVLLMServer) -> None:
    with pytest.raises(InvalidInputError):
        measure(Settings(base_url=server.base_url), ["far too long " * 200], seconds=0.02, rounds=1)


def test_in_process_there_is_no_server_to_measure() -> None:
    with pytest.raises(ConfigurationError, match="in_process"):
        measure(Settings(in_process=True, model="folder"), ["one"])


def test_the_made_up_texts_fit_any_model_and_are_all_different() -> None:
    texts = some_texts()
    assert len(texts) == len(set(texts)) == 20_000
    assert 200 < min(map(len, texts)) <= max(map(len, texts)) < 420


def test_the_command_prints_a_table_and_what_is_best(server: FakeVLLMServer) -> None:
    result = bench(server)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].startswith("vllm-embed, 64 texts x 16 in flight")
    assert "--batch-size" in lines[-1] or "defaults" in lines[-1]


def test_as_json_it_is_an_array_of_every_way(server: FakeVLLMServer, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    found = json.loads(bench(server, "--json", "--texts", str(tmp_path / "texts.txt")).stdout)
    assert found[0]["batch_size"] == 64
    assert {"name", "documents_per_s", "runs", "query_ms", "error"} <= found[0].keys()


@pytest.mark.parametrize("arguments", [("--batch-size", "8"), ("--max-concurrency", "2")], ids=lambda pair: pair[0])
def test_the_sizes_are_not_to_be_given(server: FakeVLLMServer, arguments: tuple[str, str]) -> None:
    result = bench(server, *arguments)
    assert result.exit_code == 2
    assert "varies" in result.output


def test_a_file_without_text_is_misuse(server: FakeVLLMServer, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n")
    assert bench(server, "--texts", str(tmp_path / "texts.txt")).exit_code == 2
