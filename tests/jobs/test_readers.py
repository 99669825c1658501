"""What a job reads: rows and their columns; and why something is no row."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_embed.errors import ConfigurationError
from vllm_embed.jobs._inputs import sources
from vllm_embed.jobs._readers import Reader
from vllm_embed.jobs._row import Reject, Row


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(*inputs: str, form: str | None = None, **options) -> list[Row | Reject]:
    return list(Reader(sources(inputs, form), **options))


def file(name: str, data: bytes | str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def texts(items: list[Row | Reject]) -> list[str]:
    assert all(isinstance(item, Row) for item in items), items
    return [item.text for item in items]


def rejects(items: list[Row | Reject]) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, Reject)]


@pytest.mark.parametrize(
    ("name", "data", "form", "rows"),
    [
        pytest.param("a.txt", "one\ntwo\n", None, [("a.txt:1", "one\ntwo\n")], id="a text file is one text"),
        pytest.param("a.md", "# one", None, [("a.md:1", "# one")], id="so is a markdown file"),
        pytest.param("a.txt", "one\n\ntwo\r\n", "lines", [("a.txt:1", "one"), ("a.txt:3", "two")], id="lines"),
        pytest.param(
            "a.jsonl", '{"text":"x"}\n\n{"text":"y"}', None, [("a.jsonl:1", "x"), ("a.jsonl:3", "y")], id="jsonl"
        ),
        pytest.param("a.csv", "id,text\nk,x\n7,y\n", None, [("k", "x"), ("7", "y")], id="csv"),
        pytest.param("a.tsv", "text\tn\nx, y\t1\n", None, [("a.tsv:2", "x, y")], id="tsv"),
        pytest.param("a.csv", "body\nx\n", None, [("a.csv:2", "x")], id="the only column is the text"),
        pytest.param("a.csv", "\n\ntext\nx\n", None, [("a.csv:4", "x")], id="empty lines before a header"),
        pytest.param("a.log", "text\nx\n", "csv", [("a.log:2", "x")], id="format= goes before the ending"),
    ],
)
def test_each_kind_of_file_gives_its_rows(name: str, data: str, form: str | None, rows: list[tuple[str, str]]) -> None:
    items = read(file(name, data), form=form)
    wanted = [(name if form is None and name.endswith(("txt", "md")) else key, text) for key, text in rows]
    assert [(item.id, item.text) for item in items] == wanted


KOREAN = "id,text\n1,안녕하세요 여러분 오늘은 날씨가 좋습니다\n2,토성에는 고리가 있다\n3,서울은 한국의 수도입니다\n"


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        pytest.param("utf-8", None, id="UTF-8 is not told"),
        pytest.param("utf-8-sig", "utf-8-sig", id="UTF-8 with a mark"),
        pytest.param("utf-16", "utf-16", id="UTF-16 with a mark"),
        pytest.param("utf-32", "utf-32", id="UTF-32 with a mark"),
        pytest.param("cp949", "cp949", id="CP949 is guessed"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_encoding_is_found_and_said(encoding: str, told: str | None, ending: str) -> None:
    rows = list(csv.DictReader(io.StringIO(KOREAN)))
    data = KOREAN if ending == "csv" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    notes: list[str] = []
    items = read(file(f"a.{ending}", data.encode(encoding)), note=notes.append)
    assert [(item.id, item.text) for item in items] == [(row["id"], row["text"]) for row in rows]
    assert len(notes) == (told is not None)
    assert all(f"read as {told}" in note for note in notes)


@pytest.mark.parametrize("name", ["UTF-16", "utf_16_le", "cp949", "utf-8", "latin-1"])
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "with a mark"])
def test_a_named_encoding_is_kept_to(name: str, marked: bool) -> None:
    text = "café" if name == "latin-1" else "토성"
    data = f'{{"text": "{text}"}}\n{{"text": "b"}}\n'
    if marked and name.lower().startswith("utf"):
        data = "\ufeff" * (name != "UTF-16") + data
    notes: list[str] = []
    assert texts(read(file("a.jsonl", data.encode(name)), encoding=name, note=notes.append)) == [text, "b"]
    assert notes == []


@pytest.mark.parametrize("name", ["klingon", "rot13"])
def test_an_encoding_that_python_does_not_know_is_an_error_before_anything_is_read(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"encoding='{name}'"):
        Reader([], encoding=name)


@pytest.mark.parametrize(
    ("name", "data", "line", "reason"),
    [
        ("a.jsonl", b'{"text":"a"}\n{"text":"\xff"}\n{"text":"b"}\n', 2, "not utf-8: b'\\xff' at byte 9"),
        ("a.csv", b"text,n\na,1\n" + b"x,2\n" * 40 + b"\xff,3\nb,4\n", 43, "bytes in 'text' that are not utf-8"),
        ("a.csv", "text\nöä\nb\n".encode("utf-16")[:-1], 3, "bytes in 'text' that are not utf-16"),
        ("a.jsonl", '{"text":"a"}\n{"text":"b"}'.encode("utf-16")[:-1], 2, "bytes that are not utf-16"),
        ("a.txt", b"many\nlines\n" * 20 + b"\xff", 41, "not utf-8: b'\\xff'"),
    ],
    ids=["JSON lines", "CSV", "CSV in UTF-16", "JSON lines in UTF-16", "a text"],
)
def test_undecodable_bytes_cost_their_row_only(name: str, data: bytes, line: int, reason: str) -> None:
    items = read(file(name, data))
    assert [number for number, _ in rejects(items)] == [line]
    assert reason in rejects(items)[0][1]
    assert len(items) == 1 or len(items) > len(rejects(items))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{", "no JSON: ", id="broken"),
        pytest.param("[" * 100_000, "no JSON: maximum recursion", id="nested without end"),
        pytest.param("[1]", "no JSON object, but a list", id="a list"),
        pytest.param("null", "no JSON object, but null", id="null"),
        pytest.param('{"body":"a"}', "no 'text'; it has body", id="no text"),
        pytest.param("{}", "no 'text'; it has nothing", id="empty object"),
        pytest.param('{"text":null}', "no text", id="null text"),
        pytest.param('{"text":""}', "no text: it is empty", id="empty text"),
        pytest.param('{"text":3}', "the text is a number, not a string", id="number"),
        pytest.param('{"text":["a"]}', "the text is a list, not a string", id="list"),
        pytest.param('{"text":"a","id":1.5}', "'id' is a number, not a string or an integer", id="fraction as id"),
        pytest.param('{"text":"a","id":true}', "'id' is true or false, not", id="bool as id"),
        pytest.param('{"text":"a","id":{}}', "'id' is an object, not", id="object as id"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number_and_reason(line: str, reason: str) -> None:
    items = read(file("a.jsonl", f'{{"text":"first"}}\n\n{line}\n{{"text":"last"}}\n'))
    assert [item.text for item in items if isinstance(item, Row)] == ["first", "last"]
    ((number, told),) = rejects(items)
    assert number == 3
    assert told.startswith(reason)


def test_what_only_a_lenient_reader_takes_is_taken() -> None:
    items = read(file("a.jsonl", '{"text":"half \\ud83d","n":NaN,"id":"\\ud83d"}\n'))
    assert (items[0].text, items[0].id) == ("half \ud83d", "\ufffd")


def test_a_csv_with_quoted_newlines_counts_lines_as_an_editor_does() -> None:
    data = 'text,n\n"one\ntwo",1\nshort\n"a ""b""",2\n\nlong,3,4\nlast,5\n'
    items = read(file("a.csv", data))
    assert [(item.line, item.text) for item in items if isinstance(item, Row)] == [
        (2, "one\ntwo"),
        (5, 'a "b"'),
        (8, "last"),
    ]
    assert rejects(items) == [(4, "1 fields, the header has 2"), (7, "3 fields, the header has 2")]


