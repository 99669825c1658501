"""Bad rows, a server that goes, outputs that cannot be written: the reason, and the rest is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _outputs import ENDINGS, rows_of, write_lines

from vllm_embed import errors, jobs
from vllm_embed.jobs._ledger import Ledger
from vllm_embed.testing import FakeVLLMServer, Fault

Embed = Callable[..., jobs.Summary]

BAD = """{"id": "a", "text": "fine"}
{"id": "b", "text": null}
{"id": "c", "text": "%s"}
{broken
{"id": "e", "text": "\xff"}
{"id": "a", "text": "twice"}
{"id": "f", "text": "%s"}
{"id": "g", "text": "fine too"}
""" % ("word " * 300, "word " * 300)  # noqa: UP031 - braces

REASONS = {
    2: "no text",
    3: "tokens, the limit is 256",
    4: "no JSON: ",
    5: "bytes that are not utf-8",
    6: "'a' was there",
    7: "the limit is 256",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_bad_rows_go_to_the_rejects_with_lines_and_reasons_and_the_rest_is_done(
    embed: Embed, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(BAD.encode("latin-1"))
    for run in range(2):
        summary = embed(tmp_path / "in.jsonl", f"x{ending}")
        assert [row["id"] for row in rows_of(tmp_path / f"x{ending}")] == ["a", "g"]
        assert (summary.status, summary.rejected, summary.read, summary.skipped) == (1, 6, 8, 2 * run)
        assert summary.rejects == str(tmp_path / "x.rejects.jsonl")
        rejects = [json.loads(line) for line in Path(summary.rejects).read_text("utf8").splitlines()]
        assert {reject["line"] for reject in rejects} == set(REASONS)
        assert all(REASONS[reject["line"]] in reject["reason"] for reject in rejects)
        assert {reject["source"] for reject in rejects} == {str(tmp_path / "in.jsonl")}
        assert {reject["id"] for reject in rejects} == {"a", "b", "c", "f", None}


def test_a_clean_run_removes_the_rejects_of_the_run_before(embed: Embed, tmp_path: Path) -> None:
    embed([{"text": None}])
    assert (tmp_path / "x.rejects.jsonl").exists()
    assert embed([{"text": "fine"}]).rejects is None
    assert not (tmp_path / "x.rejects.jsonl").exists()


def test_rejects_go_where_they_are_told(embed: Embed, tmp_path: Path) -> None:
    summary = embed([{"text": None}], rejects=tmp_path / "deep" / "bad.jsonl")
    assert json.loads((tmp_path / "deep" / "bad.jsonl").read_text())["reason"] == "no text"
    assert summary.rejects == str(tmp_path / "deep" / "bad.jsonl")


def test_a_refused_text_is_refused_for_every_row_that_has_it_and_asked_for_once(
    embed: Embed, received: Counter
) -> None:
    summary = embed([{"id": n, "text": "word " * 300} for n in range(100)] + [{"id": "x", "text": "fine"}])
    assert (summary.rejected, summary.embedded, summary.same) == (100, 1, 0)


def test_a_server_that_goes_away_leaves_what_was_done_and_a_rerun_completes_it(
    server: FakeVLLMServer, embed: Embed, received: Counter, tmp_path: Path
) -> None:
    rows = [{"id": n, "text": f"row {n}"} for n in range(6_000)]
    server.order(Fault.reset(), times=None, when=lambda body: "row 4000" in body["input"])
    options = {"max_retries": 0, "max_concurrency": 2}
    with pytest.raises(errors.ServerUnreachableError):
        embed(rows, **options)
    done = [row["text"] for row in rows_of(tmp_path / "x.parquet")]
    assert 3_000 < len(done) <= 4_000
    assert done == [f"row {n}" for n in range(len(done))]
    server.cancel_orders()
    received.clear()
    summary = embed(rows, **options)
    assert (summary.skipped, summary.rows) == (len(done), 6_000)
    assert received[done[-1]] == 0
    assert [row["text"] for row in rows_of(tmp_path / "x.parquet")] == [row["text"] for row in rows]


def test_a_wrong_key_ends_the_job_before_anything_is_written(tmp_path: Path) -> None:
    with FakeVLLMServer(api_key="right") as server, pytest.raises(errors.AuthenticationError):
        jobs.embed([{"text": "a"}], tmp_path / "x.jsonl", base_url=server.base_url, api_key="wrong", model="fake-model")
    assert not (tmp_path / "x.jsonl").exists() or (tmp_path / "x.jsonl").read_bytes() == b""


def test_an_input_that_breaks_off_keeps_what_was_written_before(embed: Embed, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", [{"id": n, "text": f"t{n}"} for n in range(8_000)])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(errors.ConfigurationError, match="which column is the text"):
        embed([good, tmp_path / "bad.csv"])
    assert len(rows_of(tmp_path / "x.parquet")) > 3_000  # all but what was read ahead and in flight


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_output_that_the_job_did_not_make_is_left_alone(embed: Embed, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(b"mine")
    with pytest.raises(errors.OutputError, match="which says what is in it, does not: choose another output"):
        embed([{"text": "a"}], path.name)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_output_without_its_job_folder_is_not_added_to(embed: Embed, tmp_path: Path, ending: str) -> None:
    embed([{"text": "a"}], f"x{ending}")
    (tmp_path / f"x{ending}.job").rename(tmp_path / "gone")
    with pytest.raises(errors.OutputError, match="start anew with overwrite"):
        embed([{"text": "b"}], f"x{ending}")
    assert [row["text"] for row in rows_of(tmp_path / f"x{ending}")] == ["a"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_cannot_be_written_is_told(embed: Embed, tmp_path: Path, ending: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.OutputError, match="cannot be written: Not a directory"):
        embed([{"text": "a"}], f"file/x{ending}")


@pytest.mark.parametrize("overwrite", [False, True], ids=["resumed", "overwritten"])
def test_an_output_at_work_is_refused_and_untouched(embed: Embed, tmp_path: Path, overwrite: bool) -> None:
    embed([{"text": "a"}])
    holder = Ledger(tmp_path / "x.parquet.job" / "ledger.sqlite")
    with pytest.raises(errors.OutputError, match="another job is at work on this output"):
        embed([{"text": "b"}], overwrite=overwrite)
    holder.close()
    assert [row["text"] for row in rows_of(tmp_path / "x.parquet")] == ["a"]


def test_a_broken_ledger_is_told_and_overwrite_is_the_way_out(embed: Embed, tmp_path: Path) -> None:
    embed([{"text": "a"}])
    (tmp_path / "x.parquet.job" / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(errors.OutputError, match="file is not a database"):
        embed([{"text": "b"}])
    assert embed([{"text": "b"}], overwrite=True).rows == 1


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("*.jsonl", "x.jsonl"),
        ("x.parquet", "x.parquet"),
        ("*.jsonl", "x.npy"),
        ("x.rejects.jsonl", "x.parquet"),
        ("x.parquet.job", "x.parquet"),
    ],
)
def test_an_output_is_no_input_of_its_own(embed: Embed, tmp_path: Path, inputs: str, output: str) -> None:
    embed([{"text": "a"}, {"text": None}], output)
    (tmp_path / "x.parquet.job").mkdir(exist_ok=True)
    (tmp_path / "x.parquet.job" / "note.txt").write_text("x")
    with pytest.raises(errors.ConfigurationError, match=f"is an input and belongs to the output .*{output}: choose"):
        embed(str(tmp_path / inputs), output)


def test_an_unknown_ending_is_told(embed: Embed) -> None:
    with pytest.raises(errors.ConfigurationError, match="its ending chooses the format: .parquet"):
        embed([{"text": "a"}], "x.xlsx")
    with pytest.raises(errors.ConfigurationError, match="no input: name files"):
        embed([])


FULL = """
import resource, sys
from vllm_embed.cli import main
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), before[1]))
try:
    main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""


