"""Ray: the same rows, rejects and vectors as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_embed import Embedder, Settings, errors, jobs
from vllm_embed._stream import PAUSE
from vllm_embed.ray import _Actor, _count, _Done, _gpus, embed_dataset, stream
from vllm_embed.testing import FakeVLLMServer, Fault

TEXTS = [f"text {i}" for i in range(1_000)]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """Ray on two cores, once for all tests here: it takes some seconds to start."""
    ray = pytest.importorskip("ray", reason='NOT TESTED on Ray: pip install "vllm-embed[ray]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.data

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        yield ray
        ray.shutdown()


@pytest.fixture
def options(server: FakeVLLMServer) -> dict[str, Any]:
    return {"base_url": server.base_url, "model": "fake-model"}


@pytest.fixture
def settings(options: dict[str, Any]) -> Settings:
    return Settings(**options)


def refuse(text: str) -> str | None:
    return "this text is refused" if "refuse" in text else None


def rows(count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        text: Any = f"text {i % 4_000}"
        if i % 997 == 5:
            text = f"refuse {i}"
        elif i == 2_345:
            text = None
        elif i == 3_456:
            text = "word " * 300
        yield {"id": f"row-{i}", "text": text, "page": i % 7}


def table(path: Path) -> pa.Table:
    return pq.read_table(path)


def rejects(path: Path) -> list[dict[str, Any]]:
    """What the reader rejects goes ahead of what the server refuses, by how far is a matter of time."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda reject: reject["line"])


def test_a_job_writes_the_rows_and_rejects_of_the_single_process(
    ray: Any, server: FakeVLLMServer, options: dict[str, Any], tmp_path: Path
) -> None:
    server.refuse = refuse
    alone = jobs.embed(rows(5_000), tmp_path / "alone.parquet", id_column="id", text_column="text", **options)
    spread = jobs.embed(
        rows(5_000), tmp_path / "ray.parquet", id_column="id", text_column="text", engine="ray", workers=2, **options
    )
    assert alone.rejected == spread.rejected == 8
    for name in ("read", "embedded", "same", "skipped", "replaced", "rows", "dimension", "model"):
        assert getattr(spread, name) == getattr(alone, name), name
    assert table(tmp_path / "ray.parquet").equals(table(tmp_path / "alone.parquet"))
    assert rejects(tmp_path / "ray.rejects.jsonl") == rejects(tmp_path / "alone.rejects.jsonl")


def test_a_job_goes_on_where_it_stopped_on_either_engine(
    ray: Any, server: FakeVLLMServer, options: dict[str, Any], tmp_path: Path
) -> None:
    def run(count: int, **more: Any) -> jobs.Summary:
        out = tmp_path / "out.parquet"
        return jobs.embed(rows(count), out, id_column="id", text_column="text", **more, **options)

    assert run(1_000, engine="ray", workers=2).embedded == 1_000
    sent = server.texts
    more = run(2_000, engine="ray", workers=2)
    assert (more.skipped, more.embedded) == (1_000, 1_000)
    assert server.texts - sent < 1_000 + 100  # the fingerprint's own
    sent = server.texts
    assert run(2_000).skipped == run(2_000, engine="ray").skipped == 2_000
    assert server.texts == sent
    jobs.embed(rows(2_000), tmp_path / "whole.parquet", id_column="id", text_column="text", **options)
    assert table(tmp_path / "out.parquet").equals(table(tmp_path / "whole.parquet"))


def test_its_blocks_are_those_of_the_embedder(
    ray: Any, server: FakeVLLMServer, settings: Settings, embedder: Embedder
) -> None:
    texts: list[Any] = [*TEXTS]
    texts[3] = None
    texts[7] = "word " * 300
    texts[128:192] = ["word " * 300] * 64  # a whole block of refused texts
    texts[500] = "x" * 150_000
    alone = list(embedder.stream(texts, on_error="yield"))
    with stream(settings, workers=2) as embed:
        spread = list(embed(iter(texts)))
        assert embed.requests >= len(alone)
        assert embed.prompt_tokens > 1_000
        assert list(embed(iter([]))) == []
    assert [block.start for block in spread] == [block.start for block in alone]
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_array_equal(one.vectors, other.vectors)
        assert other.vectors.flags.writeable
        assert one.failures.keys() == other.failures.keys()
        for at, error in one.failures.items():
            twin = other.failures[at]
            assert (type(twin), str(twin), twin.indexes, twin.reasons) == (
                type(error),
                str(error),
                error.indexes,
                error.reasons,
            )


