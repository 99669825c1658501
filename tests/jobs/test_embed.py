"""`jobs.embed`: what is in the output after a first run, and after the input or the settings changed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from _outputs import ENDINGS, rows_of, write_lines

from vllm_embed import Embedder, Fingerprint, errors, jobs
from vllm_embed.testing import FakeVLLMServer

Embed = Callable[..., jobs.Summary]


def corpus(numbers: Iterable[int]) -> list[dict]:
    return [{"id": f"k{n}", "text": f"text {n}", "n": n} for n in numbers]


def ids(path: Path) -> list[str]:
    return [row["id"] for row in rows_of(path)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_is_there_once_in_order_with_its_own_vector(
    server: FakeVLLMServer, embed: Embed, tmp_path: Path, ending: str
) -> None:
    summary = embed(write_lines(tmp_path / "in.jsonl", corpus(range(3_000))), f"x{ending}")
    rows = rows_of(tmp_path / f"x{ending}")
    assert [row["n"] for row in rows] == list(range(3_000))
    for row in rows[::97]:
        np.testing.assert_array_equal(row["embedding"], server.vector(row["text"]))
    assert (summary.read, summary.embedded, summary.rows, summary.dimension) == (3_000, 3_000, 3_000, 16)
    assert (summary.status, summary.rejects, summary.model) == (0, None, "fake-model")
    assert summary.tokens >= 4 * 3_000
    assert list(summary.how_to_open) == ["Python"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_rerun_with_nothing_new_makes_no_request(
    server: FakeVLLMServer, embed: Embed, tmp_path: Path, ending: str
) -> None:
    embed(corpus(range(500)), f"x{ending}")
    before = rows_of(tmp_path / f"x{ending}")
    server.reset_counters()
    summary = embed(corpus(range(500)), f"x{ending}")
    assert (server.requests, summary.requests, summary.skipped, summary.embedded) == (0, 0, 500, 0)
    after = rows_of(tmp_path / f"x{ending}")
    assert [row["id"] for row in after] == [row["id"] for row in before]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_changed_row_replaces_the_old_one_and_moves_to_the_end(
    server: FakeVLLMServer, embed: Embed, tmp_path: Path, received: Counter, ending: str
) -> None:
    embed(corpus(range(5)), f"x{ending}")
    received.clear()
    changed = corpus(range(6))
    changed[1]["text"] = "new"
    changed[3]["n"] = -3
    summary = embed(changed, f"x{ending}")
    rows = rows_of(tmp_path / f"x{ending}")
    assert [row["id"] for row in rows] == ["k0", "k2", "k4", "k1", "k3", "k5"]
    assert [row["n"] for row in rows] == [0, 2, 4, 1, -3, 5]
    np.testing.assert_array_equal(rows[3]["embedding"], server.vector("new"))
    assert (summary.replaced, summary.skipped, summary.embedded, summary.rows) == (2, 3, 3, 6)
    assert {"new", "text 3", "text 5"} <= set(received)
    assert "text 0" not in received


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_removed_row_is_told_and_taken_out_by_prune(embed: Embed, tmp_path: Path, ending: str) -> None:
    embed(corpus(range(5)), f"x{ending}")
    summary = embed(corpus([0, 2, 4]), f"x{ending}")
    assert (summary.removed, summary.pruned, summary.rows, summary.status) == (2, 0, 5, 0)
    assert ids(tmp_path / f"x{ending}") == [f"k{n}" for n in range(5)]
    summary = embed(corpus([0, 2, 4]), f"x{ending}", prune=True)
    assert (summary.removed, summary.pruned, summary.rows, summary.requests) == (2, 2, 3, 0)
    assert ids(tmp_path / f"x{ending}") == ["k0", "k2", "k4"]
    summary = embed([{"text": ""}], f"x{ending}", prune=True)
    assert (summary.pruned, summary.rows) == (3, 0)
    assert ids(tmp_path / f"x{ending}") == []


def test_a_limited_run_reads_so_many_rows_and_takes_none_for_removed(embed: Embed, tmp_path: Path) -> None:
    embed(corpus(range(5)))
    summary = embed(corpus([7, 8, 9]), limit=2, prune=True)
    assert (summary.read, summary.removed, summary.pruned) == (2, 0, 0)
    assert ids(tmp_path / "x.parquet") == ["k0", "k1", "k2", "k3", "k4", "k7", "k8"]


@pytest.mark.parametrize(
    "change",
    [{"document_prompt": "passage: "}, {"dimensions": 8}, {"unicode": "nfkc"}, {"model": "other"}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_another_setting_that_decides_vectors_replaces_every_row(tmp_path: Path, change: dict, ending: str) -> None:
    with FakeVLLMServer(model=["fake-model", "other"], dimension=16, matryoshka=True) as server:
        options = {"base_url": server.base_url, "model": "fake-model"}
        jobs.embed(corpus(range(50)), tmp_path / f"x{ending}", **options)
        summary = jobs.embed(corpus(range(50)), tmp_path / f"x{ending}", **options | change)
    assert (summary.replaced, summary.rows, summary.foreign, summary.status) == (50, 50, 0, 0)
    rows = rows_of(tmp_path / f"x{ending}")
    assert [row["n"] for row in rows] == list(range(50))
    assert {len(row["embedding"]) for row in rows} == {change.get("dimensions", 16)}


def test_another_setting_of_transport_replaces_nothing(embed: Embed, server: FakeVLLMServer) -> None:
    embed(corpus(range(50)))
    summary = embed(corpus(range(50)), batch_size=7, timeout=9.0, api_key="k", max_concurrency=2)
    assert (summary.skipped, summary.requests) == (50, 0)


def test_rows_of_another_model_that_the_input_lacks_are_foreign_until_they_are_pruned(embed: Embed) -> None:
    embed(corpus(range(5)))
    summary = embed(corpus(range(3)), document_prompt="p ")
    assert (summary.foreign, summary.status, summary.removed) == (2, 1, 2)
    summary = embed(corpus(range(3)), document_prompt="p ", prune=True)
    assert (summary.foreign, summary.status, summary.rows) == (0, 0, 3)


def test_a_model_that_was_tried_in_between_leaves_no_trace(embed: Embed, tmp_path: Path) -> None:
    embed(corpus(range(5)))
    folder = tmp_path / "x.parquet.job"
    before = (folder / "fingerprint.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        embed(_interrupted(), document_prompt="p ")
    summary = embed(corpus(range(5)))
    assert (summary.foreign, summary.status, summary.skipped) == (0, 0, 5)
    assert (folder / "fingerprint.json").read_text() == before


def _interrupted() -> Iterable[dict]:
    yield from ({"id": f"new{n}", "text": "word " * 300} for n in range(600))  # refused: nothing is written
    raise KeyboardInterrupt


def test_the_fingerprint_beside_the_output_is_what_expect_takes(server: FakeVLLMServer, embed: Embed) -> None:
    summary = embed(corpus(range(5)), document_prompt="p ")
    assert Fingerprint.load(summary.fingerprint).document_prompt == "p "
    with Embedder(base_url=server.base_url, expect=summary.fingerprint, document_prompt="p ") as embedder:
        embedder.embed(["a"])


def test_other_vectors_under_the_same_name_are_refused_before_a_row_is_written(embed: Embed, tmp_path: Path) -> None:
    embed(corpus(range(5)))
    with FakeVLLMServer(dimension=16, normalize=False) as other:
        with pytest.raises(errors.FingerprintMismatchError, match="x.parquet was filled with, and gives other"):
            embed(corpus(range(9)), base_url=other.base_url)
    assert ids(tmp_path / "x.parquet") == [f"k{n}" for n in range(5)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_overwrite_starts_anew(embed: Embed, tmp_path: Path, ending: str) -> None:
    embed(corpus(range(5)), f"x{ending}")
    summary = embed(corpus([7]), f"x{ending}", overwrite=True)
    assert (summary.embedded, summary.rows, summary.removed) == (1, 1, 0)
    assert ids(tmp_path / f"x{ending}") == ["k7"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_dry_run_counts_and_writes_nothing(embed: Embed, tmp_path: Path, ending: str) -> None:
    rows = [*corpus(range(5)), {"id": "k9", "text": "text 0"}, {"text": None}]
    summary = embed(rows, f"x{ending}", dry_run=True)
    assert (summary.dry_run, summary.read, summary.to_embed, summary.same, summary.rejected) == (True, 7, 5, 1, 1)
    assert summary.estimated_seconds > 0
    assert list(tmp_path.iterdir()) == []
    embed(rows[:3], f"x{ending}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(f"x{ending}/*")}
    summary = embed(rows, f"x{ending}", dry_run=True, document_prompt="p ")
    assert (summary.to_embed, summary.replaced, summary.rows) == (5, 3, 3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob(f"x{ending}/*")} == before


def test_progress_is_told_until_all_is_written(embed: Embed, tmp_path: Path) -> None:
    told: list[jobs.Progress] = []
    embed(write_lines(tmp_path / "in.jsonl", corpus(range(3_000))), on_progress=told.append)
    last = told[-1]
    assert (last.rows, last.written, last.rejected, last.share, last.seconds_left) == (3_000, 3_000, 0, 1.0, 0.0)
    assert last.documents_per_s > 0
    assert last.tokens_per_s > last.documents_per_s
    assert [p.written for p in told] == sorted(p.written for p in told)


def test_an_embedder_of_ones_own_is_used_and_stays_open(embedder: Embedder, tmp_path: Path) -> None:
    jobs.embed(corpus(range(5)), tmp_path / "x.npy", embedder=embedder)
    assert embedder.embed(["a"]).shape == (1, 16)
    with pytest.raises(errors.ConfigurationError, match="model: not beside embedder="):
        jobs.embed(corpus(range(5)), tmp_path / "x.npy", embedder=embedder, model="other")


def test_summaries_add_up_and_are_json(embed: Embed) -> None:
    embed(corpus(range(4)))
    rows = [*corpus(range(6)), {"id": "k9", "text": "text 5"}, {"text": 5}, {"id": "k0", "text": "twice"}]
    summary = embed(rows)
    assert summary.read == 9 == summary.embedded + summary.same + summary.skipped + summary.rejected
    assert (summary.embedded, summary.same, summary.skipped, summary.rejected) == (2, 1, 4, 2)
    assert summary.as_dict()["status"] == 1


IDENTICAL = """
import sys
from pathlib import Path
from vllm_embed import jobs
rows = ({"id": i, "text": "the same text"} for i in range(int(sys.argv[3])))
summary = jobs.embed(rows, sys.argv[1], base_url=sys.argv[2])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(summary.rows, summary.embedded, summary.same, int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_any_number_of_identical_texts_cost_one_embedding_and_no_memory(
    server: FakeVLLMServer, received: Counter, tmp_path: Path
) -> None:
    peaks = []
    for count in (10_000, 200_000):
        received.clear()
        command = [sys.executable, "-c", IDENTICAL, str(tmp_path / f"{count}.parquet"), server.base_url, str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=300, check=True)
        rows, embedded, same, peak = map(int, done.stdout.split())
        assert (rows, embedded, same) == (count, 1, count - 1)
        assert received["the same text"] == 1
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 100  # MiB; the rows alone, kept as Python's, would be over 150
