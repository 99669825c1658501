"""Texts to token ids, by the engine's own tokenizer and as the engine itself would."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_embed.errors import InputTooLongError, InvalidInputError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Read", "Reader"]

_AT_ONCE = 256
"""Texts that are tokenized together: enough for all cores, and what the tokenizer notes beside the ids stays small."""
_CANARIES = ("The QUICK brown fox", "토성 ÉCOLE ﬁ", "def f(x):\n\treturn  x")
_CUT = 4


class Read(NamedTuple):
    """Texts as the engine takes them."""

    ids: list[list[int]]
    """Of the texts that are not refused, in order, special tokens included."""
    refused: dict[int, VLLMEmbedError]
    """By position in the texts that were given."""


class Reader:
    """Tokenizes in batches, on all cores, and finds the texts that the engine would refuse.

    `vllm.LLM` tokenizes text by text, and one bad text ends its whole batch; so it is given ids.

    Args:
        tokenizer: of `LLM.get_tokenizer()`.
        limit: the engine's max_model_len.
        lower: whether the model's sentence-transformers config asks for lower case, as vLLM reads it.
    """

    def __init__(self, tokenizer: Any, limit: int, *, lower: bool) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._lower = lower
        self._lock = threading.Lock()  # a fast tokenizer that is set to another length while it reads raises

    def read(self, texts: Sequence[str], *, cut: bool) -> Read:
        """Token ids of texts.

        Args:
            texts: cleaned and prompted.
            cut: whether a text over the limit is cut to it, special tokens kept, or refused.
        """
        ids: list[list[int]] = []
        refused: dict[int, VLLMEmbedError] = {}
        for start in range(0, len(texts), _AT_ONCE):
            for index, found in enumerate(
                self._ids(texts[start : start + _AT_ONCE], self._limit if cut else None), start
            ):
                if not found:
                    refused[index] = InvalidInputError(
                        'a text without tokens; blank_text="zero" or "error" handles blank texts here'
                    )
                elif len(found) > self._limit:
                    refused[index] = InputTooLongError(f"{len(found)} tokens, the limit is {self._limit}")
                else:
                    ids.append(found)
        return Read(ids, refused)

    def _ids(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        with self._lock:
            read = self._tokenizer(
                [text.lower() for text in texts] if self._lower else list(texts),
                add_special_tokens=True,
                truncation=length is not None,
                max_length=length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        found: list[list[int]] = read["input_ids"]
        return found

    def count(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        return len(self._ids([text], None)[0])

    def agrees(self, encode: Callable[..., list[list[int]]]) -> bool:
        """Whether the engine reads a few texts as this does; where not, it must be given text.

        Args:
            encode: texts and tokenization arguments to the ids that the engine made of them.
        """
        theirs, cut = encode(_CANARIES), encode(_CANARIES, truncate_prompt_tokens=_CUT)
        try:
            return self._ids(_CANARIES, None) == theirs and self._ids(_CANARIES, _CUT) == cut
        except (TypeError, ValueError, KeyError, AttributeError):
            return False  # not one of transformers' tokenizers