def test_it_reads_no_further_ahead_than_its_window(ray: Any, options: dict[str, Any]) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"t{read}"

    with stream(Settings(**options, batch_size=8, max_concurrency=2), workers=2) as embed:
        blocks = embed(endless())
        next(blocks)
        next(blocks)
        blocks.close()
    assert read <= 8 * (2 * 2 * 2 + 1)  # two blocks for each of two requests of two actors, and one given out


def test_a_pause_waits_until_all_was_handed_out(ray: Any, settings: Settings) -> None:
    given = 0

    def paused() -> Iterator[Any]:
        yield from TEXTS[:100]
        yield PAUSE
        assert given == 100
        yield PAUSE
        yield from TEXTS[100:200]

    with stream(settings, workers=2) as embed:
        for block in embed(paused()):
            given += len(block.vectors)
    assert given == 200


def test_both_workers_keep_their_requests_in_flight(ray: Any, server: FakeVLLMServer, options: dict[str, Any]) -> None:
    with stream(Settings(**options, batch_size=8, max_concurrency=3), workers=2) as embed:
        with server.hold():
            blocks = embed(iter(TEXTS))
            first = threading.Thread(target=lambda: next(blocks))
            first.start()
            server.wait_for(requests=6)
            server.release()
            first.join()
        assert sum(len(block.vectors) for block in blocks) == 1_000 - 8
    assert server.most_in_flight == 6


def test_another_error_is_raised_as_ours(ray: Any, server: FakeVLLMServer, settings: Settings) -> None:
    server.order(Fault.status(401), times=None)
    with stream(settings, workers=1) as embed, pytest.raises(errors.AuthenticationError) as caught:
        list(embed(iter(TEXTS)))
    assert caught.value.status == 401


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Actor"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_an_actor_that_dies_is_started_again_and_its_blocks_are_done_again(
    ray: Any, server: FakeVLLMServer, settings: Settings
) -> None:
    with stream(settings, workers=2) as embed:
        blocks: list[Any] = []
        with server.hold():
            whole = threading.Thread(target=lambda: blocks.extend(embed(iter(TEXTS))))
            whole.start()
            server.wait_for(requests=len(TEXTS) // 64 + 1)
            before = actors()
            assert len(before) == 2
            os.kill(before[0].pid, signal.SIGKILL)
            before[0].wait(10)
        whole.join()
    vectors = np.concatenate([block.vectors for block in blocks])
    np.testing.assert_array_equal(vectors, np.stack([server.vector(text) for text in TEXTS]))


def test_actors_that_are_gone_for_good_are_an_error_that_says_so(ray: Any, settings: Settings) -> None:
    with stream(settings, workers=1) as embed:
        for actor in embed._actors:
            ray.kill(actor)
        with pytest.raises(errors.EngineError, match="a Ray actor failed, .* texts from 0 on"):
            list(embed(iter(TEXTS)))


def test_an_actor_gives_blocks_failures_and_what_it_spent(server: FakeVLLMServer, settings: Settings) -> None:
    """In this process: what the tests above see from outside."""
    actor = _Actor(settings)
    done = actor.embed([*TEXTS[:10], None])
    assert isinstance(done, _Done)
    np.testing.assert_array_equal(done.vectors[:10], np.stack([server.vector(text) for text in TEXTS[:10]]))
    assert list(done.failures) == [10]
    assert (done.limits.texts, done.limits.chars, done.requests) == (64, 200_000, 1)
    assert actor.embed(TEXTS[:65]).requests == 2
    server.order(Fault.status(401), times=None)
    assert isinstance(actor.embed(["a"]), errors.AuthenticationError)


@pytest.mark.parametrize(
    ("there", "options", "workers", "found"),
    [
        ({"CPU": 2.0}, {}, None, (0, 2)),
        ({"CPU": 2.0}, {}, 5, (0, 5)),
        ({"GPU": 8.0}, {}, None, (0, 2)),
        ({"GPU": 8.0}, {"in_process": True}, None, (1, 8)),
        ({"GPU": 8.0}, {"in_process": True, "engine_args": {"tensor_parallel_size": 2}}, None, (2, 4)),
        ({"GPU": 8.0}, {"in_process": True}, 3, (1, 3)),
        ({"CPU": 2.0}, {"in_process": True}, None, (0, 1)),
    ],
    ids=["servers", "as asked", "servers beside GPUs", "a GPU each", "two each", "fewer", "in process on CPU"],
)
def test_actors_and_their_gpus(
    there: dict[str, float], options: dict[str, Any], workers: int | None, found: tuple[int, int]
) -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: there)
    settings = Settings(model="m", **options)
    gpus = _gpus(cluster, settings)
    assert (gpus, _count(cluster, workers, gpus, in_process=settings.in_process)) == found


