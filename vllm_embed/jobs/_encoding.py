"""Which encoding a file has: UTF-8 wherever it can be, else a guess that is told."""

from __future__ import annotations

import codecs
from typing import Final

__all__ = ["guess"]

_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_MOST_BROKEN: Final = 0.5
"""Share of the lines beyond ASCII that may not be UTF-8 in a file that is, with broken lines."""

_MARKED: Final = ["utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7"]
"""What without its mark is a poor guess: any two bytes are a letter of it."""


def guess(sample: bytes) -> str:
    """The encoding of a file that begins with `sample`.

    UTF-8 when at least half of the lines that hold more than ASCII are UTF-8: the others are broken lines, for the
    rejects. Else charset-normalizer's guess; with nothing to go by, "utf-8".
    """
    for mark, name in _BOMS:
        if sample.startswith(mark):
            return name
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    if len(lines) > 1:
        lines = lines[:-1] if not sample.endswith(b"\n") else lines  # the last may be cut in the middle of a letter
    broken = [line for line in lines if not _is_utf8(line)]
    if len(broken) <= len(lines) * _MOST_BROKEN and not (len(lines) == len(broken) == 1):
        return "utf-8"
    from charset_normalizer import from_bytes  # noqa: PLC0415 - extra

    best = from_bytes(b"\n".join(broken), cp_exclusion=_MARKED).best()
    return _widest(best.encoding) if best else "utf-8"


def _widest(name: str) -> str:
    """What Windows writes under a name: the same letters and some more."""
    wider = {"euc_kr": "cp949", "johab": "cp949", "shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030"}
    return wider.get(name, name)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
