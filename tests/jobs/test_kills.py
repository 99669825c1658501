"""`vllm-embed embed`, killed and interrupted: the output is that of an undisturbed run, and little is done twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _outputs import ENDINGS, rows_of

from vllm_embed import jobs
from vllm_embed.testing import FakeVLLMServer

ROWS = 100_000
KILLS = 20
BATCH, IN_FLIGHT = 128, 2

COMMIT = max(1_024, ROWS // 64)
"""Most rows of one commit: a 64th of what is there."""
BOUND = 2 * IN_FLIGHT * BATCH + 3 * COMMIT
"""Most texts that a kill makes the next run send again. On the way: two blocks for each request in flight. Not
committed yet: the rows that are gathered, those that wait for the writer, and those that it is writing."""


@pytest.fixture
def server() -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(dimension=4) as fake:
        yield fake


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with FakeVLLMServer(dimension=4) as fake:
        jobs.embed(write_corpus(folder / "in.jsonl", ROWS), folder / "x.parquet", base_url=fake.base_url)
    return rows_of(folder / "x.parquet")


@contextlib.contextmanager
def start(server: FakeVLLMServer, corpus: Path, path: Path, *options: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "vllm_embed.cli", "embed", str(corpus), "-o", str(path), *options]
    command += ["--base-url", server.base_url, "--batch-size", str(BATCH), "--max-concurrency", str(IN_FLIGHT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def write_corpus(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"id": {n}, "text": "t{n}", "n": {n % 7}}}\n' for n in range(count)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_twenty_kills_change_no_row_and_repeat_only_what_was_on_its_way(
    server: FakeVLLMServer, received: Counter, undisturbed: list[dict], tmp_path: Path, ending: str
) -> None:
    """Each run is killed when the server has been sent so many texts more; what the run does then is up to chance."""
    corpus, path = write_corpus(tmp_path / "in.jsonl", ROWS), tmp_path / f"x{ending}"
    chance = random.Random(ending)
    for _ in range(KILLS):
        server.reset_counters()
        with start(server, corpus, path) as child:
            server.wait_for(texts=chance.randint(1, 2 * (ROWS // KILLS)), timeout_s=60)
            child.kill()
    with start(server, corpus, path) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert f"{ROWS:,} rows" in out
    times = {f"t{n}": received[f"t{n}"] for n in range(ROWS)}
    assert min(times.values()) >= 1
    assert sum(times.values()) - ROWS <= KILLS * BOUND
    same(rows_of(path), undisturbed)


def same(found: list[dict], wanted: list[dict]) -> None:
    assert [row["n"] for row in wanted[:9]] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    plain = [[{**row, "embedding": None} for row in rows] for rows in (found, wanted)]
    assert plain[0] == plain[1]
    vectors = [np.stack([row["embedding"] for row in rows]) for rows in (found, wanted)]
    np.testing.assert_array_equal(vectors[0], vectors[1])


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=lambda sign: sign.name)
def test_a_signal_ends_a_job_within_a_second_and_says_how_to_go_on(
    server: FakeVLLMServer, received: Counter, tmp_path: Path, sign: signal.Signals
) -> None:
    corpus, path = write_corpus(tmp_path / "in.jsonl", 20_000), tmp_path / "x.parquet"
    server.delay_s = 0.01
    with start(server, corpus, path) as child:
        server.wait_for(texts=5_000, timeout_s=60)
        with server.hold():  # no reply comes any more
            asked = time.monotonic()
            child.send_signal(sign)
            _, err = child.communicate(timeout=60)
            took = time.monotonic() - asked
    assert child.returncode == 1
    assert err == "Stopped. What was embedded is in the output; the same command goes on from there.\n"
    assert took < 1.0
    kept = len(rows_of(path))
    assert kept >= 5_000 - 2 * IN_FLIGHT * BATCH - 12  # but for what was on its way, and the fingerprint's texts
    server.delay_s = 0.0
    received.clear()
    with start(server, corpus, path) as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert f"{kept:,} unchanged" in out
    assert received["t0"] == received[f"t{kept - 1}"] == 0
    assert [row["text"] for row in rows_of(path)] == [f"t{n}" for n in range(20_000)]


class HangingTokenizer(FakeVLLMServer):
    """Counts the tokens of some texts and then of none."""

    def __init__(self, counts: int) -> None:
        super().__init__(dimension=4)
        self.counts = counts
        self.hangs = threading.Event()

    async def _handle(self, request, send) -> None:
        if request.path == "/tokenize":
            self.counts -= 1
            if self.counts < 0:
                self.hangs.set()
                await asyncio.Event().wait()
        await super()._handle(request, send)


def test_a_signal_ends_a_job_that_waits_for_token_counts(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 1_000)
    with HangingTokenizer(counts=50) as server:
        with start(server, corpus, tmp_path / "x.parquet", "--chunk-size", "1") as child:
            assert server.hangs.wait(60)
            asked = time.monotonic()
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
    assert (child.returncode, err.partition(".")[0]) == (1, "Stopped")
    assert time.monotonic() - asked < 1.5