def test_more_actors_than_gpus_are_refused() -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"GPU": 2.0})
    with pytest.raises(errors.ConfigurationError, match="workers=3 with 1 GPUs each: there are GPUs for 2"):
        _count(cluster, 3, 1, in_process=True)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_worker_at_least(ray: Any, settings: Settings, workers: int) -> None:
    with pytest.raises(errors.ConfigurationError, match="at least 1"), stream(settings, workers=workers):
        pass


def test_a_client_that_cannot_travel_is_refused_at_once(ray: Any) -> None:
    with httpx.Client() as client:
        with pytest.raises(errors.ConfigurationError, match="cannot be pickled"):
            with stream(Settings(http_client=client)):
                pass
        with pytest.raises(errors.ConfigurationError, match="cannot be pickled"):
            embed_dataset(ray.data.from_items([{"text": "a"}]), http_client=client)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for use in (lambda: stream(Settings()).__enter__(), lambda: embed_dataset(None)):
        with pytest.raises(errors.ConfigurationError, match=r'pip install "vllm-embed\[ray\]"'):
            use()


def test_it_starts_ray_quietly_and_shuts_down_only_what_it_started(server: FakeVLLMServer) -> None:
    script = f"""
        import signal
        before = signal.getsignal(signal.SIGTERM)
        from vllm_embed import Settings
        from vllm_embed.ray import stream
        with stream(Settings(base_url={server.base_url!r}, model="fake-model"), workers=1) as embed:
            assert signal.getsignal(signal.SIGTERM) is before
            assert [len(block.vectors) for block in embed(iter(["a"] * 65))] == [64, 1]
        import ray
        assert not ray.is_initialized()
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_ray_that_runs_is_left_running(ray: Any, settings: Settings) -> None:
    with stream(settings, workers=1):
        pass
    assert ray.is_initialized()


def dataset(ray: Any, texts: list[Any]) -> Any:
    columns = {"id": list(range(len(texts))), "text": texts, "page": [None, 1.5] * (len(texts) // 2)}
    return ray.data.from_arrow(pa.table(columns)).repartition(4)


def test_a_dataset_gets_the_vectors_of_the_embedder(
    ray: Any, server: FakeVLLMServer, options: dict[str, Any], embedder: Embedder
) -> None:
    embedded = embed_dataset(dataset(ray, TEXTS), workers=2, batch_size=8, max_concurrency=4, **options)
    assert server.requests == 0  # lazy
    found = pa.concat_tables(ray.get(embedded.to_arrow_refs()))
    assert found.column_names == ["id", "text", "page", "embedding"]
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert found.select(["id", "text", "page"]).equals(expected(TEXTS))
    np.testing.assert_array_equal(np.stack(found["embedding"].to_numpy()), embedder.embed(TEXTS))
    assert server.requests - 16 <= 1_000 / 8 + 8  # whole requests but for a batch's last


def expected(texts: list[Any]) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": texts, "page": [None, 1.5] * (len(texts) // 2)})


def test_a_dataset_with_refused_texts_raises_their_reasons(ray: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"cannot be embedded: .*\[\d\] at least 257 tokens, the limit is 256"):
        embed_dataset(dataset(ray, [*TEXTS[:9], "word " * 300]), workers=1, **options).materialize()


def test_or_tells_them_beside_the_vectors(ray: Any, server: FakeVLLMServer, options: dict[str, Any]) -> None:
    server.refuse = refuse
    texts: list[Any] = [*TEXTS[:97], "refuse", None, "word " * 300]
    embedded = embed_dataset(dataset(ray, texts), workers=2, on_error="yield", **options)
    found = pa.concat_tables(ray.get(embedded.to_arrow_refs()))
    assert found.column_names == ["id", "text", "page", "embedding", "error"]
    assert found["id"].to_pylist() == list(range(100))
    assert found["embedding"].null_count == 3
    assert found["error"].null_count == 97
    *_, refused, missing, long = found["error"].to_pylist()
    assert "this text is refused" in refused
    assert "must be a str" in missing
    assert "256" in long
