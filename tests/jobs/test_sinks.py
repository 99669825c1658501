"""Outputs that are files: what is in them after a kill, a compaction, or both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from _outputs import ENDINGS, rows_of
from _sinks import WIDTH, close_what_was_opened, row, sink_at, vectors, write  # noqa: F401 - a fixture among them
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_embed.errors import OutputError


def numbers_of(path: Path) -> list[int]:
    """Which rows are there, each with its own text and vector."""
    rows = rows_of(path)
    for found in rows:
        number = int(found["id"].removeprefix("id"))
        assert found["text"] == f"text {number}"
        assert found["embedding"].tolist() == vectors([number])[0].tolist()
    return [int(found["id"].removeprefix("id")) for found in rows]


def as_after_a_kill(path: Path, into: Path) -> Path:
    """A copy of what lies on the disk now, as another process would find it."""
    shutil.copytree(path.parent, into)
    return into / path.name


def leftovers(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.rglob(".*"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_are_there_in_the_order_of_writing(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    sink = sink_at(path, {})
    write(sink, [0, 1])
    write(sink, [2])
    assert numbers_of(path) == [0, 1, 2]
    sink.close()
    sink.close()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("before", [0, 2], ids=["the first rows", "later rows"])
def test_a_kill_between_writing_and_committing_drops_what_was_not_committed(
    tmp_path: Path, ending: str, before: int
) -> None:
    path = tmp_path / "a" / f"x{ending}"
    sink = sink_at(path, {})
    state = write(sink, range(before)) if before else {}
    write(sink, [7, 8, 9])
    copy = as_after_a_kill(path, tmp_path / "b")
    again = sink_at(copy, json.loads(json.dumps(state)))
    if before or ending != ".npy":
        assert numbers_of(copy) == list(range(before))
    write(again, [5])
    assert numbers_of(copy) == [*range(before), 5]
    assert leftovers(copy) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.99], ids=["nothing", "a third", "nearly all"])
def test_a_kill_in_the_midst_of_writing_leaves_no_half_row(tmp_path: Path, ending: str, cut: float) -> None:
    path = tmp_path / f"x{ending}"
    sink = sink_at(path, {})
    state = write(sink, [0, 1])
    sizes = {file: file.stat().st_size for file in tmp_path.rglob("x*") if file.is_file()}
    write(sink, [2, 3])
    sink.close()
    if ending == ".parquet":
        part = path / "part-000001.parquet"
        (path / ".part-000001.parquet").write_bytes(part.read_bytes()[: int(cut * part.stat().st_size)])
        part.unlink()
    else:  # the header of an array may be the old or the new one
        for file, size in sizes.items():
            file.write_bytes(file.read_bytes()[: size + int(cut * (file.stat().st_size - size))])
    sink_at(path, state)
    assert numbers_of(path) == [0, 1]
    assert leftovers(path) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("live", "at"),
    [(live, at) for live in ([1, 3], [], [0, 1, 2]) for at in ("prepared", "recorded", "settled")],
    ids=[f"{live}, {at}" for live in ("some", "none", "the first") for at in ("prepared", "recorded", "settled")],
)
def test_a_kill_around_a_compaction_leaves_the_old_rows_or_the_new(
    tmp_path: Path, ending: str, live: list[int], at: str
) -> None:
    path = tmp_path / "a" / f"x{ending}"
    sink = sink_at(path, {})
    write(sink, [0, 1, 2])
    before = write(sink, [3, 4])
    after = sink.compact(np.array(live, np.int64), 5)
    assert after is not None
    if at == "settled":
        sink.settle()
        sink.finish()
    assert numbers_of(path) == (live if at == "settled" else [0, 1, 2, 3, 4])
    copy = as_after_a_kill(path, tmp_path / "b")
    again = sink_at(copy, before if at == "prepared" else json.loads(json.dumps(after)))
    again.finish()
    assert numbers_of(copy) == ([0, 1, 2, 3, 4] if at == "prepared" else live)
    assert leftovers(copy) == []


@pytest.mark.parametrize("ending", [".jsonl", ".npy"])
def test_a_kill_between_the_two_files_of_a_compaction_is_made_good(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    sink = sink_at(path, {})
    write(sink, [0, 1, 2])
    after = sink.compact(np.array([0, 2]), 3)
    sink._file.open(after["bytes"], after["made"]) if ending == ".jsonl" else sink._array.open(
        128 + after["rows"] * 4 * WIDTH, after["made"]
    )
    sink_at(path, after)
    assert numbers_of(path) == [0, 2]


@pytest.mark.parametrize("ending", ENDINGS)
def test_there_is_nothing_to_compact_where_every_row_counts(tmp_path: Path, ending: str) -> None:
    sink = sink_at(tmp_path / f"x{ending}", {})
    write(sink, [0, 1])
    assert sink.compact(np.arange(2), 2) is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_was_cut_or_taken_away_is_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    sink = sink_at(path, {})
    state = write(sink, [0, 1])
    sink.close()
    (path / "part-000000.parquet" if ending == ".parquet" else path).unlink()
    with pytest.raises(OutputError, match="start anew with overwrite"):
        sink_at(path, state)


def test_an_array_without_rows_is_one_that_numpy_opens(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "x.npy", {})
    sink.finish()
    assert np.load(tmp_path / "x.npy").shape == (0, 0)
    again = sink_at(tmp_path / "x.npy", {})
    write(again, [0])
    assert numbers_of(tmp_path / "x.npy") == [0]


def test_an_array_has_one_width(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "x.npy", {})
    write(sink, [0])
    with pytest.raises(OutputError, match="holds vectors of 3 dimensions, these have 4"):
        sink.write([row(1)], vectors([1], 4))
    assert numbers_of(tmp_path / "x.npy") == [0]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 4), st.booleans()),
        st.tuples(st.just("compact"), st.randoms(use_true_random=False), st.sampled_from(["", "prepared", "recorded"])),
        st.tuples(st.just("reopen"), st.none(), st.none()),
    ),
    max_size=12,
)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_any_sequence_of_writes_kills_and_compactions_gives_what_a_list_would(
    tmp_path_factory: pytest.TempPathFactory, ending: str, steps: list
) -> None:
    path = tmp_path_factory.mktemp("sink") / f"x{ending}"
    sink, state, model, made = sink_at(path, {}), {}, [], 0
    for step, what, how in steps:
        if step == "write":
            numbers = list(range(made, made + what))
            made += what
            written = write(sink, numbers, n=made)
            if how:  # committed
                state, model = written, model + numbers
            else:  # killed before
                sink = sink_at(path, state)
        elif step == "compact":
            live = [i for i in range(len(model)) if what.random() < 0.6]
            prepared = sink.compact(np.array(live, np.int64), len(model)) if model else None
            if prepared is not None and how != "prepared":
                state, model = prepared, [model[i] for i in live]
            if prepared is not None and not how:
                sink.settle()
            else:
                sink = sink_at(path, state)
        else:
            sink.close()
            sink = sink_at(path, json.loads(json.dumps(state)))
    sink.finish()
    assert numbers_of(path) == model
    assert leftovers(path) == []
    sink.close()
