"""Types of carried columns, in Parquet one for all rows, whichever commit they came in."""

from __future__ import annotations

import base64
import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from _outputs import rows_of
from _sinks import WIDTH, close_what_was_opened, row, sink_at, vectors, write  # noqa: F401 - a fixture among them
from pyarrow import dataset, parquet


def test_parquet_holds_fixed_size_lists_of_float32(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "x.parquet", {})
    write(sink, [0, 1], year=1999)
    found = parquet.read_table(tmp_path / "x.parquet" / "part-000000.parquet").schema
    assert found.names == ["id", "text", "embedding", "year"]
    assert found.field("embedding").type == pa.list_(pa.float32(), WIDTH)


@pytest.mark.parametrize(
    ("one", "other", "kind", "read"),
    [
        pytest.param(1, 2.5, pa.float64(), [1.0, 2.5], id="integers and fractions"),
        pytest.param(None, "a", pa.string(), [None, "a"], id="nothing and strings"),
        pytest.param(1, "a", pa.string(), ["1", "a"], id="integers and strings"),
        pytest.param(True, 1, pa.string(), ["true", "1"], id="booleans and integers"),
        pytest.param([], ["a"], pa.list_(pa.string()), [[], ["a"]], id="an empty list and one of strings"),
        pytest.param([1], [0.5], pa.list_(pa.float64()), [[1.0], [0.5]], id="lists of numbers"),
        pytest.param([1], ["a"], pa.string(), ["[1]", '["a"]'], id="lists of no common type"),
        pytest.param(
            {"a": 1},
            {"b": "x"},
            pa.struct({"a": pa.int64(), "b": pa.string()}),
            [{"a": 1, "b": None}, {"a": None, "b": "x"}],
            id="objects with other keys",
        ),
        pytest.param({"a": 1}, {"a": "x"}, pa.string(), ['{"a": 1}', '{"a": "x"}'], id="objects of other types"),
        pytest.param({}, [{}], pa.string(), ["{}", "[{}]"], id="empty objects, which Parquet has not"),
        pytest.param(2**70, 1, pa.string(), [str(2**70), "1"], id="an integer of over 64 bits"),
        pytest.param(dt.date(2024, 2, 29), None, pa.date32(), [dt.date(2024, 2, 29), None], id="dates"),
        pytest.param(
            Decimal("1.5"), Decimal("2.5"), pa.decimal128(2, 1), [Decimal("1.5"), Decimal("2.5")], id="decimals"
        ),
    ],
)
@pytest.mark.parametrize("commits", [1, 2], ids=["in one commit", "in two"])
def test_a_column_has_one_type_whichever_commit_its_values_came_in(  # noqa: PLR0917 - pytest's parameters
    tmp_path: Path, one: object, other: object, kind: pa.DataType, read: list, commits: int
) -> None:
    path = tmp_path / "x.parquet"
    sink = sink_at(path, {})
    values = [row(0, c=one), row(1, c=other)]
    if commits == 1:
        sink.write(values, vectors([0, 1]))
    else:
        sink.write(values[:1], vectors([0]))
        sink.write(values[1:], vectors([1]))
    if sink.compact(np.arange(2), 2) is not None:
        sink.settle()
    table = dataset.dataset(path).to_table()
    assert table.schema.field("c").type == kind
    assert table.column("c").to_pylist() == read
    assert all(parquet.read_schema(part).equals(table.schema) for part in path.iterdir())
    assert [found["id"] for found in rows_of(path)] == ["id0", "id1"]


def test_a_column_that_comes_later_is_empty_before(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    sink = sink_at(path, {})
    write(sink, [0], a=1)
    state = write(sink, [1], b=2)
    again = sink_at(path, json.loads(json.dumps(state)))
    write(again, [2])
    assert again.compact(np.arange(3), 3) is not None
    again.settle()
    assert [(r["a"], r["b"]) for r in rows_of(path)] == [(1, None), (None, 2), (None, None)]
    assert again.compact(np.arange(3), 3) is None


@pytest.mark.parametrize("ending", [".jsonl", ".npy"])
@pytest.mark.parametrize("value", [2**70, {"when": dt.date(2024, 2, 29), "raw": b"x"}, float("nan")], ids=str)
def test_values_that_json_has_not_are_written_as_text_or_null(tmp_path: Path, ending: str, value: object) -> None:
    path = tmp_path / f"x{ending}"
    deep: object = value
    for _ in range(300):
        deep = [deep]
    sink = sink_at(path, {})
    sink.write([row(0, c=value), row(1, c=deep)], vectors([0, 1]))
    assert len(rows_of(path)) == 2


def test_the_state_is_json_with_the_schema_in_it(tmp_path: Path) -> None:
    state = write(sink_at(tmp_path / "x.parquet", {}), [0], year=1)
    assert json.loads(json.dumps(state))["parts"] == [["part-000000.parquet", 1]]
    assert pa.ipc.read_schema(pa.py_buffer(base64.b64decode(state["schema"]))).names[-1] == "year"
