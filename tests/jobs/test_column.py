"""`EmbedColumn`: the one callable that Ray, Spark and Dask use."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from vllm_embed import EmbedColumn, Embedder, Settings, errors
from vllm_embed.testing import FakeVLLMServer

TEXTS = [f"text {i}" for i in range(100)]
MAKE = {
    "mapping of arrays": lambda columns: {name: np.array(values, dtype=object) for name, values in columns.items()},
    "pandas": lambda columns: pd.DataFrame(columns, index=[f"row {i}" for i in range(len(columns["id"]))]),
    "Arrow table": pa.table,
    "Arrow record batch": pa.RecordBatch.from_pydict,
}


@pytest.fixture(params=MAKE.values(), ids=MAKE.keys())
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def column(server: FakeVLLMServer) -> EmbedColumn:
    return EmbedColumn(base_url=server.base_url, model="fake-model")


def cells(batch: Any, name: str) -> list[Any]:
    values = batch.column(name).to_pylist() if hasattr(batch, "schema") else list(batch[name])
    return [None if value is None or value is pd.NA or np.isscalar(value) else np.asarray(value) for value in values]


def reasons(batch: Any) -> list[str | None]:
    values = batch.column("error").to_pylist() if hasattr(batch, "schema") else list(batch["error"])
    return [value if isinstance(value, str) else None for value in values]


def names(batch: Any) -> list[str]:
    return batch.schema.names if hasattr(batch, "schema") else list(batch)


def test_a_batch_gets_the_vectors_of_the_embedder_and_keeps_the_rest(
    make: Any, column: EmbedColumn, embedder: Embedder
) -> None:
    batch = make({"id": list(range(100)), "text": TEXTS, "x": [None, 1.5] * 50})
    before = pickle.dumps(batch)
    found = column(batch)
    assert type(found) is type(batch)
    assert names(found) == ["id", "text", "x", "embedding"]
    np.testing.assert_array_equal(np.stack(cells(found, "embedding")), embedder.embed(TEXTS))
    assert pickle.dumps(batch) == before
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found.drop(columns="embedding"), batch)
    elif hasattr(found, "schema"):
        assert found.select(["id", "text", "x"]).equals(batch)
        assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)


def test_other_names_and_the_querys_prompt(make: Any, server: FakeVLLMServer) -> None:
    column = EmbedColumn(
        Settings(base_url=server.base_url, model="fake-model"),
        column="question",
        output_column="vector",
        kind="query",
        query_prompt="query: ",
    )
    found = column(make({"id": [1], "question": ["why?"]}))
    assert names(found) == ["id", "question", "vector"]
    np.testing.assert_array_equal(cells(found, "vector")[0], server.vector("query: why?"))


def test_with_raise_the_error_names_the_reasons(make: Any, column: EmbedColumn) -> None:
    batch = make({"id": [1, 2, 3], "text": ["fine", "word " * 300, None]})
    with pytest.raises(errors.InvalidInputError, match=r"2 of 3 texts .* \[1\] .*256.*\[2\] ") as caught:
        column(batch)
    assert sorted(caught.value.reasons) == [1, 2]
    assert "on_error" in str(caught.value)
    pickle.loads(pickle.dumps(caught.value))


def test_with_yield_a_refused_row_has_a_reason_and_no_vector(make: Any, server: FakeVLLMServer) -> None:
    column = EmbedColumn(base_url=server.base_url, model="fake-model", on_error="yield")
    found = column(make({"id": [1, 2, 3], "text": ["fine", "word " * 300, None]}))
    assert names(found) == ["id", "text", "embedding", "error"]
    fine, *refused = cells(found, "embedding")
    np.testing.assert_array_equal(fine, server.vector("fine"))
    assert all(vector is None or np.isnan(vector).all() for vector in refused)
    first, second, third = reasons(found)
    assert first is None
    assert "256" in second
    assert "must be a str" in third


def test_a_batch_of_refused_rows_alone_keeps_its_shape(make: Any, server: FakeVLLMServer) -> None:
    column = EmbedColumn(base_url=server.base_url, model="fake-model", on_error="yield")
    found = column(make({"id": [1, 2], "text": ["word " * 300, "word " * 301]}))
    assert all(reasons(found))
    if hasattr(found, "schema"):
        assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)


def test_no_rows_give_no_rows(make: Any, column: EmbedColumn) -> None:
    found = column(make({"id": [], "text": []}))
    assert names(found) == ["id", "text", "embedding"]
    assert len(cells(found, "embedding")) == 0
    if hasattr(found, "schema"):
        assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)


def test_a_column_that_is_missing_or_taken_is_an_error(make: Any, column: EmbedColumn) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"no column 'text': the batch has \['id', 'body'\]"):
        column(make({"id": [1], "body": ["a"]}))
    with pytest.raises(errors.ConfigurationError, match="has a column 'embedding' already"):
        column(make({"id": [1], "text": ["a"], "embedding": [0.0]}))


def test_other_batches_are_named(column: EmbedColumn) -> None:
    with pytest.raises(errors.ConfigurationError, match="not list"):
        column([{"text": "a"}])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_error": "ignore"}, '"raise" or "yield"'),
        ({"kind": "passage"}, '"query" or "document"'),
        ({"output_column": "text"}, "three names"),
        ({"batchsize": 1}, "batch_size"),
        ({"expect": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_what_cannot_work_is_refused_where_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        EmbedColumn(**options)


def test_an_http_client_cannot_travel() -> None:
    with httpx.Client() as client, pytest.raises(errors.ConfigurationError, match="cannot be pickled"):
        EmbedColumn(http_client=client)


def test_making_and_pickling_it_opens_nothing(server: FakeVLLMServer) -> None:
    pickle.loads(pickle.dumps(EmbedColumn(base_url=server.base_url)))
    assert server.connections == 0


def test_copies_in_one_process_share_an_embedder(server: FakeVLLMServer) -> None:
    """Spark unpickles it for each task: the bound on requests must hold for all of them."""
    column = EmbedColumn(base_url=server.base_url, model="fake-model", max_concurrency=2, batch_size=1)
    copies = [pickle.loads(pickle.dumps(column)) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool, server.hold():
        done = [pool.submit(copy, {"text": np.array(TEXTS, dtype=object)}) for copy in copies]
        server.wait_for(requests=2)
        server.release()
        for result in done:
            result.result()
    assert server.most_in_flight == 2
    assert server.texts == 400


def test_it_works_in_a_process_that_it_was_pickled_to(server: FakeVLLMServer, column: EmbedColumn) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(column, {"text": np.array(TEXTS, dtype=object)}).result()
    np.testing.assert_array_equal(found["embedding"], np.stack([server.vector(text) for text in TEXTS]))


def test_a_fingerprint_travels_with_it(server: FakeVLLMServer, embedder: Embedder, tmp_path: Any) -> None:
    path = tmp_path / "index.fingerprint.json"
    embedder.fingerprint().save(path)
    column = EmbedColumn(base_url=server.base_url, model="fake-model", expect=path)
    path.unlink()  # another machine does not have it
    assert pickle.loads(pickle.dumps(column))({"text": np.array(["a"], dtype=object)})["embedding"].shape == (1, 16)
    with FakeVLLMServer(dimension=8) as other:
        wrong = EmbedColumn(base_url=other.base_url, model="fake-model", expect=embedder.fingerprint())
        with pytest.raises(errors.FingerprintMismatchError):
            wrong({"text": np.array(["a"], dtype=object)})


def test_its_repr_holds_no_key() -> None:
    assert "key-of-this-test" not in repr(EmbedColumn(api_key="key-of-this-test"))


def test_as_sparks_map_in_pandas(server: FakeVLLMServer, column: EmbedColumn) -> None:
    """Spark hands a function an iterator of frames, and pickles it; this does so without a Spark."""

    def map_in_pandas(function: Any, frames: Iterator[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(function(frames))

    travelled = pickle.loads(pickle.dumps(column))
    frames = (pd.DataFrame({"id": [i], "text": [TEXTS[i]]}) for i in range(10))
    found = map_in_pandas(lambda frames: map(travelled, frames), frames)
    assert found["id"].tolist() == list(range(10))
    np.testing.assert_array_equal(np.stack(found["embedding"]), np.stack([server.vector(t) for t in TEXTS[:10]]))
    schema = pa.schema({"id": pa.int64(), "text": pa.string(), "embedding": pa.list_(pa.float32())})
    assert pa.Table.from_pandas(found, schema=schema, preserve_index=False).num_rows == 10  # as Spark takes it back


def test_as_dasks_map_partitions(server: FakeVLLMServer, column: EmbedColumn) -> None:
    dask = pytest.importorskip("dask.dataframe", reason='NOT TESTED with Dask: pip install "dask[dataframe]"')
    frame = dask.from_pandas(pd.DataFrame({"id": range(100), "text": TEXTS}), npartitions=4)
    found = frame.map_partitions(column, meta=frame._meta.assign(embedding=object()))
    assert server.requests == 0  # lazy
    made = found.compute()
    assert made["id"].tolist() == list(range(100))
    np.testing.assert_array_equal(np.stack(made["embedding"]), np.stack([server.vector(text) for text in TEXTS]))
