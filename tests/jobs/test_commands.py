"""`vllm-embed embed`: its options, its words, its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from _outputs import rows_of, write_lines
from typer.testing import CliRunner

from vllm_embed import Embedder, Settings
from vllm_embed.cli import app
from vllm_embed.commands._options import setting_options, settings_of, with_options
from vllm_embed.testing import FakeVLLMServer

LEFT_OUT = {"http_client", "show_progress"}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*arguments: str, input: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:  # noqa: A002
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_embed.cli", *arguments],
        input=input,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def settings_from(*arguments: str, env: dict[str, str] | None = None) -> Settings:
    """What a command with every setting as an option makes of these."""
    taken: list[dict[str, Any]] = []
    command = typer.Typer(context_settings={"help_option_names": ["-h"]})

    @command.command()
    @with_options(setting_options)
    def show(**options: Any) -> None:
        taken.append(settings_of(options))
        assert options == {}

    result = CliRunner().invoke(command, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Settings(**taken[0])


@pytest.mark.parametrize("command", ["embed", "index", "search"])
def test_every_setting_is_an_option_of_each_command_by_its_name(command: str) -> None:
    options = {name for p in typer.main.get_command(app).commands[command].params for name in p.opts}
    wanted = {"--" + name.replace("_", "-") for name in set(Settings.model_fields) - LEFT_OUT}
    assert wanted <= options
    assert not {"--http-client", "--show-progress"} & options


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--model", "m"], "model", "m"),
        (["--base-url", "http://a/v1"], "base_url", "http://a/v1"),
        (["--base-url", "http://a/v1", "--base-url", "http://b/v1"], "base_url", ["http://a/v1", "http://b/v1"]),
        (["--in-process", "--model", "m"], "in_process", True),
        (["--no-in-process"], "in_process", False),
        (
            ["--engine-args", '{"dtype": "float32"}', "--in-process", "--model", "m"],
            "engine_args",
            {"dtype": "float32"},
        ),
        (["--query-prompt", "q: "], "query_prompt", "q: "),
        (["--document-prompt", "d: {text}"], "document_prompt", "d: {text}"),
        (["--document-prompt", ""], "document_prompt", ""),
        (["--dimensions", "8"], "dimensions", 8),
        (["--dimensions-fallback", "client"], "dimensions_fallback", "client"),
        (["--normalize"], "normalize", True),
        (["--no-normalize"], "normalize", False),
        (["--long-text", "chunk"], "long_text", "chunk"),
        (["--blank-text", "zero"], "blank_text", "zero"),
        (["--unicode", "nfkc"], "unicode", "nfkc"),
        (["--unicode", "none"], "unicode", None),
        (["--batch-size", "7"], "batch_size", 7),
        (["--max-batch-chars", "99"], "max_batch_chars", 99),
        (["--max-concurrency", "3"], "max_concurrency", 3),
        (["--timeout", "1.5"], "timeout", 1.5),
        (["--max-retries", "0"], "max_retries", 0),
        (["--retry-deadline", "0"], "retry_deadline", 0.0),
        (["--default-headers", '{"X-Team": "search"}'], "default_headers", {"X-Team": "search"}),
        (["--extra-body", '{"priority": 1}'], "extra_body", {"priority": 1}),
        (["--verify", "false"], "verify", False),
        (["--proxy", "http://proxy:3128"], "proxy", "http://proxy:3128"),
        (["--expect", "x.json"], "expect", "x.json"),
        (["--api-key", "key"], "api_key", "key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0][:2] == "--" else "",
)
def test_an_option_reaches_the_setting(arguments: list[str], name: str, value: object) -> None:
    found = getattr(settings_from(*arguments), name)
    assert (found.get_secret_value() if name == "api_key" else found) == value
    untouched = set(Settings.model_fields) - {
        name,
        *({"in_process", "model"} if "--in-process" in arguments else set()),
    }
    defaults, given = Settings(), settings_from(*arguments)
    assert all(getattr(given, other) == getattr(defaults, other) for other in untouched)


def test_each_setting_is_covered_by_the_test_above() -> None:
    marks = test_an_option_reaches_the_setting.pytestmark
    assert {case[1] for mark in marks for case in mark.args[1]} == set(Settings.model_fields) - LEFT_OUT


def test_a_path_of_certificates_is_one(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    assert settings_from("--verify", str(tmp_path / "ca.pem")).verify == str(tmp_path / "ca.pem")


def test_the_environment_gives_address_and_key_and_an_option_goes_before_it() -> None:
    env = {"VLLM_BASE_URL": "http://a/v1,http://b/v1", "VLLM_API_KEY": "of the environment"}
    found = settings_from(env=env)
    assert found.base_url == ["http://a/v1", "http://b/v1"]
    assert found.api_key.get_secret_value() == "of the environment"
    found = settings_from("--base-url", "http://c/v1", "--api-key", "k", env=env)
    assert (found.base_url, found.api_key.get_secret_value()) == ("http://c/v1", "k")


def test_a_server_of_the_environment_is_none_in_process() -> None:
    env = {"VLLM_BASE_URL": "http://a:1/v1,http://b:1/v1", "VLLM_API_KEY": "secret"}
    settings = settings_from("--in-process", "--model", "folder", env=env)
    assert settings.in_process
    assert settings.api_key is None


@pytest.mark.parametrize("command", ["embed", "index", "search"])
def test_help_is_the_manual_and_tells_no_key(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"VLLM_API_KEY": "a-secret", "COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Exit status: 0 done" in " ".join(result.output.split())
    assert "a-secret" not in result.output
    assert "VLLM_API_KEY" in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "IN"], "--output"),
        (["embed", "IN", "-o", "x.jsonl", "--batchsize", "3"], "No such option"),
        (["embed", "IN", "-o", "x.jsonl", "--batch-size", "many"], "should be a valid integer"),
        (["embed", "IN", "-o", "x.jsonl", "--long-text", "cut"], "'error', 'truncate', 'chunk'"),
        (["embed", "IN", "-o", "x.jsonl", "--extra-body", "{"], "no JSON"),
        (["embed", "IN", "-o", "x.jsonl", "--extra-body", "[1]"], "takes a JSON object"),
        (["embed", "IN", "-o", "x.jsonl", "--batch-size", "0"], "batch_size=0"),
        (["embed", "IN", "-o", "x.doc"], "its ending chooses the format"),
        (["embed", "none.csv", "-o", "x.jsonl"], "'none.csv' does not exist"),
        (["embed", "IN", "-o", "x.jsonl", "--encoding", "klingon"], "encoding='klingon'"),
        (["embed", "IN", "-o", "x.jsonl", "--text-column", "body"], "has no column 'body'"),
        (["embed", "IN", "-o", "x.jsonl", "--chunk-size", "9", "--chunk-overlap", "9"], "less than chunk_size"),
    ],
    ids=lambda value: " ".join(value[3:] or value) if isinstance(value, list) else "",
)
def test_misuse_exits_with_2_and_a_sentence(
    server: FakeVLLMServer, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    arguments = [
        str(tmp_path / "in.csv") if a == "IN" else str(tmp_path / a) if a[:2] == "x." else a for a in arguments
    ]
    done = run(*arguments, VLLM_BASE_URL=server.base_url, COLUMNS="300", TERM="dumb", NO_COLOR="1")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_fails_exits_with_1_and_a_sentence(tmp_path: Path) -> None:
    with FakeVLLMServer() as server:
        url = server.base_url
    corpus = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    arguments = ["embed", str(corpus), "-o", str(tmp_path / "x.jsonl"), "--max-retries", "0", "--model", "m"]
    done = run(*arguments, VLLM_BASE_URL=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    done = run(*arguments, "--json", VLLM_BASE_URL=url)
    assert done.returncode == 1
    assert json.loads(done.stdout)["kind"] == "ServerUnreachableError"


def test_what_is_done_exits_with_0_and_says_how_to_open_it(server: FakeVLLMServer, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in.jsonl", [{"text": f"t{n}"} for n in range(3)])
    done = run("embed", str(corpus), "-o", str(tmp_path / "x.parquet"), VLLM_BASE_URL=server.base_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "x.parquet: 3 rows. 3 embedded by fake-model in " in done.stdout
    assert f'rows = pandas.read_parquet("{tmp_path}/x.parquet")' in done.stdout


def test_rejects_exit_with_1_and_say_where_the_reasons_are(server: FakeVLLMServer, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"text,n\n" + "안녕하세요 여러분,1\n토성의 고리,2\n,3\n".encode("cp949"))
    arguments = ["embed", str(tmp_path / "in.csv"), "-o", str(tmp_path / "x.jsonl"), "--rejects", str(tmp_path / "bad")]
    done = run(*arguments, VLLM_BASE_URL=server.base_url)
    assert done.returncode == 1
    assert f"1 rows could not be embedded; why is in {tmp_path}/bad" in done.stdout
    assert "in.csv is not plain UTF-8: read as cp949" in done.stderr
    assert [row["text"] for row in rows_of(tmp_path / "x.jsonl")] == ["안녕하세요 여러분", "토성의 고리"]


@pytest.mark.parametrize(
    ("text", "texts"),
    [("one\ntwo\n", ["one", "two"]), ('{"id": 1, "text": "토성"}\n', ["토성"])],
    ids=["lines", "JSON lines"],
)
def test_standard_input_is_read(server: FakeVLLMServer, tmp_path: Path, text: str, texts: list[str]) -> None:
    done = run("embed", "-", "-o", str(tmp_path / "x.jsonl"), "--json", input=text, VLLM_BASE_URL=server.base_url)
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["rows"], summary["status"]) == (0, len(texts), 0)
    assert [row["text"] for row in rows_of(tmp_path / "x.jsonl")] == texts


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="has no terminals")
def test_at_a_terminal_progress_is_shown_and_wiped_away(server: FakeVLLMServer, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in.jsonl", [{"text": f"t{n}"} for n in range(3_000)] + [{"text": None}])
    command = ["embed", str(corpus), "-o", str(tmp_path / "x.jsonl"), "--base-url", server.base_url]
    terminal, end = os.openpty()
    shown = bytearray()

    def watch() -> None:
        with contextlib.suppress(OSError):  # the last that wrote to it is gone
            while part := os.read(terminal, 4096):
                shown.extend(part)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(
        [sys.executable, "-m", "vllm_embed.cli", *command],
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        timeout=60,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "150"},
    )
    os.close(end)
    watcher.join(30)
    os.close(terminal)
    assert done.returncode == 1
    assert "3,000 rows, " in shown.decode()
    assert " tokens/s, 1 rejected, 0.0 s left" in shown.decode()
    assert "3,000 rows. 3,000 embedded" in done.stdout


def embed(server: FakeVLLMServer, corpus: Path, output: Path, *arguments: str) -> dict:
    command = ["embed", str(corpus), "-o", str(output), "--json", "--base-url", server.base_url, *arguments]
    return json.loads(CliRunner().invoke(app, command).stdout)


def test_all_columns_are_carried_unless_some_are_named(server: FakeVLLMServer, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in.jsonl", [{"key": 7, "body": "t", "a": 1, "b": 2, "c": 3}])
    names = ["--text-column", "body", "--id-column", "key"]
    embed(server, corpus, tmp_path / "x.jsonl", *names)
    assert list(rows_of(tmp_path / "x.jsonl")[0]) == ["id", "text", "embedding", "a", "b", "c"]
    embed(server, corpus, tmp_path / "y.jsonl", *names, "--column", "a", "--column", "c")
    assert list(rows_of(tmp_path / "y.jsonl")[0]) == ["id", "text", "embedding", "a", "c"]


def test_the_options_of_a_job_reach_it(server: FakeVLLMServer, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in.log", [{"id": n, "text": f"one two {n}"} for n in range(5)])
    out = tmp_path / "x.parquet"
    as_jsonl = ["--format", "jsonl"]
    assert embed(server, corpus, out, *as_jsonl, "--dry-run")["to_embed"] == 5
    assert not out.exists()
    assert embed(server, corpus, out, *as_jsonl, "--limit", "2")["rows"] == 2
    assert embed(server, corpus, out, *as_jsonl)["skipped"] == 2
    pieces = ["--chunk-size", "7", "--chunk-overlap", "0", "--chunk-unit", "characters"]
    assert embed(server, corpus, out, *as_jsonl, *pieces)["removed"] == 5
    assert embed(server, corpus, out, *as_jsonl, *pieces, "--prune")["pruned"] == 5
    assert embed(server, corpus, out, *as_jsonl, "--overwrite", "--encoding", "ascii")["rows"] == 5
    with Embedder(base_url=server.base_url, expect=embed(server, corpus, out, *as_jsonl)["fingerprint"]) as embedder:
        assert embedder.embed(["a"]).shape == (1, 16)