@pytest.mark.parametrize(("ending", "limit"), [(".parquet", 200_000), (".jsonl", 3_000_000), (".npy", 600_000)])
def test_a_full_disk_is_told_leaves_nothing_half_written_and_the_rerun_completes(
    embed: Embed, tmp_path: Path, ending: str, limit: int
) -> None:
    """A limit on the size of a file stands for the disk: the same call fails, with another number."""
    with FakeVLLMServer(dimension=64) as server:
        corpus = write_lines(tmp_path / "in.jsonl", [{"id": n, "text": f"row {n}"} for n in range(5_000)])
        command = ["embed", str(corpus), "-o", str(tmp_path / f"x{ending}"), "--base-url", server.base_url]
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(limit), *command], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.startswith("Error: ")
        assert "cannot be written: File too large" in done.stderr
        assert "Traceback" not in done.stderr
        path = tmp_path / f"x{ending}"
        if ending != ".npy" or path.stat().st_size:
            assert [row["text"] for row in rows_of(path)] == [f"row {n}" for n in range(len(rows_of(path)))]
        summary = embed(corpus, path.name, base_url=server.base_url)
        assert summary.rows == 5_000
        rows = rows_of(path)
        assert [row["text"] for row in rows] == [f"row {n}" for n in range(5_000)]
        np.testing.assert_array_equal(rows[-1]["embedding"], server.vector("row 4999"))
