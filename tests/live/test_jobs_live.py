"""Jobs on real vLLM: the vectors in the files are sentence-transformers', the pieces fit by the model's tokenizer."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from _reference import LEAST_COSINE, LIMIT, SENTENCES, Reference, cosines
from conftest import LiveServer
from pyarrow import dataset
from typer.testing import CliRunner

from vllm_embed import Embedder, jobs
from vllm_embed.cli import app

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("one_thread")]

SENTENCE = "Saturn has rings of ice and rock while the bridge over river Han was closed in winter 토성 고리 다리"
WORDS = SENTENCE.split()


def rows_of(path: Path) -> tuple[list[dict], np.ndarray]:
    rows = dataset.dataset(path).to_table().to_pylist()
    return rows, np.array([row["embedding"] for row in rows], np.float32)


def test_two_thousand_rows_are_sentence_transformers_in_order(
    live_server: LiveServer, reference: Reference, tmp_path: Path
) -> None:
    texts = [f"{number} {' '.join(WORDS[number % 7 : number % 7 + number % 11 + 1])}" for number in range(2_000)]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"k{n}", "text": text, "n": n}) + "\n" for n, text in enumerate(texts))
    )
    summary = jobs.embed(tmp_path / "in.jsonl", tmp_path / "x.parquet", **live_server.options)
    assert (summary.status, summary.embedded, summary.rows, summary.dimension) == (0, 2_000, 2_000, 384)
    rows, vectors = rows_of(tmp_path / "x.parquet")
    assert [(row["id"], row["text"], row["n"]) for row in rows] == [(f"k{n}", t, n) for n, t in enumerate(texts)]
    assert cosines(vectors, reference.encode(texts, batch_size=64)).min() >= LEAST_COSINE
    with Embedder(**live_server.options, expect=summary.fingerprint) as embedder:
        assert cosines(vectors, embedder.embed(texts)).min() >= LEAST_COSINE
    again = jobs.embed(tmp_path / "in.jsonl", tmp_path / "x.parquet", **live_server.options)
    assert (again.skipped, again.requests) == (2_000, 0)


@pytest.mark.parametrize("size", [32, LIMIT - 2])
def test_pieces_fit_by_the_models_own_tokenizer(
    live_server: LiveServer, reference: Reference, tmp_path: Path, size: int
) -> None:
    texts = {
        "english": SENTENCES["English"] * 20,
        "korean": SENTENCES["Korean"] * 20,
        "word": "incomprehensibilities" * 60,
        "letters": "🚀한 é" * 200,
    }
    inputs = [{"id": key, "text": text} for key, text in texts.items()]
    summary = jobs.embed(inputs, tmp_path / "x.parquet", chunk_size=size, **live_server.options)
    assert summary.status == 0
    rows, vectors = rows_of(tmp_path / "x.parquet")
    assert max(reference.count(row["text"]) - 2 for row in rows) <= size
    for key, text in texts.items():
        pieces = [row["text"] for row in rows if row["id"].startswith(f"{key}#")]
        assert "".join("".join(pieces).split()) == "".join(text.split())
    assert cosines(vectors, reference.encode([row["text"] for row in rows])).min() >= LEAST_COSINE


def test_a_korean_export_in_cp949_arrives_from_the_command_line(
    live_server: LiveServer, reference: Reference, tmp_path: Path
) -> None:
    texts = ["토성의 고리는 얼음과 돌로 이루어져 있다.", "겨울에는 다리가 닫혔다.\n아무도 건너지 않았다.", "서울, 한강"]
    lines = ["번호,내용,연도", *(f'{n},"{text}",{2000 + n}' for n, text in enumerate(texts)), "9,,1999"]
    (tmp_path / "수출.csv").write_bytes("\r\n".join(lines).encode("cp949"))
    options = [word for name, value in live_server.options.items() for word in (f"--{name.replace('_', '-')}", value)]
    arguments = ["embed", str(tmp_path / "수출.csv"), "-o", str(tmp_path / "x.parquet"), "--json", *options]
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(app, [*arguments, "--text-column", "내용", "--id-column", "번호"])
    signal.signal(signal.SIGTERM, before)
    summary = json.loads(result.stdout)
    assert (result.exit_code, summary["embedded"], summary["rejected"]) == (1, 3, 1)
    assert "read as cp949" in summary["notes"][0]
    (reject,) = map(json.loads, Path(summary["rejects"]).read_text("utf8").splitlines())
    assert (reject["line"], reject["id"], reject["reason"]) == (6, "9", "no text: it is empty")
    rows, vectors = rows_of(tmp_path / "x.parquet")
    assert [(row["id"], row["text"], row["연도"]) for row in rows] == [
        (str(n), text.replace("\r\n", "\n"), str(2000 + n)) for n, text in enumerate(texts)
    ]
    assert cosines(vectors, reference.encode(texts)).min() >= LEAST_COSINE
