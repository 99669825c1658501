"""Which replica takes the next request: the fewest in flight for its speed, the failing ones left out for a while."""

from __future__ import annotations

import logging
import math
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
_NEWEST = 0.2
"""Weight of the newest request in a replica's measured speed."""


@dataclass(eq=False)
class Replica:
    """One server and what was seen of it."""

    address: Address
    in_flight: int = 0
    requests: int = 0
    texts: int = 0
    failures: int = 0
    """Failed requests since the start."""
    speed: float = 0.0
    """Texts a second, by Little's law: texts in flight over the time one request takes. 0 while unknown."""
    width: int = 0
    """Dimension of its vectors; 0 while unknown."""
    checked: bool = False
    """Whether its model list was compared with the others'."""
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

    @property
    def slots(self) -> int:
        """Requests that all of them together may have in flight now."""
        now = time.monotonic()
        return max(sum(self._share(r) for r in self.all if r.out_until <= now), 1)

    def _share(self, replica: Replica) -> int:
        """Requests one may have in flight: fewer for a slower one, or its queue outlasts everyone else's work.

        One more than its share of speed, so that a replica that got faster shows it.
        """
        if replica.outages:
            return 1
        fastest = max(r.speed for r in self.all)
        if not replica.speed or len(self.all) == 1:
            return self.most
        return min(self.most, math.ceil(self.most * replica.speed / fastest) + 1)

    def take(self, avoid: Replica | None = None) -> Replica:
        """Reserve a place at the replica with the fewest requests in flight; waits while all are full.

        One that is left out gets nothing until its pause is over, then one request at a time until it answers: real
        traffic is the probe. When all are left out, the one whose pause ends first is tried. `avoid` comes last.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                up = [r for r in self.all if r.out_until <= now] or [min(self.all, key=lambda r: r.out_until)]
                free = [r for r in up if r.in_flight < self._share(r)]
                if free:
                    best = min(free, key=lambda r: (r is avoid, r.in_flight / self._share(r), r.requests))
                    best.in_flight += 1
                    best.requests += 1
                    return best
                pauses = [r.out_until - now for r in self.all if r.out_until > now]
                self._changed.wait(min(pauses, default=None))

    def another(self, than: Replica) -> bool:
        """Whether a replica other than this one is up."""
        return any(r is not than and not r.outages for r in self.all)

    def done(self, replica: Replica, texts: int, seconds: float = 0.0) -> None:
        """Give the place back after a reply, good or refusing: the replica is up.

        Args:
            replica: the one that replied.
            texts: how many it embedded.
            seconds: how long that took; 0 measures nothing.
        """
        with self._changed:
            if seconds > 0 and texts:
                speed = replica.in_flight * texts / seconds
                replica.speed += (speed - replica.speed) * (_NEWEST if replica.speed else 1.0)
            replica.in_flight -= 1
            replica.texts += texts
            if replica.outages:
                _log.warning("%s answers again", replica.address.url)
            replica.in_a_row, replica.outages, replica.out_until = 0, 0, 0.0
            self._changed.notify_all()

    def failed(self, replica: Replica, error: VLLMEmbedError, retry_after: float | None = None) -> None:
        """Give the place back after a failure; where there is another, this one is left out for a while.

        A busy one too: it refuses at once, so with the fewest in flight it would draw every request.

        Args:
            replica: the one that failed.
            error: how.
            retry_after: seconds that it asked for.
        """
        with self._changed:
            replica.in_flight -= 1
            replica.failures += 1
            replica.in_a_row += 1
            replica.checked = False  # it may come back with another model
            replica.last_error = error
            if len(self.all) > 1:
                now = time.monotonic()
                if now >= replica.out_until:  # requests that fail together count once
                    pause = min(max(_PAUSE_S * 2**replica.outages, retry_after or 0.0), _LONGEST_PAUSE_S)
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
