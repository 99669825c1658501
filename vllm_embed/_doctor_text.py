"""The doctor's check of what the model reads: text through the server's tokenizer and back."""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import TYPE_CHECKING, Final

from vllm_embed._doctor_patient import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_embed._doctor_patient import Patient

__all__ = ["text_intact"]

_SAMPLES: Final = {
    "Korean": "토성의 고리는 얼음과 돌이다.",
    "Japanese": "東京は日本の首都です。",
    "emoji": "ships it 🚀 👩‍💻",
    "accents": "Die Straße, der Café, naïve",
    "decomposed Korean (NFD)": unicodedata.normalize("NFD", "한글 문장"),
    "a NUL": "zero\0 byte",
    "code": "if a < b:\n\treturn a",
}
_UNKNOWN = re.compile(r"\[UNK\]|<unk>|�")
_SPECIAL = re.compile(r"\[(?:CLS|SEP|PAD)\]|</?s>|<pad>|<\|[a-z_]+\|>")
_ALIKE = 0.5  # of the characters; less is another text


def text_intact(patient: Patient) -> Iterator[Finding]:
    """Each sample through the server's tokenizer and back, and as many tokens in the embedding request."""
    read: dict[str, tuple[str, str]] = {}
    tokens = 0
    for name, sample in _SAMPLES.items():
        sent = patient.embedder.preview(sample, prompt="")
        ids = patient.ask("tokenize", prompt=sent)
        back = patient.ask("detokenize", tokens=ids["tokens"]) if ids and "tokens" in ids else None
        if ids is None or back is None:
            yield Finding(
                "text",
                "warning",
                "whether text arrives intact cannot be seen: /tokenize and /detokenize are hidden",
                "Let the gateway pass both routes on, or ask the server behind it.",
            )
            return
        tokens += len(ids["tokens"])
        read[name] = sent, _SPECIAL.sub("", str(back.get("prompt"))).strip()
    seen = {name: _difference(*pair) for name, pair in read.items()}
    for name, how in seen.items():
        if how in ("broken", "changed"):
            sent, got = read[name]
            yield Finding(
                "text",
                "wrong" if how == "broken" else "warning",
                f"text does not arrive intact, {name}: sent {sent!r}, the model reads {got!r}",
                "See what stands between here and vLLM (a gateway that re-encodes text), and vLLM's --tokenizer.",
            )
    unknown = [name for name, how in seen.items() if how == "unknown"]
    folded = [name for name, how in seen.items() if how == "folded"]
    intact = [name for name, how in seen.items() if how == "intact"]
    notes = [f"{', '.join(intact)} come back as sent"] if intact else []
    notes += [f"the model ignores case, accents or forms in {', '.join(folded)}"] if folded else []
    notes += [f"its vocabulary lacks characters ([UNK]) of {', '.join(unknown)}"] if unknown else []
    if notes:
        yield Finding("text", "info", f"text through the server's tokenizer and back: {'; '.join(notes)}")
    sent_texts = [sent for sent, _ in read.values()]
    _, counted = patient.embed_raw(input=sent_texts, encoding_format="float")
    if counted and counted != tokens:
        yield Finding(
            "tokens",
            "warning",
            f"/v1/embeddings read {counted} tokens where /tokenize gives {tokens}: not the same text or special tokens",
            "Compare with --reference whether the vectors are right.",
        )


def _difference(sent: str, got: str) -> str:
    """How a text came back: intact, folded, unknown, changed, broken. White space is not compared."""
    a, b = "".join(sent.split()), "".join(got.split())
    if a == b:
        return "intact"
    if _folded(a) == _folded(b):
        return "folded"
    if _UNKNOWN.search(b):
        return "unknown"
    return "changed" if difflib.SequenceMatcher(None, _folded(a), _folded(b)).ratio() >= _ALIKE else "broken"


def _folded(text: str) -> str:
    kept = (c for c in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(c) not in ("Mn", "Cf"))
    return "".join(kept)
