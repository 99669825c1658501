"""Which replica takes the next request: the fewest in flight, the failing ones left out for a while."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_embed._address import Address
    from vllm_embed.errors import VLLMEmbedError

__all__ = ["Replica", "Replicas"]

_log = logging.getLogger("vllm_embed")

_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


@dataclass(eq=False)
class Replica:
    """One server and what was seen of it."""

    address: Address
    in_flight: int = 0
    requests: int = 0
    texts: int = 0
    failures: int = 0
    """Failed requests since the start."""
    in_a_row: int = 0
    """Failed requests since the last good one."""
    out_until: float = 0.0
    """Monotonic time until which it is left out."""
    outages: int = 0
    """Times it was left out since the last good request."""
    last_error: VLLMEmbedError | None = field(default=None, repr=False)


class Replicas:
    """The replicas behind one embedder, from any thread.

    Args:
        addresses: at least one.
        most: requests that one replica may have in flight.
    """

    def __init__(self, addresses: tuple[Address, ...], most: int) -> None:
        self.all = [Replica(address) for address in addresses]
        self.most = most
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.all)

    def take(self, avoid: Replica | None = None) -> Replica:
        """Reserve a place at the replica with the fewest requests in flight; waits while all are full.

        One that is left out gets nothing until its pause is over, then one request at a time until it answers: real
        traffic is the probe. When all are left out, the one whose pause ends first is tried. `avoid` comes last.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                up = [r for r in self.all if r.out_until <= now] or [min(self.all, key=lambda r: r.out_until)]
                free = [r for r in up if r.in_flight < (1 if r.outages else self.most)]
                if free:
                    best = min(free, key=lambda r: (r is avoid, r.in_flight, r.requests))
                    best.in_flight += 1
                    best.requests += 1
                    return best
                pauses = [r.out_until - now for r in self.all if r.out_until > now]
                self._changed.wait(min(pauses, default=None))

    def another(self, than: Replica) -> bool:
        """Whether a replica other than this one is up."""
        return any(r is not than and not r.outages for r in self.all)

    def done(self, replica: Replica, texts: int) -> None:
        """Give the place back after a reply, good or refusing: the replica is up."""
        with self._changed:
            replica.in_flight -= 1
            replica.texts += texts
            if replica.outages:
                _log.warning("%s answers again", replica.address.url)
            replica.in_a_row, replica.outages, replica.out_until = 0, 0, 0.0
            self._changed.notify_all()

    def failed(self, replica: Replica, error: VLLMEmbedError, *, down: bool) -> None:
        """Give the place back after a failure.

        Args:
            replica: the one that failed.
            error: how.
            down: whether it is to be left out for a while, where there is another.
        """
        with self._changed:
            replica.in_flight -= 1
            replica.failures += 1
            replica.in_a_row += 1
            replica.last_error = error
            if down and len(self.all) > 1:
                now = time.monotonic()
                if now >= replica.out_until:  # requests that fail together count once
                    pause = min(_PAUSE_S * 2**replica.outages, _LONGEST_PAUSE_S)
                    replica.outages = min(replica.outages + 1, 10)
                    replica.out_until = now + pause
                    _log.warning("%s is left out for %.1f s: %s", replica.address.url, pause, error)
            self._changed.notify_all()

    def state(self, replica: Replica) -> str:
        """Whether it is "up", "failing" or "left out"."""
        if replica.out_until > time.monotonic():
            return "left out"
        return "failing" if replica.in_a_row else "up"

    def troubles(self) -> str:
        """Each replica with its last failure, for the error that ends a call."""
        return "; ".join(f"{r.address.url}: {r.last_error or 'not tried'}" for r in self.all)

    def forked(self) -> None:
        """In a forked child: the parent's requests are not ours."""
        self._changed = threading.Condition()
        for replica in self.all:
            replica.in_flight = 0
