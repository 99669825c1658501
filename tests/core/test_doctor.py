"""The doctor against servers that are sound, that give wrong vectors, and that cannot be looked at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_embed import Embedder
from vllm_embed._doctor_text import _difference
from vllm_embed.cli import app
from vllm_embed.testing import FakeVLLMServer, Fault
from vllm_embed.testing import _replies as replies
from vllm_embed.testing._http import Reply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "a-key-that-nobody-may-see"
_NO_EMBEDDINGS = {"message": "The model does not support Embeddings API", "type": "BadRequestError", "param": None}
CHAT = [
    Fault.status(404, body={"detail": "Not Found"}),
    Fault.status(400, body={"object": "error", **_NO_EMBEDDINGS, "code": 400}),
    Fault.status(501, body={"error": {**_NO_EMBEDDINGS, "type": "NotImplementedError", "code": 501}}),
]
"""What a chat model's vLLM answers: seen at 0.32; the route was always there before."""


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and what --json printed; no traceback, no key."""
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert KEY not in result.output
    return result.exit_code, json.loads(result.stdout)


def levels(report: dict[str, Any], level: str) -> dict[str, str]:
    return {f["id"]: f["text"] for f in report["findings"] if f["level"] == level}


@pytest.fixture
def sound(tmp_path: Path) -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(dimension=32, root=str(tmp_path / "model")) as server:
        yield server


def model_folder(path: Path, *, normalize: bool = True, pooling: str = "mean_tokens", prompts: Any = None) -> str:
    """The configs of a sentence-transformers model, without the model."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    (path / "1_Pooling").mkdir(parents=True)
    modules = [{"path": place, "type": f"sentence_transformers.models.{kind}"} for place, kind in kinds]
    (path / "modules.json").write_text(json.dumps(modules))
    config = {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if prompts:
        (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return str(path)


def test_a_sound_server_is_sound(sound: FakeVLLMServer, tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    status, report = doctor("--base-url", sound.base_url)
    assert (status, report["verdict"]) == (0, "sound")
    assert not levels(report, "wrong")
    assert not levels(report, "warning")
    found = levels(report, "info")
    assert {"server", "key", "text", "normalize", "pooling", "limit", "matryoshka", "encodings", "tiktoken"} <= set(
        found
    )
    assert "MEAN" in found["pooling"]
    assert "256 tokens" in found["limit"]
    assert "vLLM 0.32.0 serves 'fake-model'" in found["server"]


def test_the_page_for_people_says_the_same(sound: FakeVLLMServer) -> None:
    result = CliRunner().invoke(app, ["doctor", "--base-url", sound.base_url])
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("Verdict: sound")
    assert max(map(len, result.stdout.splitlines())) <= 116


def test_the_key_is_used_and_never_shown() -> None:
    with FakeVLLMServer(dimension=8, api_key=KEY) as server:
        status, report = doctor("--base-url", server.base_url, "--api-key", KEY)
    assert (status, levels(report, "info")["key"]) == (0, "the key is accepted")


# Servers that cannot be looked at: one finding, exit 2.


def tls_port(folder: Path) -> tuple[socket.socket, threading.Thread]:
    """A port that speaks TLS, and nothing more."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            *["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout"],
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), raw:
                raw.settimeout(2)
                with context.wrap_socket(raw, server_side=True):
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener, thread


def one_blocked(arguments: list[str], name: str, *words: str) -> None:
    status, report = doctor(*arguments)
    assert (status, report["verdict"]) == (2, "could not look"), report
    (finding,) = report["findings"]
    assert (finding["level"], finding["id"]) == ("blocked", name)
    assert finding["fix"]
    for word in words:
        assert word in finding["text"]


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    one_blocked(["--base-url", f"http://127.0.0.1:{port}"], "unreachable", "cannot connect", str(port))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize(("scheme", "name", "word"), [("http", "tls", "TLS"), ("https", "unreachable", "verify")])
def test_a_tls_port(scheme: str, name: str, word: str, tmp_path: Path) -> None:
    listener, thread = tls_port(tmp_path)
    try:
        one_blocked(["--base-url", f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"], name, word)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_https_to_a_plain_port(sound: FakeVLLMServer) -> None:
    address = sound.base_url.replace("http://", "https://")
    one_blocked(["--base-url", address, "--timeout", "2"], "unreachable", "http://")


class Page(FakeVLLMServer):
    """Every route answers this page."""

    page: Reply = replies.html(title="Welcome to nginx!")

    async def _handle(self, request: Any, send: Any) -> None:
        await send(self.page)


@pytest.mark.parametrize("model", [[], ["--model", "m"]], ids=["no model", "a model"])
@pytest.mark.parametrize("status", [200, 404, 502])
def test_nginx(status: int, model: list[str]) -> None:
    with Page() as server:
        server.page = replies.html(status)
        name = {200: "not-vllm", 404: "model", 502: "refused"}[status]
        one_blocked(["--base-url", server.base_url, *model], name, server.base_url)


@pytest.mark.parametrize("model", [[], ["--model", "fake-model"]], ids=["listed", "named"])
@pytest.mark.parametrize("answer", CHAT, ids=["0.32", "0.10", "0.13"])
def test_a_chat_models_vllm(answer: Fault, model: list[str], sound: FakeVLLMServer) -> None:
    sound.order(answer, times=None)
    words = "lists 'fake-model', but answers", "to /embeddings: it serves a chat model"
    one_blocked(["--base-url", sound.base_url, *model], "model", *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base-url", "ftp://gpu-0"], "base_url: a server's URL starts with http://"),
        (["--dimensions", "0"], "dimensions=0: "),
        (["--dimensions", "8", "--timeout", "-1"], "timeout=-1.0: "),
        (["--api-key", f"{KEY}\n\u00e9"], "api_key: a key is printable ASCII"),
        (["--verify", "/no/such/file.pem"], "verify='/no/such/file.pem' is not a readable file"),
    ],
    ids=["address", "dimensions", "timeout", "key", "certificates"],
)
def test_options_with_which_nothing_can_be_looked_at(arguments: list[str], words: str) -> None:
    one_blocked(arguments, "options", words)
    told = CliRunner().invoke(app, ["doctor", *arguments])
    assert told.exit_code == 2
    assert told.stdout.startswith("STOPPED  options")


@pytest.mark.parametrize("key", [[], ["--api-key", "sk-wrong"]], ids=["none", "wrong"])
def test_a_wrong_key(key: list[str]) -> None:
    with FakeVLLMServer(api_key=KEY) as server:
        one_blocked(["--base-url", server.base_url, *key], "key", "refuses the key")


def test_an_empty_model_list() -> None:
    with FakeVLLMServer(model=[]) as server:
        one_blocked(["--base-url", server.base_url], "model", "lists 0 models (none)")


def test_several_models() -> None:
    with FakeVLLMServer(model=["a", "b"]) as server:
        one_blocked(["--base-url", server.base_url], "model", "lists 2 models ('a', 'b')")
        assert doctor("--base-url", server.base_url, "--model", "b")[0] == 0
        one_blocked(["--base-url", server.base_url, "--model", "c"], "model", "'c' is not served, but 'a', 'b'")


def test_a_server_that_is_too_slow(sound: FakeVLLMServer) -> None:
    sound.order(Fault.delay(30), times=None)
    one_blocked(["--base-url", sound.base_url, "--timeout", "0.3"], "too-slow", "timeout=0.3 s")


class Slow(FakeVLLMServer):
    """Every route answers in half a minute."""

    async def _handle(self, request: Any, send: Any) -> None:
        await asyncio.sleep(30)
        await super()._handle(request, send)


def test_a_server_that_is_too_slow_in_everything() -> None:
    with Slow() as server:
        one_blocked(["--base-url", server.base_url, "--timeout", "0.3"], "too-slow", "timeout=0.3 s")


def test_a_server_that_stops_answering_midway(sound: FakeVLLMServer) -> None:
    sound.order(Fault.reset(), times=None, when=lambda body: body.get("dimensions"))
    status, report = doctor("--base-url", sound.base_url)
    assert (status, report["verdict"]) == (2, "could not look")
    assert list(levels(report, "blocked")) == ["unreachable"]
    assert "limit" in levels(report, "info")


def test_a_reference_that_is_not_there(sound: FakeVLLMServer, tmp_path: Path) -> None:
    arguments = ["--base-url", sound.base_url, "--reference", str(tmp_path / "no.json")]
    one_blocked(arguments, "reference", "no fingerprint at")


def test_a_missing_extra_says_what_to_install(sound: FakeVLLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    arguments = ["--base-url", sound.base_url, "--reference", "org/model"]
    one_blocked(arguments, "reference", "pip install sentence-transformers")
    assert not sound.requests


def test_the_models_own_files_that_cannot_be_read_are_no_obstacle(
    sound: FakeVLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the doctor compares unasked, so that it cannot is good to know and no more."""
    library = ModuleType("sentence_transformers")
    library.__spec__ = ModuleSpec("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    model_folder(tmp_path / "model")
    address = ["--base-url", sound.base_url]
    assert "reference" not in levels(doctor(*address)[1], "info")  # no weights here
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not a model")
    status, report = doctor(*address)
    assert (status, report["verdict"]) == (0, "sound")
    assert "the model's own files cannot be compared with: " in levels(report, "info")["reference"]


# Servers that give wrong vectors: exit 1.


def wrong(server: FakeVLLMServer, name: str, *words: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    status, report = doctor("--base-url", server.base_url, *options)
    assert status == 1, report
    assert report["findings"][0]["level"] == "wrong"
    found = levels(report, "wrong")
    assert list(found) == [name]
    for word in words:
        assert word in found[name]
    return report


def test_vectors_that_are_not_finite_are_broken(sound: FakeVLLMServer) -> None:
    sound.order(Fault.nan(), times=None)
    assert wrong(sound, "broken", "not finite")["verdict"] == "broken"


def test_the_same_vector_for_every_text_is_broken(sound: FakeVLLMServer) -> None:
    same = sound.vector("the same")
    sound.order(Fault(name="same", rows=lambda rows: [(index, same) for index, _ in rows]), times=None)
    assert wrong(sound, "broken", "median cosine")["verdict"] == "broken"


def test_raw_vectors_of_a_model_that_normalizes(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=32, normalize=False, root=model_folder(tmp_path / "m")) as server:
        wrong(server, "normalize", "has a Normalize module")


def test_raw_vectors_of_a_model_that_does_not_normalize(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=32, normalize=False, root=model_folder(tmp_path / "m", normalize=False)) as server:
        status, report = doctor("--base-url", server.base_url)
    assert status == 0
    assert "as the model says" in levels(report, "info")["normalize"]


def test_unit_vectors_of_a_model_that_does_not_normalize_are_a_warning(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=32, root=model_folder(tmp_path / "m", normalize=False)) as server:
        status, report = doctor("--base-url", server.base_url)
    assert status == 0
    assert "no Normalize module" in levels(report, "warning")["normalize"]


def test_another_width_than_the_models_own(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=16, root=model_folder(tmp_path / "m")) as server:
        wrong(server, "pooling", "gives 32 dimensions, the server 16")


def test_a_pooling_that_vllm_does_not_know_is_a_warning(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=32, root=model_folder(tmp_path / "m", pooling="max_tokens")) as server:
        status, report = doctor("--base-url", server.base_url)
    assert status == 0
    assert "max_tokens" in levels(report, "warning")["pooling"]


def test_a_long_text_that_is_cut_without_a_word(sound: FakeVLLMServer) -> None:
    short = sound.vector("a")
    sound.order(
        Fault(name="cut", reply=replies.embeddings([(0, short.tolist())], "fake-model", 256, None)),
        times=None,
        when=lambda body: len(body["input"][0]) > 500,
    )
    wrong(sound, "limit", "without a word")


def test_base64_in_another_byte_order(sound: FakeVLLMServer) -> None:
    swapped = Fault(name="swapped", rows=lambda rows: [(index, vector[::-1]) for index, vector in rows])
    sound.order(swapped, times=None, when=lambda body: body.get("encoding_format") == "float")
    wrong(sound, "encodings", "differ")


@pytest.mark.parametrize(("served", "status"), [(True, 0), (False, 1)], ids=["served", "refused"])
def test_the_dimensions_that_are_asked_for(served: bool, status: int) -> None:
    with FakeVLLMServer(dimension=32, matryoshka=served) as server:
        code, report = doctor("--base-url", server.base_url, "--dimensions", "16")
        assert code == status
        (finding,) = [f for f in report["findings"] if f["id"] == "matryoshka"]
        assert ("served" if served else "refused") in finding["text"]
        assert served or "is_matryoshka" in finding["fix"]
        assert doctor("--base-url", server.base_url, "--dimensions", "64")[0] == 1


def test_prompts_that_the_model_has_and_nobody_sends(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", prompts={"query": "query: ", "passage": "passage: "})
    with FakeVLLMServer(dimension=32, root=folder) as server:
        address = ["--base-url", server.base_url]
        status, report = doctor(*address)
        assert status == 1
        assert set(levels(report, "wrong")) == {"query-prompt", "document-prompt"}
        assert doctor(*address, "--query-prompt", "auto", "--document-prompt", "passage: ")[0] == 0
        status, report = doctor(*address, "--query-prompt", "query:", "--document-prompt", "")
        assert status == 0
        assert set(levels(report, "warning")) == {"query-prompt", "document-prompt"}


def test_auto_where_the_model_has_no_prompts_is_told_beside_everything_else(sound: FakeVLLMServer) -> None:
    report = wrong(sound, "prompts", 'a prompt is "auto", but there is no config', options=("--query-prompt", "auto"))
    assert "speed" in levels(report, "info")


def test_a_replica_with_other_vectors(sound: FakeVLLMServer) -> None:
    class Other(FakeVLLMServer):
        def _rows(self, prompts: Any, fault: Any) -> Any:
            return super()._rows(prompts, replace(fault, rows=lambda rows: [(i, v[::-1]) for i, v in rows]))

    with Other(dimension=32) as other, FakeVLLMServer(dimension=32) as same:
        status, report = doctor("--base-url", sound.base_url, "--base-url", same.base_url)
        assert (status, "least cosine 1.0" in levels(report, "info")["replica"]) == (0, True)
        status, report = doctor("--base-url", sound.base_url, "--base-url", other.base_url)
        assert (status, list(levels(report, "wrong"))) == (1, ["replica"])


# Beside a fingerprint.


def test_the_fingerprint_of_this_server(sound: FakeVLLMServer, tmp_path: Path) -> None:
    path = str(tmp_path / "index.json")
    with Embedder(base_url=sound.base_url, query_prompt="query: ", long_text="chunk") as embedder:
        embedder.fingerprint().save(path)
    status, report = doctor("--base-url", sound.base_url, "--reference", path)
    assert (status, report["verdict"]) == (0, "same vectors")
    assert "nearest neighbours shared 100%" in levels(report, "info")["reference"]
    status, report = doctor("--base-url", sound.base_url, "--reference", path, "--query-prompt", "q: ")
    assert (status, report["verdict"]) == (1, "re-index needed")
    assert "query_prompt: expected 'query: ', found 'q: '" in levels(report, "wrong")["reference"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda vector: vector[::-1], "broken"),
        (lambda vector: vector + 0.05, "re-index needed"),
        (lambda vector: vector[:-1], "re-index needed"),
        (lambda vector: 2 * vector, "re-index needed"),
    ],
    ids=["unrelated", "near", "narrower", "longer"],
)
def test_the_fingerprint_of_other_vectors(change: Any, verdict: str, sound: FakeVLLMServer, tmp_path: Path) -> None:
    path = str(tmp_path / "index.json")
    with Embedder(base_url=sound.base_url) as embedder:
        found = embedder.fingerprint()
    vectors = np.stack([change(vector) for vector in found.vectors]).astype(np.float32)
    type(found).of(
        vectors, query_prompt="", document_prompt="", unicode="nfc", long_text="error", model="fake-model"
    ).save(path)
    status, report = doctor("--base-url", sound.base_url, "--reference", path)
    assert (status, report["verdict"]) == (1, verdict)


# How a text came back.


@pytest.mark.parametrize(
    ("sent", "got", "how"),
    [
        ("東京は 日本", "東 京 は 日 本", "intact"),
        ("Café naïve", "cafe naive", "folded"),
        ("한글 문장", "한글 문장", "intact"),
        ("ships it 🚀", "ships it [UNK]", "unknown"),
        ("a < b", "a <= b", "changed"),
        ("토성의 고리는", "토성의 고리는".encode().decode("latin-1"), "broken"),
        ("text", "", "broken"),
    ],
)
def test_how_a_text_came_back(sent: str, got: str, how: str) -> None:
    assert _difference(sent, got) == how