def test_a_quote_left_open_swallows_no_row_silently() -> None:
    items = read(file("a.tsv", 'n\ttext\n1\tfine\n2\t"open\n3\tlost\n'))
    assert [item.text for item in items if isinstance(item, Row)] == ["fine"]
    assert rejects(items) == [(3, "no CSV: unexpected end of data")]


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("a.csv", "a,b\n1,2\n", {}, "which column is the text? It has a, b: name it by text_column "),
        ("a.csv", "a,b\n1,2\n", {"text_column": "c"}, "has no column 'c'; it has a, b"),
        ("a.csv", "text,b\n1,2\n", {"id_column": "c"}, "has no column 'c'; it has text, b"),
        ("a.csv", "text,b\r1,2\r", {}, "cannot be read as CSV: new-line"),
        ("a.csv", "text,값\n1,2\n".encode("cp949"), {"encoding": "utf-8"}, "header that are not utf-8; encoding "),
        ("a.parquet", b"no parquet", {}, "cannot be read as Parquet"),
        ("a.xlsx", b"", {}, "the ending '.xlsx' is none of .txt"),
    ],
    ids=["several columns", "no such text", "no such id", "lines of an old Mac", "header", "no Parquet", "ending"],
)
def test_a_file_that_cannot_be_read_is_a_sentence(name: str, data: bytes | str, options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(file(name, data), **options)
    assert message in str(caught.value)


def test_columns_are_carried_and_those_of_the_output_get_an_underscore() -> None:
    row = {"id": "k", "text": "t", "embedding": [1], "year": 1999, "tags": ["a", {"b": None}]}
    (item,) = read(file("a.jsonl", json.dumps(row)))
    assert item.columns == {"embedding_": [1], "year": 1999, "tags": ["a", {"b": None}]}
    (item,) = read("a.jsonl", text_column="year", id_column="text")
    assert (item.id, item.reason) == ("t", "the text is a number, not a string")
    (item,) = read(
        file("b.jsonl", '{"body": "b", "text": "t", "key": 5, "id": 6}'), text_column="body", id_column="key"
    )
    assert (item.id, item.text, item.columns) == ("5", "b", {"text_": "t", "id_": 6})


def test_only_the_named_columns_are_carried_and_one_that_is_not_there_is_told() -> None:
    notes: list[str] = []
    (item,) = read(file("a.csv", "text,b,c\nx,1,2\n"), columns=["c", "d"], note=notes.append)
    assert item.columns == {"c": "2"}
    assert notes == ["a.csv has no column 'd' to carry along; it has text, b, c"]
    (item,) = read("a.csv", columns=[])
    assert item.columns == {}


def test_a_named_id_column_must_have_an_id_in_every_row_and_an_unnamed_one_need_not() -> None:
    file("a.csv", "id,text\n,x\n0,y\n")
    assert [item.id for item in read("a.csv")] == ["a.csv:2", "0"]
    assert rejects(read("a.csv", id_column="id")) == [(2, "no 'id'")]


def test_parquet_columns_keep_their_types() -> None:
    day = dt.date(2024, 2, 29)
    columns = {
        "text": pa.array(["a", None, "c"], pa.large_string()),
        "id": pa.array([3, 4, 5], pa.int32()),
        "price": pa.array([Decimal("1.50")] * 3),
        "day": pa.array([day] * 3),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "raw": pa.array([b"\xff"] * 3),
        "tags": pa.array([["a"], [], None]),
    }
    parquet.write_table(pa.table(columns), "a.parquet")
    first, second, third = read("a.parquet")
    assert (second.line, second.id, second.reason) == (2, "4", "no text")
    assert (first.id, first.text, third.id, third.line) == ("3", "a", "5", 3)
    assert first.columns == {"price": Decimal("1.50"), "day": day, "kind": "x", "raw": b"\xff", "tags": ["a"]}


def test_folders_and_globs_give_each_file_once_in_order() -> None:
    for name in ("f/b.md", "f/a.txt", "f/sub/c.txt", "f/.hidden.txt", "f/_part.md", "f/d.jsonl"):
        file(name, '{"text": "x"}')
    assert [item.id for item in read("f")] == ["f/a.txt", "f/b.md", "f/sub/c.txt"]
    assert [item.id for item in read("f/*.md", "f", "./f/a.txt")] == ["f/_part.md", "f/b.md", "f/a.txt", "f/sub/c.txt"]
    assert [item.id for item in read("f/**/*.jsonl")] == ["f/d.jsonl:1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [("none.txt", "does not exist"), ("*.txt", "matches no file"), ("f", "it does hold .csv: name them by a glob")],
)
def test_an_input_that_is_not_there_is_told(given: str, message: str) -> None:
    file("f/a.csv", "text\nx\n")
    with pytest.raises(ConfigurationError, match=message):
        read(given)


@pytest.mark.parametrize(
    ("data", "rows"),
    [('{"text":"a"}\n{"text":"b"}\n', [["-:1", "a"], ["-:2", "b"]]), ("a\n\nb\n", [["-:1", "a"], ["-:3", "b"]])],
    ids=["JSON lines", "lines"],
)
def test_standard_input_is_told_by_its_first_line(data: str, rows: list[list[str]]) -> None:
    code = "import json; from vllm_embed.jobs._readers import Reader; from vllm_embed.jobs._inputs import sources"
    code += "; print(json.dumps([item[:2] for item in Reader(sources(['-']))]))"
    done = subprocess.run([sys.executable, "-c", code], input=data, text=True, stdout=subprocess.PIPE, timeout=60)
    assert json.loads(done.stdout) == rows


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXT, st.text(st.characters(codec="utf-8")))), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
)
def test_what_csv_and_json_wrote_is_read_back(rows: list[tuple[str, str]], encoding: str) -> None:
    with Path("a.csv").open("w", encoding=encoding, newline="") as out:
        csv.writer(out).writerows([("text", "n"), *rows])
    with Path("a.jsonl").open("w", encoding=encoding, newline="") as out:
        out.writelines(json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for text, n in rows)
    for name in ("a.csv", "a.jsonl"):
        items = read(name)
        assert texts(items) == [text for text, _ in rows]
        assert [item.columns["n"] for item in items] == [n for _, n in rows]
