"""From the caller's texts to the texts that are sent: pure functions, no setting but those passed in."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vllm_embed.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Prepared", "clean", "prepare", "prompted"]

_FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}
_BLANK_REFUSED = 'blank_text="error" refuses a text without a visible character'


class Prepared(NamedTuple):
    """Texts as they are sent, and what is not sent."""

    texts: list[str]
    """One for each of the caller's; "" at `refused` and `zero`."""
    refused: dict[int, InvalidInputError]
    """Texts that cannot be sent, each with its reason."""
    cleaned: list[str]
    """The same without the prompt."""
    zero: list[int]
    """Blank texts that become a vector of zeros."""


def clean(text: str, unicode: Literal["nfc", "nfkc"] | None) -> str:
    """Make a text that any JSON parser and tokenizer takes.

    Surrogate pairs are joined and lone surrogates become U+FFFD; NULs and a leading byte order mark go; then the
    normalization form. Newlines, spaces and case stay. Cleaning twice gives the same as cleaning once.

    Args:
        text: any str.
        unicode: "nfc", "nfkc", or None for the text as it is.
    """
    if unicode is None or (text.isascii() and "\0" not in text):
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # a scraper's "\ud83d\ude00", or half of it
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = text.replace("\0", "").lstrip("\ufeff")
    return unicodedata.normalize(_FORMS[unicode], text)


def prompted(text: str, prompt: str | None) -> str:
    """The text with its prompt: a prefix, or a template with `{text}`. No space is added, nothing is stripped."""
    if not prompt:
        return text
    return prompt.replace("{text}", text) if "{text}" in prompt else prompt + text


def prepare(
    texts: Iterable[Any],
    *,
    prompt: str | None,
    unicode: Literal["nfc", "nfkc"] | None,
    blank_text: Literal["send", "zero", "error"],
) -> Prepared:
    """Clean and prompt every text; a text that cannot be sent is refused by itself."""
    sent: list[str] = []
    bare: list[str] = []
    refused: dict[int, InvalidInputError] = {}
    zero: list[int] = []
    for index, text in enumerate(texts):
        out = plain = ""
        if not isinstance(text, str):
            refused[index] = InvalidInputError(f"a text must be a str, this is {_named(text)}")
        else:
            out = plain = clean(str.__str__(text), unicode)  # the text of a subclass, whatever it overrides
            if unicode is None and (flaw := _unsendable(out)):
                refused[index] = InvalidInputError(flaw)
            elif blank_text != "send" and not out.strip():
                if blank_text == "zero":
                    zero.append(index)
                else:
                    refused[index] = InvalidInputError(_BLANK_REFUSED)
            else:
                out = prompted(out, prompt)
        sent.append(out)
        bare.append(plain)
    for index in refused:
        sent[index] = ""
    return Prepared(sent, refused, bare, zero)


def _unsendable(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        return f'UTF-8 cannot hold the lone surrogate at character {exc.start}; unicode="nfc" replaces it by U+FFFD'
    return None


def _named(value: Any) -> str:
    kind = type(value)
    return "None" if value is None else f"a {kind.__qualname__}"
