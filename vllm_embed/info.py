"""What an embedder tells: blocks of a stream, the server, counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed.errors import VLLMEmbedError

__all__ = ["Block", "EndpointInfo", "ServerInfo", "Stats"]


class Block(NamedTuple):
    """Consecutive rows of a stream."""

    start: int
    """Position of the first row in the stream."""
    vectors: NDArray[np.float32]
    """Shape (n, d); NaN rows where `failures` says why."""
    failures: dict[int, VLLMEmbedError]
    """Refused texts by their position in the stream; empty unless `on_error="yield"`."""


@dataclass(frozen=True)
class EndpointInfo:
    """One replica as seen now."""

    url: str
    healthy: bool
    """Whether `/health` answers 200, or a gateway hides it."""
    state: str
    """"up", "failing", or "left out" for a while after failures."""
    version: str | None
    """vLLM's; None where the route is hidden."""
    requests: int
    texts: int
    failures: int
    in_flight: int


@dataclass(frozen=True)
class ServerInfo:
    """What is served, and by whom."""

    model: str
    """Name the server knows it by."""
    root: str | None
    """Where the server took it from: a hub id or a folder on its machine."""
    dimension: int
    """Width of the vectors that this embedder gives."""
    max_model_len: int | None
    """Most tokens of one text, special tokens included; None where the server does not tell (LoRA, a gateway)."""
    version: str | None
    """vLLM's; None where the route is hidden."""
    endpoints: tuple[EndpointInfo, ...]


@dataclass(frozen=True)
class Stats:
    """Counters since the start, over all siblings."""

    texts: int
    """Texts sent, repeated attempts included."""
    requests: int
    """Embedding requests sent, repeated attempts included."""
    retries: int
    prompt_tokens: int
    """As the server counted them."""
    in_flight: int
    most_in_flight: int
    endpoints: dict[str, dict[str, int]]
    """By URL: requests, texts, failures, in_flight."""
