"""Width and length of the vectors, whatever serves them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_embed import _wire
from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vllm_embed._backend import Backend
    from vllm_embed.errors import VLLMEmbedError
    from vllm_embed.settings import Settings

__all__ = ["Shape", "is_unit", "unit"]

_PROBE = "a"
_UNIT = 1e-3
"""How far from 1 the length of a unit vector may be: float16 models give 1 +- 5e-4."""


def is_unit(vectors: NDArray[np.float32]) -> bool:
    """Whether every row has length 1, within float16's precision."""
    return bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT).all())


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)
    return scaled


class Shape:
    """Decides what is asked of the backend for `dimensions` and `normalize`, and what is done here.

    Args:
        backend: asked once for one vector of its own width, when `dimensions` is set.
        settings: `dimensions`, `dimensions_fallback`, `normalize`.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._width = settings.dimensions
        self._may_cut = settings.dimensions_fallback == "client"
        self._normalize = settings.normalize
        self._native = 0
        self._cut = False
        self._lock = threading.Lock()

    def fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request's fields: without `dimensions` where that is the native width, or is cut here.

        Raises:
            Failed: the probe for the native width failed.
            ConfigurationError: more dimensions than the model has.
        """
        if self._width is None:
            return fields
        plain = {name: value for name, value in fields.items() if name != "dimensions"}
        with self._lock:
            if not self._native:
                self._native = self._backend.send([_PROBE], plain).vectors.shape[1]
        if self._width > self._native:
            raise ConfigurationError(f"dimensions={self._width}: the model has {self._native}; at most that many")
        return plain if self._cut or self._width == self._native else fields

    def cuts_instead(self, error: VLLMEmbedError, sent: Mapping[str, Any]) -> bool:
        """Whether a refusal of `dimensions` is made up for here: then the request is to be sent again.

        Several requests may be refused before the first refusal is known.
        """
        asked = self._width is not None and "dimensions" in sent
        if self._may_cut and asked and _wire.refuses_dimensions(error):
            self._cut = True
            return True
        return False

    def finish(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows as the caller is to get them.

        Raises:
            ConfigurationError: raw vectors were asked for and unit vectors came.
        """
        if self._width is not None and vectors.shape[1] > self._width:
            normalized = is_unit(vectors)
            vectors = vectors[:, : self._width]
            vectors = unit(vectors) if normalized else vectors
        if self._normalize and not is_unit(vectors):
            return unit(vectors)
        if self._normalize is False and self._width is None and is_unit(vectors):
            raise ConfigurationError(
                "normalize=False asks for raw vectors, but unit vectors came: this server does not know use_activation "
                "(vLLM before 0.10.2, or a gateway that drops it), or its model's raw vectors have length 1"
            )
        return vectors
