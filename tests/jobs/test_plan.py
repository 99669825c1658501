"""What becomes of each row: embedded, the same as one before, skipped, replaced or rejected."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_embed.jobs._ledger import Place
from vllm_embed.jobs._plan import Known, Planned, Planner
from vllm_embed.jobs._row import Reject, Row


def row(key: str, text: str = "text", **columns) -> Row:
    return Row(key, text, columns, "in.jsonl", 1)


def hash_of(item: Row, decides: str = "model") -> bytes:
    (planned,) = Planner(decides, 0).plan([item], {})
    return planned.hash


def test_texts_are_embedded_once_and_in_order() -> None:
    planner = Planner("model", 0)
    planned = list(planner.plan([row("a", "x"), row("b", "y"), row("c", "x"), row("d", "x", n=1)], {}))
    assert [item.first for item in planned] == [True, True, False, False]
    assert planned[0].shared is planned[2].shared is planned[3].shared
    assert (planner.read, planner.same) == (4, 2)


def test_an_id_that_comes_twice_is_rejected_while_the_first_is_on_its_way_and_after() -> None:
    planner = Planner("model", 0)
    first, second = planner.plan([row("a", "x"), row("a", "y")], {})
    assert isinstance(first, Planned)
    assert isinstance(second, Reject)
    assert second.reason == "the id 'a' was there before in this input"
    planner.written(["a"])
    (third,) = planner.plan([row("a", "x")], {"a": Place(0, first.hash)})
    assert isinstance(third, Reject)


def test_an_unchanged_row_is_skipped_and_its_second_coming_rejected() -> None:
    planner = Planner("model", 1)
    there = {"a": Place(0, hash_of(row("a", "x")))}
    assert list(planner.plan([row("a", "x")], there)) == []
    assert (planner.skipped, planner.seen, planner.pending) == (1, bytearray([1]), {})
    (again,) = planner.plan([row("a", "x")], there)
    assert isinstance(again, Reject)


@pytest.mark.parametrize(
    ("now", "decides"),
    [
        pytest.param(row("a", "y", n=1), "model", id="text"),
        pytest.param(row("a", "x", n=2), "model", id="column"),
        pytest.param(row("a", "x", n="1"), "model", id="type of a column"),
        pytest.param(row("a", "x", n=1, m=None), "model", id="one more column"),
        pytest.param(row("a", "x"), "model", id="one column less"),
        pytest.param(row("a", "x", n=1), "model with a prompt", id="what decides its vector"),
    ],
)
def test_a_row_is_embedded_again_and_replaced_when_it_changed_in_its(now: Row, decides: str) -> None:
    planner = Planner(decides, 1)
    (planned,) = planner.plan([now], {"a": Place(0, hash_of(row("a", "x", n=1)))})
    assert planned.first
    assert planned.replaces
    assert planner.skipped == 0


def test_the_order_of_columns_does_not_matter() -> None:
    assert hash_of(row("a", x=1, y={"b": 1, "c": 2})) == hash_of(
        Row("a", "text", {"y": {"c": 2, "b": 1}, "x": 1}, "", 9)
    )


def test_rejected_rows_are_read_too() -> None:
    planner = Planner("model", 0)
    reject = Reject("a.csv", 3, None, "no text")
    assert list(planner.plan([reject], {})) == [reject]
    assert planner.read == 1


@pytest.mark.parametrize(
    "columns",
    [{"n": "\ud83d"}, {"\ud83d": 1}, {"n": [{"\udcff": "\udcff"}]}, {"n": 2**70}, {"n": {1: 2}}, {"n": object}],
    ids=["half a letter", "in a name", "deep inside", "large integer", "number as key", "any object"],
)
def test_any_column_has_a_hash_and_can_be_stored(columns: dict) -> None:
    (first,) = Planner("model", 0).plan([row("a", "half \ud83d", **columns)], {})
    (again,) = Planner("model", 0).plan([row("a", "half \ud83d", **columns)], {})
    assert first.hash == again.hash
    assert first.text == "half \ud83d"
    assert first.row.text == "half \ufffd"
    assert "\ud83d" not in str(first.row.columns)


def digest(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@given(st.lists(st.integers(0, 9)))
def test_vectors_that_are_remembered_are_those_of_their_text(numbers: list[int]) -> None:
    known = Known(most=4)
    for number in numbers:
        shared, first = known.meet(digest(number))
        if first:
            known.keep(shared, memoryview(bytes([number]) * 3))
        assert bytes(shared.vector) == bytes([number]) * 3
        shared.waiting -= 1


def test_a_vector_that_is_waited_for_is_not_given_up() -> None:
    known = Known(most=2)
    held, _ = known.meet(digest(0))
    known.keep(held, memoryview(b"0"))
    for number in range(1, 9):
        shared, first = known.meet(digest(number))
        assert first
        known.keep(shared, memoryview(b"%d" % number))
        shared.waiting -= 1
    assert bytes(held.vector) == b"0"
    assert known.meet(digest(0)) == (held, False)
    assert held.waiting == 2
