"""The fake model: vectors as functions of the text alone, the same in every process and, nearly, on every machine."""

import hashlib
import re
import sys
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float32]
Encoded: TypeAlias = str | orjson.Fragment  # what stands in a reply's `embedding`

CACHE_BYTES = 64 * 1024 * 1024
EXACT_TEXT_SHARE = np.float32(0.25)  # of the words' length: tells any two texts apart, hides no common words

_WORD = re.compile(r"\w+")


class Form(NamedTuple):
    """How a request wants its vectors."""

    dimensions: int | None = None
    use_activation: bool = True
    encoding: Literal["float", "base64"] = "float"
    big_endian: bool = sys.byteorder == "big"


AS_THE_MODEL_DOES = Form()


def encode(vector: Vector, form: Form) -> Encoded:
    """Base64 of the raw array, or a list of floats in which NaN is null."""
    if form.encoding == "base64":
        return pybase64.b64encode_as_string(vector.astype(">f4" if form.big_endian else "<f4").tobytes())
    return orjson.Fragment(orjson.dumps(np.ascontiguousarray(vector), option=orjson.OPT_SERIALIZE_NUMPY))


class FakeModel:
    r"""Texts that share words get near vectors, and no two texts the same.

    A text's vector is the sum of one random vector per word (`\w+`, lower case), shortened to one word's length, plus a
    smaller one drawn from the exact text. Before normalization the length of a text with words is about 1.5 to 5.5.
    """

    def __init__(self, dimension: int, *, normalize: bool = True) -> None:
        self.dimension = dimension
        self.normalize = normalize
        self._scale = np.float32((3 / dimension) ** 0.5 / 32_768)  # makes the length of a draw about 1
        entries = max(256, CACHE_BYTES // (6 * dimension))  # base64 takes 5.3 bytes for a float
        self.encoded = lru_cache(maxsize=entries)(self._encode)
        self._word = lru_cache(maxsize=entries)(self._new_word)

    def vector(self, text: str, form: Form = AS_THE_MODEL_DOES) -> Vector:
        """The vector of `text`, shape (form.dimensions or dimension,), of unit length unless raw ones are asked for."""
        exact = self._draw(f"text {text}")
        words = _WORD.findall(text.lower())
        vector = exact * EXACT_TEXT_SHARE
        if words:
            vector += np.add.reduce([self._word(word) for word in words]) * np.float32(len(words) ** -0.5)
        vector = vector[: form.dimensions]
        if self.normalize and form.use_activation:
            return _unit(vector)
        return vector * np.float32(1.5 + 4 * abs(float(exact[0] / self._scale)) / 32_768)

    def _encode(self, text: str, form: Form) -> Encoded:
        return encode(self.vector(text, form), form)

    def _new_word(self, word: str) -> Vector:
        return self._draw(f"word {word}")

    def _draw(self, seed: str) -> Vector:
        raw = hashlib.shake_128(seed.encode("utf-8", "surrogatepass")).digest(2 * self.dimension)
        return np.frombuffer(raw, "<i2") * self._scale


def _unit(vector: Vector) -> Vector:
    unit: Vector = vector / np.sqrt(np.float32(vector @ vector))
    return unit
