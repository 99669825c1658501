"""What a test sees of the requests, and how it holds them back."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from threading import Condition
from typing import Any, TypeAlias

from vllm_embed.testing._faults import Fault

Body: TypeAlias = Mapping[str, Any]

KEPT_BODIES = 1_000


@dataclass(slots=True, eq=False)
class _Order:
    fault: Fault
    times: int | None
    when: Callable[[Body], bool] | None


class Traffic:
    """The part of the fake server that tests talk to. Written to in the server's thread, read from any.

    Attributes:
        requests: POST /v1/embeddings that arrived whole, whatever was answered.
        texts: prompts in them.
        answered: of `requests`, those that are over: answered, broken off on order, or left by their client.
        in_flight: of `requests`, those that are not over.
        most_in_flight: the most there were at once.
        connections: connections accepted.
        paths: how often each "METHOD /path" was asked for.
        bodies: the last 1,000 bodies of embedding requests, decoded.
        request_headers: their headers, names in lower case.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._orders: list[_Order] = []
        self._held = False
        self._passes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()  # touched in the server's thread only
        self._loop: asyncio.AbstractEventLoop | None = None
        self.in_flight = 0
        self.reset_counters()

    def reset_counters(self) -> None:
        """Start counting from zero. What is in flight stays so."""
        with self._changed:
            self.requests = 0
            self.texts = 0
            self.answered = 0
            self.most_in_flight = self.in_flight
            self.connections = 0
            self.paths: Counter[str] = Counter()
            self.bodies: deque[dict[str, Any]] = deque(maxlen=KEPT_BODIES)
            self.request_headers: deque[dict[str, str]] = deque(maxlen=KEPT_BODIES)

    def wait_for(self, *, requests: int = 0, texts: int = 0, answered: int = 0, timeout_s: float = 10.0) -> None:
        """Block until so many have been counted since the start or the last `reset_counters`; held requests count.

        Raises:
            TimeoutError: they were not within `timeout_s`.
        """

        def reached() -> bool:
            return self.requests >= requests and self.texts >= texts and self.answered >= answered

        with self._changed:
            if not self._changed.wait_for(reached, timeout_s):
                raise TimeoutError(
                    f"after {timeout_s} s the fake server has seen requests={self.requests}, texts={self.texts}, "
                    f"answered={self.answered}; waited for requests={requests}, texts={texts}, answered={answered}"
                )

    def hold(self) -> AbstractContextManager[object]:
        """Let embedding requests arrive and wait, until `release`, or the end of `with server.hold():`."""
        with self._changed:
            self._held, self._passes = True, 0
        block = ExitStack()
        block.callback(self.release)
        return block

    def release(self, requests: int | None = None) -> None:
        """Let the held requests go on: all, and those to come; or only the next so many, in order of arrival."""
        with self._changed:
            if requests is None:
                self._held = False
            else:
                self._passes += requests
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._open_gate)

    def order(self, fault: Fault, times: int | None = 1, when: Callable[[Body], bool] | None = None) -> None:
        """Give the next embedding requests this fault.

        Of several orders that fit a request, the oldest is carried out. An order is taken up when the request arrives.

        Args:
            fault: what is to go wrong.
            times: for how many requests. None: for all, until `cancel_orders`.
            when: takes the decoded body, says whether this request is meant. None: every request is.
        """
        with self._changed:
            self._orders.append(_Order(fault, times, when))

    def cancel_orders(self) -> None:
        """Forget the faults that are still ordered."""
        with self._changed:
            self._orders.clear()

    def _count_connection(self) -> None:
        with self._changed:
            self.connections += 1

    def _count_path(self, path: str) -> None:
        with self._changed:
            self.paths[path] += 1

    def _arrive(self, body: dict[str, Any], texts: int, headers: dict[str, str]) -> Fault | None:
        """Count an embedding request, and take up what was ordered for it."""
        with self._changed:
            fault = self._take_order(body)
            self.requests += 1
            self.texts += texts
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.bodies.append(body)
            self.request_headers.append(headers)
            self._changed.notify_all()
        return fault

    def _take_order(self, body: Body) -> Fault | None:
        for order in self._orders:
            if order.when is None or order.when(body):
                if order.times is not None:
                    order.times -= 1
                    if order.times <= 0:
                        self._orders.remove(order)
                return order.fault
        return None

    def _leave(self) -> None:
        with self._changed:
            self.in_flight -= 1
            self.answered += 1
            self._changed.notify_all()

    async def _pass_gate(self) -> None:
        if self._waiting or not self._may_pass():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def _open_gate(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # its client has left
                self._waiting.popleft()
            elif self._may_pass():
                self._waiting.popleft().set_result(None)
            else:
                return

    def _may_pass(self) -> bool:
        with self._changed:
            if self._held and not self._passes:
                return False
            self._passes -= 1 if self._held else 0
            return True
