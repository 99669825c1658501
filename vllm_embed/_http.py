"""One HTTP exchange: httpx on one side, our errors on the other."""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from vllm_embed import _deadline
from vllm_embed._address import without
from vllm_embed._version import __version__
from vllm_embed.errors import (
    BadReplyError,
    ClosedError,
    ConfigurationError,
    ServerTimeoutError,
    ServerUnreachableError,
    VLLMEmbedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_embed._address import Address
    from vllm_embed.settings import Settings

__all__ = ["Http", "HttpReply"]

_CONNECT_S = 10.0
_KEEPALIVE_S = 3.0
"""Idle connections are dropped before vLLM's uvicorn closes them at 5 s."""
_REDIRECTS = 3


class HttpReply(NamedTuple):
    """A whole reply."""

    status: int
    headers: httpx.Headers
    content: bytes


class Http:
    """Sends one request at a time for each calling thread; opens nothing before the first.

    Args:
        settings: transport options; an injected `http_client` is used as it is and never closed.
        addresses: the replicas.
    """

    def __init__(self, settings: Settings, addresses: tuple[Address, ...]) -> None:
        self._settings = settings
        self._given = settings.http_client
        key = settings.api_key.get_secret_value() if settings.api_key else None
        self.secrets = tuple(filter(None, (key, *(settings.default_headers or {}).values())))
        self._headers = {a.url: httpx.Headers(_headers(a, key, settings)) for a in addresses}
        self._connections = settings.max_concurrency * len(addresses) + 4
        self._tls = any(a.url.startswith("https") for a in addresses)
        self._lock = threading.Lock()
        self._closed = False
        self._users = 0
        self._client: httpx.Client | None = None
        self._pid = os.getpid()

    def _opened(self) -> httpx.Client:
        if self._given is not None:
            if self._pid != os.getpid():
                raise ConfigurationError(
                    "an injected http_client cannot be used in a forked child, its connections are the parent's: make "
                    "the embedder in the child, or leave http_client out"
                )
            return self._given
        with self._lock:
            if self._closed:
                raise ClosedError
            if self._client is None:
                self._client = self._made()
                weakref.finalize(self, self._client.close)
            return self._client

    def _made(self) -> httpx.Client:
        verify: Any = True if self._settings.verify is None else self._settings.verify
        if isinstance(verify, str):
            try:
                verify = ssl.create_default_context(cafile=verify)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigurationError(f"verify={verify!r} is not a readable file of CA certificates") from exc
        elif not self._tls and self._settings.proxy is None:
            verify = False  # no TLS to verify; reading the system's certificates costs 20 ms
        limits = httpx.Limits(
            max_connections=self._connections,
            max_keepalive_connections=self._connections,
            keepalive_expiry=_KEEPALIVE_S,
        )
        try:
            client = httpx.Client(verify=verify, proxy=self._settings.proxy, limits=limits)
        except ImportError as exc:  # SOCKS without its package
            raise ConfigurationError(f"proxy: {exc}") from exc
        _deadline.install(client)
        return client

    def exchange(
        self, method: str, address: Address, path: str, content: bytes | None = None, timeout: float | None = None
    ) -> HttpReply:
        """Send one request and read its whole reply, whatever its status.

        Args:
            method: GET or POST.
            address: replica to ask.
            path: absolute URL.
            content: JSON body.
            timeout: seconds for all of it; None takes the setting.

        Raises:
            ServerTimeoutError: no whole reply in time; a reply that trickles in is cut off.
            ServerUnreachableError: no connection, or it broke.
            BadReplyError: the content encoding is broken.
            ConfigurationError: httpx cannot make such a request.
        """
        seconds = self._settings.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        url = _url(path)
        with self._in_use():
            for _ in range(_REDIRECTS):
                reply = self._once(method, address, url, content, deadline=deadline, seconds=seconds)
                target = _same_origin(url, reply)
                if target is None:
                    break
                url = target
        return reply

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
            self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            client = self._client if self._closed and not self._users else None
            if client is not None:
                self._client = None
        if client is not None:
            client.close()

    def _once(
        self, method: str, address: Address, url: httpx.URL, content: bytes | None, *, deadline: float, seconds: float
    ) -> HttpReply:
        try:
            with _deadline.until(deadline):
                response = self._sent(method, address, url, content, deadline=deadline)
                try:
                    body = b"".join(_in_time(response, deadline))
                finally:
                    response.close()
        except httpx.TimeoutException as exc:
            if "handshake" in str(exc):
                what = f"TLS: {exc}; if the server speaks plain HTTP there, write http:// in base_url"
            elif isinstance(exc, httpx.ConnectTimeout):
                what = f"no connection within {min(_CONNECT_S, seconds):g} s; is the server running there?"
            else:
                what = f"no whole reply within timeout={seconds:g} s; a loaded server may need more, or smaller batches"
            raise self._located(ServerTimeoutError, address, what) from exc
        except httpx.DecodingError as exc:
            raise self._located(BadReplyError, address, "the reply's content encoding is broken") from exc
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as exc:
            raise self._located(ConfigurationError, address, f"cannot make the request: {exc}") from exc
        except (httpx.TransportError, httpx.StreamError, OSError) as exc:
            raise self._located(ServerUnreachableError, address, _why(exc)) from exc
        except RuntimeError as exc:  # httpx: "Cannot send a request, as the client has been closed."
            raise self._located(ConfigurationError, address, f"http_client: {exc}") from exc
        return HttpReply(response.status_code, response.headers, body)

    def _sent(
        self, method: str, address: Address, url: httpx.URL, content: bytes | None, *, deadline: float
    ) -> httpx.Response:
        """The reply's head.

        Our own client's transport is asked directly: what lies between is for cookies, hooks, auth and redirects, of
        which we have none, and costs a quarter of a single query (0.40 to 0.30 ms of CPU, measured on 2026-11-22).
        """
        client, headers = self._opened(), self._headers[address.url]
        left = max(deadline - time.monotonic(), 0.001)
        timeout = {"connect": min(_CONNECT_S, left), "read": left, "write": left, "pool": left}
        if self._given is not None:
            request = client.build_request(
                method, url, content=content, headers=headers, timeout=httpx.Timeout(**timeout)
            )
            return client.send(request, stream=True, follow_redirects=False)
        request = httpx.Request(method, url, content=content, headers=headers, extensions={"timeout": timeout})
        return client._transport_for_url(url).handle_request(request)  # noqa: SLF001 - httpx 0.27, 0.28: no public name

    def _located(self, kind: type[VLLMEmbedError], address: Address, what: str) -> VLLMEmbedError:
        return kind(f"{address.url}: {without(what, self.secrets)}", endpoint=address.url)

    def close(self) -> None:
        """Close the connections of our own client once no request is in flight; a given one is its owner's to close."""
        with self._lock:
            self._closed = True
        self._close_unused()

    def forked(self) -> None:
        """In a forked child: leave the parent's connections alone, and unclosed."""
        self._lock = threading.Lock()
        self._users = 0
        self._client = None


@functools.lru_cache(256)
def _url(path: str) -> httpx.URL:
    return httpx.URL(path)


def _headers(address: Address, key: str | None, settings: Settings) -> dict[str, str]:
    if key and address.authorization:
        raise ConfigurationError(
            f"{address.url}: an api_key and user:password in base_url both set the Authorization header; leave one "
            "out, or set the header itself with default_headers"
        )
    headers = {
        "accept": "application/json",
        "accept-encoding": "identity",  # base64 of floats does not compress
        "content-type": "application/json",
        "user-agent": f"vllm-embed/{__version__}",
    }
    authorization = f"Bearer {key}" if key else address.authorization
    if authorization:
        headers["authorization"] = authorization
    headers.update({name.lower(): value for name, value in (settings.default_headers or {}).items()})
    return headers


def _in_time(response: httpx.Response, deadline: float) -> Iterator[bytes]:
    """The body's chunks; a given client's sockets do not know the deadline."""
    for chunk in response.iter_bytes():
        yield chunk
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("")


def _same_origin(url: httpx.URL, reply: HttpReply) -> httpx.URL | None:
    """Where to repeat the request: 307 and 308 within the same scheme, host and port only."""
    location = reply.headers.get("location")
    if reply.status not in (307, 308) or not location:
        return None
    try:
        target = url.join(location)
    except (httpx.InvalidURL, ValueError):
        return None
    same = (target.scheme, target.host, target.port) == (url.scheme, url.host, url.port)
    return target.copy_with(username=None, password=None) if same else None


def _why(exc: Exception) -> str:
    text = str(exc) or type(exc).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"TLS: {text}; set verify to the path of the CA that signed the server's certificate"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        return f"TLS: {text}; if the server speaks plain HTTP there, write http:// in base_url"
    if isinstance(exc, (httpx.ConnectError, httpx.ProxyError)):
        return f"cannot connect ({text}); is the server running there? `vllm serve MODEL --runner pooling` starts one"
    return f"the connection broke ({text})"
