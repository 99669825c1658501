"""What LlamaIndex lets others see of an embedding: callbacks, events, a rate limiter; and the doors to call it by."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.rate_limiter import BaseRateLimiter

if TYPE_CHECKING:
    from llama_index.core.instrumentation.events import BaseEvent


def sync(embedding: Any, method: str, *args: Any, **options: Any) -> Any:
    """As a script calls it."""
    return getattr(embedding, method)(*args, **options)


def awaited(embedding: Any, method: str, *args: Any, **options: Any) -> Any:
    """By its async name, on an event loop of its own."""
    name = "acall" if method == "__call__" else method.replace("get_", "aget_", 1)

    async def call() -> Any:
        return await getattr(embedding, name)(*args, **options)

    return asyncio.run(call())


def sync_in_a_running_loop(embedding: Any, method: str, *args: Any, **options: Any) -> Any:
    """As a cell of a notebook calls it."""

    async def cell() -> Any:
        return getattr(embedding, method)(*args, **options)

    return asyncio.run(cell())


class Callbacks(BaseCallbackHandler):
    """Keeps the payloads of embedding events."""

    def __init__(self) -> None:
        super().__init__(event_starts_to_ignore=[], event_ends_to_ignore=[])
        self.started: list[Any] = []
        self.ended: list[Any] = []

    def on_event_start(self, event_type: Any, payload: Any = None, event_id: str = "", *_: Any, **__: Any) -> str:
        assert event_type == CBEventType.EMBEDDING
        self.started.append(payload)
        return event_id

    def on_event_end(self, event_type: Any, payload: Any = None, event_id: str = "", **_: Any) -> None:
        assert event_type == CBEventType.EMBEDDING
        self.ended.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


class Events(BaseEventHandler):
    """Keeps instrumentation events."""

    seen: ClassVar[list[BaseEvent]] = []

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.seen.append(event)


class Limiter(BaseRateLimiter):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.acquired = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.acquired += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.acquired += 1
