"""HTTP/1.1 by hand, to break it on purpose: keep-alive, bodies with a content-length, one request at a time."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Literal, Protocol, TypeAlias

TRICKLE_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. Header names are lower-case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a reply travels."""

    sends: Literal["all", "half the body", "nothing"] = "all"
    then: Literal["keep", "close", "reset"] = "keep"
    head_bytes_per_s: float | None = None
    body_bytes_per_s: float | None = None


AS_USUAL = Delivery()


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply before it is sent; `content-length` is added from the body."""

    status: int
    body: bytes = b""
    content_type: str | None = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delivery: Delivery = AS_USUAL

    def head(self, *, keep_alive: bool) -> bytes:
        """Status line and headers, up to the empty line."""
        headers = {"server": "uvicorn", "content-length": str(len(self.body))}
        if self.content_type is not None:
            headers["content-type"] = self.content_type
        if not keep_alive:
            headers["connection"] = "close"
        headers |= {name.lower(): value for name, value in self.headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} {_phrase(self.status)}\r\n{lines}\r\n".encode("latin-1")


class Send(Protocol):
    """Sends a reply; calls `before_the_end` just before the client can see the end of it."""

    def __call__(self, reply: Reply, before_the_end: Callable[[], object] = ...) -> Awaitable[None]: ...


Handler: TypeAlias = Callable[[Request, Send], Awaitable[None]]

INVALID_REQUEST = Reply(400, b"Invalid HTTP request received.", "text/plain; charset=utf-8", {"connection": "close"})


def take_request(buffer: bytearray) -> Request | None:
    """Cut one whole request off the front of `buffer`; None while there is none.

    Raises:
        ValueError: these bytes are no HTTP/1 request, or one with a chunked body, which this server does not read.
    """
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        if buffer and not buffer[:1].isalpha():
            raise ValueError("no method: a TLS handshake, as a rule")
        return None
    first, *rest = buffer[:head_end].decode("latin-1").split("\r\n")
    method, target, protocol = first.split(" ")
    if not protocol.startswith("HTTP/1."):
        raise ValueError(f"{protocol!r} is not HTTP/1")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if "transfer-encoding" in headers:
        raise ValueError("the fake reads no chunked request bodies")
    body_end = head_end + 4 + int(headers.get("content-length", "0"))
    if len(buffer) < body_end:
        return None
    body = bytes(buffer[head_end + 4 : body_end])
    del buffer[:body_end]
    keep_alive = protocol != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
    return Request(method, target.partition("?")[0], headers, body, keep_alive)


class Connection(asyncio.Protocol):
    """One connection: hands each request to `handler`, which sends one reply.

    An idle connection is closed `idle_timeout_s()` after the end of a reply, never before its first request, as uvicorn
    does. When the client goes away, the handler is cancelled. While it lives, a connection is in `open_ones`.
    """

    def __init__(
        self, handler: Handler, idle_timeout_s: Callable[[], float | None], open_ones: set["Connection"]
    ) -> None:
        self._handler = handler
        self._idle_timeout_s = idle_timeout_s
        self._open_ones = open_ones
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport
            self._open_ones.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._open_ones.discard(self)
        self._wake()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._wake()
        self._buffer += data
        self._next()

    def abort(self) -> None:
        """Drop the connection now."""
        self._transport.abort()

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _next(self) -> None:
        if self._task is not None or self._transport.is_closing():
            return
        try:
            request = take_request(self._buffer)
        except ValueError:
            self._transport.write(INVALID_REQUEST.head(keep_alive=False) + INVALID_REQUEST.body)
            self._transport.close()
            return
        if request is not None:
            self._task = asyncio.get_running_loop().create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            await self._handler(request, partial(self._send, keep_alive=request.keep_alive))
        except Exception as exc:  # noqa: BLE001 - a test's own callable failed: say so where the test looks, print nothing
            await self._send(Reply(500, f"the fake server failed: {exc!r}".encode(), "text/plain"), keep_alive=False)
        self._task = None
        if self._transport.is_closing():
            return
        timeout_s = self._idle_timeout_s()
        if timeout_s is not None:
            self._idle = asyncio.get_running_loop().call_later(timeout_s, self._transport.close)
        self._next()

    async def _send(
        self, reply: Reply, before_the_end: Callable[[], object] = lambda: None, *, keep_alive: bool
    ) -> None:
        way = reply.delivery
        if way.sends == "nothing":
            before_the_end()
        else:
            head = reply.head(keep_alive=keep_alive and way.then == "keep")
            body = reply.body if way.sends == "all" else reply.body[: len(reply.body) // 2]
            if way.head_bytes_per_s is None and way.body_bytes_per_s is None:
                before_the_end()
                self._transport.write(head + body)
            else:
                await self._trickle(head, way.head_bytes_per_s)
                await self._trickle(body[:-1], way.body_bytes_per_s)
                before_the_end()
                self._transport.write(body[-1:])
        if way.then == "reset":
            # Closing with a linger time of zero is what makes the kernel send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
        elif way.then == "close" or not keep_alive or reply.headers.get("connection") == "close":
            self._transport.close()

    async def _trickle(self, data: bytes, bytes_per_s: float | None) -> None:
        size = len(data) if bytes_per_s is None else max(1, int(bytes_per_s * TRICKLE_INTERVAL_S))
        for start in range(0, len(data), max(1, size)):
            self._transport.write(data[start : start + size])
            if bytes_per_s is not None:
                await asyncio.sleep(size / bytes_per_s)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
