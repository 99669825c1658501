"""The seam between the queue and what embeds: a server's replicas over HTTP, or an engine in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_embed._job import Part
    from vllm_embed._wire import Reply
    from vllm_embed.errors import VLLMEmbedError
    from vllm_embed.info import EndpointInfo

__all__ = ["About", "Backend", "Failed", "Limits"]


@dataclass
class Limits:
    """Most texts and characters of one request; lowered to what passed where a server takes less."""

    texts: int
    chars: int

    def remember(self, status: int, passed: Sequence[Part]) -> None:
        """After a request was halved, keep to the largest size that passed: in bytes for 413, in texts for 503."""
        if status == 413:
            self.chars = min(self.chars, max(sum(map(len, part.texts())) for part in passed))
        else:
            self.texts = min(self.texts, max(map(len, passed)))


class Failed(Exception):  # noqa: N818 - never leaves the core
    """One attempt failed: the typed error, and what the retry needs beside it."""

    def __init__(self, error: VLLMEmbedError, place: Any = None, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.place = place
        """Where it was tried, for `Backend.another` and to be avoided; None where there is only one place."""
        self.retry_after = retry_after


class About(NamedTuple):
    """What a backend says of itself when asked."""

    root: str | None
    max_model_len: int | None
    version: str | None
    endpoints: tuple[EndpointInfo, ...]


class Backend(Protocol):
    """What the queue asks of whatever embeds. From any thread."""

    limits: Limits

    @property
    def slots(self) -> int:
        """Requests that may be in flight now."""

    def send(self, texts: Sequence[str], fields: Mapping[str, Any], avoid: Any = None) -> Reply:
        """One attempt at one request, somewhere else than at `avoid` where possible.

        Raises:
            Failed: holding the typed error; what to do about it is the caller's to decide.
        """

    def another(self, than: Any) -> bool:
        """Whether it can be tried at once somewhere else."""

    def troubles(self) -> str:
        """Each place with its last failure; "" where there is only one."""

    def model(self) -> str:
        """Name of the model."""

    def count(self, text: str) -> int:
        """Tokens of a text as the model reads it, special ones included."""

    def limit(self) -> int:
        """Most tokens of one text, special ones included."""

    def about(self) -> About:
        """What is served, asked now."""

    def traffic(self) -> dict[str, dict[str, int]]:
        """Counters of each place: requests, texts, failures, in_flight."""

    def close(self) -> None:
        """Release what it holds."""

    def forked(self) -> None:
        """In a forked child: nothing of the parent's is ours."""
