"""Cleaning and prompting, without a server."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_embed._text import clean, prepare, prompted

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)  # surrogates included


@pytest.mark.parametrize(
    ("given_text", "cleaned"),
    [
        pytest.param("plain text\n\twith  space ", "plain text\n\twith  space ", id="spaces, newlines and case stay"),
        pytest.param("한국어".encode().decode(), "한국어", id="composed Hangul stays"),
        pytest.param(unicodedata.normalize("NFD", "한국어"), "한국어", id="decomposed Hangul from macOS is composed"),
        pytest.param("\ud83d\ude00!", "😀!", id="a surrogate pair is joined"),
        pytest.param("a\ud83d b\ude00", "a\ufffd b\ufffd", id="lone surrogates become U+FFFD"),
        pytest.param("\ufeffhead", "head", id="a leading byte order mark goes"),
        pytest.param("he\ufeffad", "he\ufeffad", id="a byte order mark inside stays"),
        pytest.param("n\0u\0l", "nul", id="NULs go"),
        pytest.param("\0\ufeffx", "x", id="a byte order mark behind a NUL is leading"),
        pytest.param("👩\u200d💻", "👩\u200d💻", id="joiners stay"),
        pytest.param("①ﬁ", "①ﬁ", id="compatibility characters stay under NFC"),
        pytest.param("", "", id="nothing stays nothing"),
    ],
)
def test_clean_mends_only_what_breaks(given_text: str, cleaned: str) -> None:
    assert clean(given_text, "nfc") == cleaned


def test_nfkc_folds_compatibility_characters() -> None:
    assert clean("①ﬁ", "nfkc") == "1fi"


def test_none_sends_the_text_as_it_is() -> None:
    text = "\ufeff" + unicodedata.normalize("NFD", "한") + "\0"
    assert clean(text, None) == text


@given(ANY_TEXT, st.sampled_from(["nfc", "nfkc"]))
def test_cleaned_text_is_valid_utf8_without_nuls_and_cleaning_again_changes_nothing(text: str, form: str) -> None:
    once = clean(text, form)
    once.encode()
    assert "\0" not in once
    assert clean(once, form) == once


@given(st.text(max_size=60))
def test_valid_text_loses_nothing_but_nuls_and_a_leading_mark(text: str) -> None:
    expected = unicodedata.normalize("NFC", text.replace("\0", "").lstrip("\ufeff"))
    assert clean(text, "nfc") == expected


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        (None, "text"),
        ("", "text"),
        ("query: ", "query: text"),
        ("query:", "query:text"),
        ("<{text}>", "<text>"),
        ("{text} {text}", "text text"),
    ],
)
def test_a_prompt_is_an_exact_prefix_or_a_template(prompt: str | None, sent: str) -> None:
    assert prompted("text", prompt) == sent


def test_braces_in_the_text_itself_are_not_a_template() -> None:
    assert prompted("{text} {0}", "query: ") == "query: {text} {0}"


class _Shouting(str):
    def __str__(self) -> str:
        return "another text"

    def encode(self, *_: object) -> bytes:
        raise AssertionError("overridden methods are not called")


def test_a_subclass_of_str_is_its_text() -> None:
    prepared = prepare([_Shouting("ünder")], prompt=None, unicode="nfc", blank_text="send")
    assert prepared.texts == ["ünder"]
    assert type(prepared.texts[0]) is str


@pytest.mark.parametrize("value", [None, 1, b"bytes", ["nested"]])
def test_anything_but_a_str_is_refused_by_its_index_and_type(value: object) -> None:
    prepared = prepare(["fine", value], prompt=None, unicode="nfc", blank_text="send")
    assert list(prepared.refused) == [1]
    assert ("None" if value is None else type(value).__name__) in str(prepared.refused[1])


def test_without_normalization_a_lone_surrogate_is_refused_and_its_place_named() -> None:
    prepared = prepare(["ok", "ab\ud800"], prompt=None, unicode=None, blank_text="send")
    assert "character 2" in str(prepared.refused[1])


def test_blank_is_judged_before_the_prompt() -> None:
    texts = ["", " \n\t", "\0", "x"]
    assert prepare(texts, prompt="q: ", unicode="nfc", blank_text="send").texts == ["q: ", "q:  \n\t", "q: ", "q: x"]
    assert prepare(texts, prompt="q: ", unicode="nfc", blank_text="zero").zero == [0, 1, 2]
    assert list(prepare(texts, prompt="q: ", unicode="nfc", blank_text="error").refused) == [0, 1, 2]
