from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llama_index_conformance.observers import awaited, sync, sync_in_a_running_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llama_index.core.base.embeddings.base import BaseEmbedding

TEXTS = (
    "Saturn has rings of ice and rock.",
    "Bread rises because yeast makes gas.",
    "The river floods every spring.",
    "Two violins, a viola and a cello play together.",
    "def add(a, b):\n\treturn a + b",
    "토성에는 고리가 있다.",
    "Glass is made from sand.",
    "Whales sing to each other over great distances.",
    "A prime number has two divisors.",
    "The goalkeeper saved the penalty.",
)
QUESTION = "Does Saturn have rings of rock?"

HOOKS = (
    "_get_query_embedding",
    "_aget_query_embedding",
    "_get_text_embedding",
    "_aget_text_embedding",
    "_get_text_embeddings",
    "_aget_text_embeddings",
)


class Basis:
    """What a subclass gives, and how vectors are judged.

    Attributes:
        least_cosine: between a vector and its reference.
        secrets: texts that no dump, payload or repr may hold.
        process_timeout_s: for pipelines in processes of their own, imports included.
    """

    least_cosine: float = 0.99999
    secrets: Sequence[str] = ()
    process_timeout_s: float = 120.0

    def make(self, **options: Any) -> BaseEmbedding:
        """A new embedding, of the same model and the same server whenever it is called."""
        raise NotImplementedError

    def reference(self, text: str) -> Sequence[float]:
        """The right vector of a document."""
        raise NotImplementedError

    def query_reference(self, text: str) -> Sequence[float]:
        """The right vector of a query; a document's, where the model makes no difference."""
        return self.reference(text)

    def transport(self) -> dict[str, Any]:
        """What `from_dict` needs beside the dict, such as an address and a key."""
        return {}

    @pytest.fixture(params=[sync, awaited, sync_in_a_running_loop], ids=lambda door: door.__name__)
    def door(self, request: pytest.FixtureRequest) -> Callable[..., Any]:
        """`door(embedding, sync name of a method, *args)`: calls it sync, async, or sync inside a running loop."""
        found: Callable[..., Any] = request.param
        return found

    def check(self, vector: Any, text: str, *, query: bool = False) -> None:
        """Assert that a vector is this text's, and a list of Python floats."""
        right = np.asarray(self.query_reference(text) if query else self.reference(text), dtype=np.float64)
        assert type(vector) is list
        assert {type(number) for number in vector} == {float}
        assert len(vector) == len(right)
        cosine = float(np.dot(vector, right) / (np.linalg.norm(vector) * np.linalg.norm(right)))
        assert cosine >= self.least_cosine, f"not the vector of {text!r}: cosine {cosine:.6f}"

    def check_all(self, vectors: Any, texts: Sequence[str] = TEXTS) -> None:
        """Assert that each vector is its text's, in order."""
        assert type(vectors) is list
        assert len(vectors) == len(texts)
        for vector, text in zip(vectors, texts, strict=True):
            self.check(vector, text)

    def check_hides_secrets(self, shown: Any) -> None:
        """Assert that a thing shows no secret."""
        for secret in self.secrets:
            assert secret not in str(shown)
