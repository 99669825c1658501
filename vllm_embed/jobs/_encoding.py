"""Which encoding a file has: UTF-8 wherever it can be, else a guess that is told."""

from __future__ import annotations

import codecs
from typing import Final

from vllm_embed._extras import needs
from vllm_embed.errors import ConfigurationError

__all__ = ["BROKEN", "WIDE", "check", "guess", "marked", "named", "undecodable", "whole"]

_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

WIDE: Final = ("utf-16", "utf-32")
"""Encodings in which a line feed is not one byte begin so."""

BROKEN: Final = "vllm_embed.broken"
"""As `surrogateescape`, for encodings whose letters are not bytes: what cannot be read stays in, marked."""

codecs.register_error(BROKEN, lambda exc: ("\udcff", exc.end))  # type: ignore[attr-defined]

_MARKED: Final = ["utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7"]
"""What without its mark is a poor guess: any two bytes are a letter of it."""


def guess(sample: bytes, least: float = 0.1) -> str:
    """The encoding of a file that begins with `sample`.

    UTF-8 where most lines that hold more than ASCII are UTF-8, or few lines are not: those are broken lines, for the
    rejects. Else charset-normalizer's guess.

    Args:
        sample: of a file; its last line may be cut.
        least: share of all lines that must not be UTF-8 for a guess.
    """
    if name := marked(sample):
        return name
    lines = sample.split(b"\n")
    if len(lines) > 1:
        del lines[-1]  # empty, or cut in the middle of a letter
    letters = [line for line in lines if not line.isascii()]
    broken = [line for line in letters if not _is_utf8(line)]
    if 2 * len(broken) <= len(letters) or len(broken) < least * len(lines):
        return "utf-8"
    with needs("jobs"):
        from charset_normalizer import from_bytes  # noqa: PLC0415 - extra

    best = from_bytes(b"\n".join(broken), cp_exclusion=_MARKED).best()
    return _widest(best.encoding) if best else "utf-8"


def marked(sample: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((name for mark, name in _BOMS if sample.startswith(mark)), None)


def check(name: str) -> None:
    """Look that Python knows an encoding.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        "a".encode(name)
    except LookupError as exc:
        raise ConfigurationError(f"encoding={name!r}: {exc}") from exc


def named(name: str, sample: bytes) -> str:
    """An encoding as Python calls it, and with its mark where a file that begins with `sample` has one."""
    known = codecs.lookup(name).name
    mark = marked(sample)
    return mark if mark and mark.startswith(known[:6].rstrip("-")) else known


def _widest(name: str) -> str:
    """What Windows writes under a name: the same letters and some more."""
    wider = {"euc_kr": "cp949", "johab": "cp949", "shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030"}
    return wider.get(name, name)


def _is_utf8(line: bytes) -> bool:
    """Whether it is, but for a letter that is cut at the end."""
    try:
        codecs.utf_8_decode(line, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def whole(text: str) -> bool:
    """Whether no byte of it was kept undecoded."""
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def undecodable(exc: UnicodeError) -> str:
    """Why, for a row's reject."""
    if isinstance(exc, UnicodeDecodeError):
        return f"bytes that are not {exc.encoding}: {exc.object[exc.start : exc.end]!r} at byte {exc.start}"
    return f"bytes that cannot be decoded: {exc}"
