"""Ray on real vLLM: two workers on this machine give the rows of the single process, and its vectors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_embed import jobs
from vllm_embed.ray import embed_dataset

pytestmark = pytest.mark.live

LEAST_COSINE = 0.99999
TEXTS = [f"Paragraph {i} of a book about river number {i % 17}. " * (1 + i % 9) for i in range(300)]


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason='NOT TESTED on Ray: pip install "vllm-embed[ray]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.data

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        yield ray
        ray.shutdown()


def vectors(column: pa.ChunkedArray) -> Any:
    return np.stack(column.to_numpy())


def least_cosine(one: Any, other: Any) -> float:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).min())


def test_two_workers_give_the_rows_of_the_single_process(ray, live_server, tmp_path) -> None:
    rows: list[dict[str, Any]] = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    rows.insert(150, {"id": "long", "text": "word " * 900})  # refused: the model reads 256 tokens
    found = {}
    for name, engine in {"alone": {}, "ray": {"engine": "ray", "workers": 2}}.items():
        path = tmp_path / f"{name}.parquet"
        summary = jobs.embed(rows, path, id_column="id", text_column="text", **engine, **live_server.options)
        assert (summary.embedded, summary.rejected) == (300, 1)
        found[name] = pq.read_table(path)
        assert '"id":"long"' in (tmp_path / f"{name}.rejects.jsonl").read_text()
    alone, spread = found["alone"], found["ray"]
    assert spread.schema.equals(alone.schema)
    assert spread.drop_columns("embedding").equals(alone.drop_columns("embedding"))
    assert least_cosine(vectors(alone["embedding"]), vectors(spread["embedding"])) >= LEAST_COSINE


def test_a_dataset_gets_the_vectors_of_sentence_transformers(ray, live_server, encode) -> None:
    data = ray.data.from_arrow(pa.table({"id": range(40), "text": TEXTS[:40]})).repartition(4)
    embedded = embed_dataset(data, workers=2, batch_size=4, max_concurrency=2, **live_server.options)
    table = pa.concat_tables(ray.get(embedded.to_arrow_refs()))
    assert table["id"].to_pylist() == list(range(40))
    right = np.stack([encode(text) for text in TEXTS[:40]])
    assert least_cosine(vectors(table["embedding"]), right) >= LEAST_COSINE
