"""Texts in pieces: no piece over its size by the server's own count, and changed texts leave no old piece."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _outputs import ENDINGS, rows_of
from langchain_text_splitters import RecursiveCharacterTextSplitter

from vllm_embed import errors, jobs
from vllm_embed.testing import FakeVLLMServer, count_tokens

Embed = Callable[..., jobs.Summary]

TEXTS = {
    "prose": "The bridge over the river was closed in winter. Nobody crossed it.\n\n" * 30,
    "korean": "겨울에는 강을 건너는 다리가 닫혔고, 얼음이 녹을 때까지 아무도 건너지 않았다. " * 20,
    "one word": "supercalifragilistic" * 60,
    "signs": "!?;.,-+" * 80,
    "mixed": "a " * 300 + "incomprehensibilities " * 50,
}


def pieces_of(rows: list[dict], key: str) -> list[str]:
    found = [row for row in rows if row["id"].rpartition("#")[0] == key]
    assert [row["id"] for row in found] == [f"{key}#{n}" for n in range(len(found))]
    return [row["text"] for row in found]


@pytest.mark.parametrize("size", [1, 7, 40, 254])
def test_in_tokens_no_piece_is_over_the_size_by_the_servers_count(embed: Embed, tmp_path: Path, size: int) -> None:
    summary = embed([{"id": key, "text": text, "kind": key} for key, text in TEXTS.items()], chunk_size=size)
    rows = rows_of(tmp_path / "x.parquet")
    assert summary.status == 0
    assert all(count_tokens(row["text"]) - 2 <= size for row in rows)
    for key, text in TEXTS.items():
        assert "".join("".join(pieces_of(rows, key)).split()) == "".join(text.split())
    assert all(row["kind"] == row["id"].partition("#")[0] for row in rows)


@pytest.mark.parametrize("prompt", [None, "passage: ", "query: {text} end"])
@pytest.mark.parametrize("blank", ["send", "zero", "error"])
def test_the_prompt_and_special_tokens_are_not_counted(
    embed: Embed, tmp_path: Path, prompt: str | None, blank: str
) -> None:
    embed([{"id": "a", "text": "word " * 50}], chunk_size=10, document_prompt=prompt, blank_text=blank)
    assert {count_tokens(row["text"]) - 2 for row in rows_of(tmp_path / "x.parquet")} == {10}


def test_letters_that_become_several_are_counted_as_they_are_sent(embed: Embed, tmp_path: Path, received) -> None:
    embed([{"id": "a", "text": "\ufdfa" * 40}], chunk_size=12, unicode="nfkc")
    pieces = [text for text in received if "\u0635" in text]
    assert pieces
    assert all(count_tokens(text) - 2 <= 12 for text in pieces)


@pytest.mark.parametrize(("size", "overlap"), [(80, 0), (200, 40)])
def test_in_characters_they_are_langchains(embed: Embed, tmp_path: Path, size: int, overlap: int) -> None:
    rows = [{"id": key, "text": text} for key, text in TEXTS.items()]
    embed(rows, chunk_size=size, chunk_overlap=overlap, chunk_unit="characters")
    found = rows_of(tmp_path / "x.parquet")
    splitter = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=overlap)
    for key, text in TEXTS.items():
        assert pieces_of(found, key) == splitter.split_text(text)


def test_an_overlap_repeats_the_end_of_the_piece_before(embed: Embed, tmp_path: Path) -> None:
    embed([{"id": "a", "text": " ".join(f"w{n}" for n in range(200))}], chunk_size=20, chunk_overlap=5)
    found = pieces_of(rows_of(tmp_path / "x.parquet"), "a")
    for one, other in itertools.pairwise(found):
        assert set(one.split()) & set(other.split())


@pytest.mark.parametrize("ending", ENDINGS)
def test_surplus_pieces_of_a_changed_text_go_without_prune(embed: Embed, tmp_path: Path, ending: str) -> None:
    texts = {"a": "one two ten six", "b": "red hot"}
    options = {"chunk_size": 4, "chunk_unit": "characters", "output": f"x{ending}"}
    embed([{"id": key, "text": text} for key, text in texts.items()], **options)
    summary = embed([{"id": "a", "text": "one two"}], **options)
    rows = rows_of(tmp_path / f"x{ending}")
    assert pieces_of(rows, "a") == ["one", "two"]
    assert pieces_of(rows, "b") == ["red", "hot"]
    assert (summary.pruned, summary.removed, summary.skipped) == (2, 2, 2)


def test_another_size_replaces_the_pieces(server: FakeVLLMServer, embed: Embed, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "one two ten six red hot"}]
    embed(rows, chunk_size=4, chunk_unit="characters")
    summary = embed(rows, chunk_size=12, chunk_unit="characters")
    found = rows_of(tmp_path / "x.parquet")
    assert [row["text"] for row in found] == ["one two ten", "six red hot"]
    assert (summary.replaced, summary.pruned) == (2, 4)
    np.testing.assert_array_equal(found[0]["embedding"], server.vector("one two ten"))


def test_a_limit_counts_texts_and_leaves_each_whole(embed: Embed, tmp_path: Path) -> None:
    embed([{"id": key, "text": "one two ten"} for key in "abc"], chunk_size=4, chunk_unit="characters", limit=2)
    assert [row["id"] for row in rows_of(tmp_path / "x.parquet")] == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]


def test_a_text_of_white_space_and_bad_rows_are_rejected(embed: Embed) -> None:
    summary = embed([{"id": "a", "text": " \n "}, {"text": None}, {"id": "b", "text": "x"}], chunk_size=5)
    assert (summary.rejected, summary.rows) == (2, 1)
    assert "only whitespace" in Path(summary.rejects).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0: at least 1"),
        ({"chunk_size": 5, "chunk_overlap": 5}, "chunk_overlap=5: at least 0 and less than chunk_size, which is 5"),
        ({"chunk_size": 300}, "chunk_size=300 tokens and 2 for the prompt .* limit of 256: at most 254"),
        ({"chunk_size": 5, "chunk_unit": "words"}, 'chunk_unit=\'words\': "tokens" or "characters"'),
    ],
    ids=["nothing", "all overlap", "over the limit", "unit"],
)
def test_sizes_that_cannot_work_are_told(embed: Embed, options: dict, message: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=message):
        embed([{"text": "a"}], **options)


def test_counting_fails_as_embedding_does_when_the_server_is_gone(tmp_path: Path) -> None:
    with FakeVLLMServer() as server:
        url = server.base_url
    options = {"base_url": url, "model": "m", "max_retries": 0}
    with pytest.raises(errors.ServerUnreachableError):
        jobs.embed([{"text": "a b c"}], tmp_path / "x.jsonl", chunk_size=1, **options)


def test_many_texts_are_split_side_by_side_and_stay_in_order(embed: Embed, tmp_path: Path) -> None:
    embed([{"id": n, "text": f"text {n} " * (60 if n % 9 == 0 else 2)} for n in range(100)], chunk_size=20)
    rows = rows_of(tmp_path / "x.parquet")
    assert list(dict.fromkeys(row["id"].partition("#")[0] for row in rows)) == [str(n) for n in range(100)]
    for n in range(100):
        assert "".join(" ".join(pieces_of(rows, str(n))).split()) == f"text{n}" * (60 if n % 9 == 0 else 2)


def test_a_text_that_cannot_be_counted_is_rejected_and_the_rest_is_done(embed: Embed, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "half \ud83d"}, {"id": "b", "text": "whole"}]
    summary = embed(rows, chunk_size=5, unicode=None)
    assert (summary.rejected, [row["id"] for row in rows_of(tmp_path / "x.parquet")]) == (1, ["b#0"])
    assert "lone surrogate" in Path(summary.rejects).read_text()


def test_each_text_is_embedded_once(embed: Embed, received: Counter) -> None:
    embed([{"id": key, "text": "one two one two"} for key in "ab"], chunk_size=4, chunk_unit="characters")
    assert (received["one"], received["two"]) == (1, 1)
