"""The fake model's tokenizer: one regular expression, so that a test can count tokens in its head."""

import re
from collections.abc import Iterable
from itertools import islice
from threading import Lock

VOCABULARY_SIZE = 30_522  # BERT's
CHARACTERS_OF_A_TOKEN = 18  # most in BERT's vocabulary
CLS, SEP, UNK = 101, 102, 100
FIRST_FREE_ID = 1_000

# A run of word characters is one token up to 8 characters and one more for each further 4; so is any other visible
# character by itself. White space counts nothing.
_TOKEN = re.compile(r"(?<!\w)\w{1,8}|(?P<inside_word>\w{1,4})|[^\w\s]")


def count_tokens(text: str) -> int:
    r"""Tokens of `text` as the fake model counts them, the two special ones included.

    A word (`\w+`) is one token, and one more for each further 4 characters, begun or whole, after its first 8. Every
    other character that is not white space is one token. `""` has 2 tokens, `"hello world"` 4, `"hello, embeddings"` 6.
    """
    return 2 + len(_TOKEN.findall(text))


def cut(text: str, tokens: int) -> str:
    """The beginning of `text` with at most `tokens` tokens, special ones included; a text that fits is unchanged."""
    matches = list(islice(_TOKEN.finditer(text), max(0, tokens - 2) + 1))
    if len(matches) <= tokens - 2:
        return text
    return text[: matches[-2].end()] if len(matches) > 1 else ""


def is_encodable(text: str) -> bool:
    """False for a text with a lone surrogate, which UTF-8 cannot hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Vocabulary:
    """Ids of tokens, given out in the order of their first appearance; [UNK] when all 30,522 are taken."""

    def __init__(self) -> None:
        self._ids = {"[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP}
        self._tokens = {number: token for token, number in self._ids.items()}
        self._lock = Lock()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of the tokens of `text`, between [CLS] and [SEP] when `special`."""
        ids = [self._id(f"##{match[0]}" if match["inside_word"] else match[0]) for match in _TOKEN.finditer(text)]
        return [CLS, *ids, SEP] if special else ids

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The tokens of these ids. Ids that were never given out are left out, as vLLM does."""
        return [self._tokens[number] for number in ids if number in self._tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids: tokens joined by a space, the parts of one word joined by nothing."""
        return " ".join(self.tokens(ids)).replace(" ##", "")

    def _id(self, token: str) -> int:
        with self._lock:
            number = self._ids.get(token)
            if number is None:
                number = FIRST_FREE_ID + len(self._ids) - 3
                if number >= VOCABULARY_SIZE:
                    return UNK
                self._ids[token] = number
                self._tokens[number] = token
            return number


# One for all fakes of a process: replicas of one model have one tokenizer.
VOCABULARY = Vocabulary()
