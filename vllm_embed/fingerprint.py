"""`Fingerprint`: what makes these vectors these vectors."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vllm_embed._shape import is_unit, unit
from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

__all__ = ["CANARIES", "Comparison", "Fingerprint"]

CANARIES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset the password of my account?",
    "Saturn's rings are made of ice and rock, from dust grains to boulders.",
    "def add(a, b):\n\treturn a + b\n",
    "토성의 고리는 얼음과 돌로 이루어져 있다.",
    "東京は日本の首都です。",
    "القمر تابع للأرض",
    "Die Straße ist naß, und die Bäume blühen schön.",
    "👩‍💻 ships it 🚀",
    "1,234.56 EUR on 2024-02-29 at 23:59:59",
    "word " * 60,
    "a",
)
"""Texts whose vectors judge. Changing one makes fingerprints of other versions incomparable."""

_LEAST_COSINE = 0.9999
"""Another pooling does not pass. Another precision does, unless the model is deep: against float32, the canaries of
all-MiniLM-L6-v2 (6 layers) gave 0.999997 in float16 and 0.99992 in bfloat16, whose error grows with every layer."""
_PRECISION = 0.999
"""Least cosine from which another precision is the likely cause."""
_FORMAT = 1


@dataclass(frozen=True)
class Comparison:
    """What differs between an expected and a found fingerprint."""

    differences: tuple[tuple[str, str, str], ...]
    """What decides a vector and differs: its name, the expected value, the found one."""
    least_cosine: float | None
    """Over the canaries; None where the widths differ."""
    worst_text: str | None
    """The canary with the least cosine."""
    notes: tuple[tuple[str, str, str], ...] = ()
    """What differs and does not decide: model id, root, version."""

    @property
    def same(self) -> bool:
        """Whether vectors of one may stand beside those of the other."""
        return not self.differences

    @property
    def _near(self) -> bool:
        return self.least_cosine is not None and _PRECISION <= self.least_cosine < _LEAST_COSINE

    def __str__(self) -> str:
        if self.same:
            exact = self.least_cosine is not None and self.least_cosine > 1 - 1e-6
            head = "the same vectors" if exact else "the same vectors in another precision"
            lines = [f"{head}: least cosine {self.least_cosine:.7f}"]
        else:
            lines = [_row("", "expected", "found"), *(_row(*difference) for difference in self.differences)]
            if len(self.differences) == 1 and self._near:
                lines.append("so near, it is likely another precision: compare --dtype here and where this was saved")
        return "\n".join([*lines, *(_row(f"({name})", *values) for name, *values in self.notes)])


def _row(name: str, expected: str, found: str) -> str:
    return f"{name:<22}{expected:<34}{found}"


@dataclass(frozen=True)
class Fingerprint:
    """The settings that decide a vector, and the vectors of a dozen fixed texts, which are the judge.

    It holds no key, no address and no text of yours. Keep it beside the index that the vectors went into.

    Attributes:
        dimension: width.
        normalized: whether vectors have length 1, as measured.
        query_prompt: as resolved; "" is none.
        document_prompt: the same for documents.
        unicode: normalization form.
        long_text: rule for texts over the limit.
        vectors: of `CANARIES` without prompt, float32 of shape (12, dimension).
        model: its name, where it came from, and vLLM's version: kept to explain, not to decide.
        root: see model.
        version: see model.
    """

    dimension: int
    normalized: bool
    query_prompt: str
    document_prompt: str
    unicode: str | None
    long_text: str
    vectors: NDArray[np.float32] = field(repr=False, compare=False)
    model: str
    root: str | None = None
    version: str | None = None

    @classmethod
    def of(cls, vectors: NDArray[np.float32], **fields: Any) -> Fingerprint:
        """From the canaries' vectors; what can be measured of them is."""
        return cls(dimension=vectors.shape[1], normalized=is_unit(vectors), vectors=vectors, **fields)

    def compare(self, other: Fingerprint) -> Comparison:
        """What of `other` differs from this, the expected one."""
        differences = [
            (name, _told(getattr(self, name)), _told(getattr(other, name)))
            for name in ("dimension", "normalized", "query_prompt", "document_prompt", "unicode", "long_text")
            if getattr(self, name) != getattr(other, name)
        ]
        least, worst = None, None
        if self.dimension == other.dimension:
            cosines = np.sum(unit(self.vectors) * unit(other.vectors), axis=1)
            place = int(np.argmin(cosines))
            least, worst = float(cosines[place]), CANARIES[place]
            if least < _LEAST_COSINE:
                differences.append(("canaries' cosine", f">= {_LEAST_COSINE}", f"{least:.4f} for {worst[:40]!r}"))
        notes = [
            (name, _told(getattr(self, name)), _told(getattr(other, name)))
            for name in ("model", "root", "version")
            if getattr(self, name) != getattr(other, name)
        ]
        return Comparison(tuple(differences), least, worst, tuple(notes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "vectors"}
        data["vectors"] = base64.b64encode(self.vectors.astype("<f4").tobytes()).decode()
        target = Path(path)
        scratch = target.with_name(f"{target.name}.part")
        scratch.write_text(
            json.dumps({"vllm_embed_fingerprint": _FORMAT, "canaries": _canaries(), **data}, indent=1), "utf8"
        )
        scratch.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fingerprint:
        """Read what `save` wrote.

        Raises:
            ConfigurationError: it cannot be read, is no fingerprint, or was made with other canaries.
        """
        try:
            data = json.loads(Path(path).read_text("utf8"))
            form, canaries = data.pop("vllm_embed_fingerprint"), data.pop("canaries")
            raw = np.frombuffer(base64.b64decode(data.pop("vectors")), dtype="<f4")
            made = cls(vectors=raw.reshape(len(CANARIES), data["dimension"]).astype(np.float32), **data)
        except FileNotFoundError as exc:
            raise ConfigurationError(f"no fingerprint at {path}: embedder.fingerprint().save(path) makes one") from exc
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigurationError(f"{path} is no fingerprint that this version reads: {exc!r}") from exc
        if form != _FORMAT or canaries != _canaries():
            raise ConfigurationError(
                f"{path} was made by another version of vllm-embed, with other texts: make it anew"
            )
        return made


def _told(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _canaries() -> str:
    return hashlib.sha256("\0".join(CANARIES).encode()).hexdigest()[:16]
