"""The ledger: what is in an output, whatever its ids are, and for one job at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_embed.errors import OutputError
from vllm_embed.jobs._ledger import Ledger, Place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    made = Ledger(path)
    yield made
    made.close()


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    ledger.__init__(ledger.path)
    return ledger


def test_what_was_committed_is_found_with_its_number_and_hash(ledger: Ledger) -> None:
    ledger.commit([("a", b"1"), ("b", b"2")], {"bytes": 7})
    ledger.commit([("c", b"3")], {"bytes": 9})
    for again in (ledger, reopened(ledger)):
        assert again.find(["c", "none", "a"]) == {"a": Place(0, b"1"), "c": Place(2, b"3")}
        assert (again.state, again.total, again.count()) == ({"bytes": 9}, 3, 3)
    assert ledger.find([]) == {}


def test_a_new_ledger_is_of_an_output_that_holds_nothing(ledger: Ledger) -> None:
    assert (ledger.state, ledger.identity, ledger.total, ledger.count()) == ({}, "", 0, 0)


def test_an_id_that_is_written_again_is_replaced_and_stands_at_the_end(ledger: Ledger) -> None:
    ledger.commit([("a", b"1"), ("b", b"2")], {})
    ledger.commit([("a", b"3")], {})
    assert ledger.find(["a"]) == {"a": Place(2, b"3")}
    assert (ledger.live().tolist(), ledger.total, ledger.count()) == ([1, 2], 3, 2)


def test_rows_that_were_deleted_last_still_count_as_written(ledger: Ledger) -> None:
    """A kill between sweeping and compacting must not give their numbers to other rows."""
    ledger.commit([("a", b"1"), ("b", b"2"), ("c", b"3")], {})
    ledger.delete([1, 2])
    again = reopened(ledger)
    assert (again.total, again.count(), again.live().tolist()) == (3, 1, [0])
    again.commit([("d", b"4")], {})
    assert again.find(["d"])["d"].at == 3


def test_renumbering_keeps_the_order_and_leaves_no_gap(ledger: Ledger) -> None:
    ledger.commit([(key, key.encode()) for key in "abcd"], {})
    ledger.commit([("b", b"new")], {})
    ledger.delete([0])
    ledger.renumber({"made": 1})
    for again in (ledger, reopened(ledger)):
        found = again.find(list("abcd"))
        assert {key: place.at for key, place in found.items()} == {"c": 0, "d": 1, "b": 2}
        assert (again.total, again.state) == (3, {"made": 1})


def test_rows_of_another_identity_are_foreign(ledger: Ledger) -> None:
    ledger.identify("one")
    ledger.commit([("a", b"1"), ("b", b"2")], {})
    assert ledger.foreign() == 0
    ledger.identify("two")
    ledger.commit([("a", b"3")], {})
    again = reopened(ledger)
    assert (again.identity, again.foreign()) == ("two", 1)


def test_unseen_rows_are_those_that_are_not_marked(ledger: Ledger) -> None:
    ledger.commit([(f"k{i}", b"") for i in range(25_000)], {})
    seen = bytearray(b"\1" * 24_000)  # the rest was written by this job
    seen[5] = seen[23_999] = 0
    assert list(ledger.unseen(seen)) == [(5, "k5"), (23_999, "k23999")]


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), unique=True, max_size=30))
def test_any_id_is_found_again(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")
    ledger.commit([(key, b"") for key in ids], {})
    assert {key: place.at for key, place in ledger.find([*ids, "a\0b"]).items()} == {
        key: at for at, key in enumerate(ids)
    }
    ledger.close()


def test_thousands_of_ids_are_found_at_once(ledger: Ledger) -> None:
    ledger.commit([(f"k{i}", b"") for i in range(3_000)], {})
    assert len(ledger.find([f"k{i}" for i in range(40_000)])) == 3_000


HOLD = """
import sys
from pathlib import Path
from vllm_embed.jobs._ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.commit([("a", b"1")], {})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_a_second_process_is_told_and_has_its_turn_when_the_first(path: Path, end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"another job is at work on this output: {path} is in use"):
            Ledger(path)
        with pytest.raises(OutputError, match="another job is at work"):
            Ledger.free(path)
        child.kill() if end == "is killed" else child.stdin.close()
        child.wait(30)
    after = Ledger(path)
    assert after.count() == 1
    after.close()


def test_what_is_no_ledger_is_told_and_may_be_removed(path: Path) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match="cannot be written: file is not a database"):
        Ledger(path)
    Ledger.free(path)


def test_a_ledger_of_another_version_is_not_touched(path: Path, ledger: Ledger) -> None:
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE state SET value = '2' WHERE key = 'format'")
    db.close()
    with pytest.raises(OutputError, match="another version of vllm-embed"):
        Ledger(path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Ledger(tmp_path / "file" / "ledger.sqlite")
