"""What is right: sentence-transformers, and the mean over pieces of a long text made from token ids."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest

from vllm_embed._chunk import split

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEAST_COSINE", "LIMIT", "PROMPTS", "SENTENCES", "TEXTS", "Reference", "cosines", "of_tokens", "unit"]

LEAST_COSINE = 0.99999
LIMIT = 256
TEXTS = [
    "Saturn has rings of ice and rock.",
    "토성의 고리는 얼음과 돌로 이루어져 있다.",
    "def add(a, b):\n\treturn a + b\n",
    "a",
    " ".join(f"Paragraph {number} tells of bridges and the people who cross them." for number in range(12)),
]
PROMPTS = {"query": "Represent this sentence for searching: ", "document": "passage: "}
SENTENCES = {
    "English": "The bridge over the river was closed in winter, and nobody crossed it until the ice had gone. ",
    "Korean": "겨울에는 강을 건너는 다리가 닫혔고, 얼음이 녹을 때까지 아무도 건너지 않았다. ",
}


class Reference:
    """A model folder as sentence-transformers and transformers read it."""

    def __init__(self, folder: str) -> None:
        sentence_transformers = pytest.importorskip("sentence_transformers")
        tokenizers = pytest.importorskip("tokenizers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and transformers' own
            self.model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        self.tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Tokens, [CLS] and [SEP] included."""
        return len(self.tokenizer.encode(text).ids)

    def encode(self, texts: list[str], **options) -> NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.encode(texts, show_progress_bar=False, **options)

    def of_ids(self, ids: list[int]) -> NDArray[np.float32]:
        """The mean of BERT's last layer over [CLS], the ids and [SEP], unnormalized."""
        import torch

        whole = [self.tokenizer.token_to_id("[CLS]"), *ids, self.tokenizer.token_to_id("[SEP]")]
        assert len(whole) <= LIMIT
        with torch.no_grad():
            states = self.model[0].auto_model(input_ids=torch.tensor([whole])).last_hidden_state
        return states[0].mean(dim=0).numpy()

    @functools.cache  # noqa: B019 - as long as the module's tests
    def chunked(self, text: str, prompt: str = "", *, width: int = 384, normalize: bool = True) -> NDArray[np.float32]:
        """The token-weighted mean over the pieces.

        A piece is read as [CLS] prompt piece [SEP]; its weight is its tokens without the special and the prompt's.
        """
        total, weights = np.zeros(width), 0
        prompt_tokens = self.count(prompt) - 2
        for piece in split(text, LIMIT, lambda piece: self.count(prompt + piece)):
            ids = self.tokenizer.encode(prompt + piece.text, add_special_tokens=False).ids
            weight = len(ids) - prompt_tokens
            vector = self.of_ids(ids)[:width] if weight else 0
            total += weight * (unit(vector) if normalize and weight else vector)
            weights += weight
        return unit(total) if normalize else total / weights


def unit(vector):
    return vector / np.linalg.norm(vector)


def cosines(vectors, right):
    vectors, right = np.asarray(vectors), np.asarray(right)
    assert vectors.shape == right.shape
    assert np.isfinite(vectors).all()
    return np.sum(vectors * right, axis=-1) / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(right, axis=-1)


def of_tokens(reference: Reference, text: str, tokens: float) -> str:
    """The text repeated, and cut so that it has about so many tokens."""
    own = reference.count(text) - 2
    repeated = text * (int(tokens / own) + 1)
    return repeated[: int(tokens * len(text) / own)]
