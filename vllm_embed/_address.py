"""Addresses and headers: what is allowed, and what of them may be shown."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx

__all__ = ["Address", "addresses", "headers", "hidden", "parse", "proxy", "without"]


class Address(NamedTuple):
    """One replica."""

    url: str
    """API root, ending in `/v1`, without credentials: safe to show."""
    root: str
    """The server itself, where `/health` and `/version` are."""
    authorization: str | None
    """Header that the URL's own user:password amounts to."""


def parse(value: Any) -> Any:
    """Check one URL, a comma-separated list, or a list of them; the result is one str, or a list of several.

    Raises:
        ValueError: without quoting the URL, which may hold a password.
    """
    if isinstance(value, httpx.URL):
        value = str(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise ValueError('a URL such as "http://localhost:8000/v1", or a list of them')  # noqa: TRY004 - pydantic's way
    urls = [_checked(str(url)) for url in value]
    if not urls:
        raise ValueError("an empty list; name at least one server")
    if len({_address(url).url for url in urls}) < len(urls):
        raise ValueError("the same server is listed twice")
    return urls[0] if len(urls) == 1 else urls


def _checked(url: str) -> str:
    parsed = _url(url)
    if parsed is None:
        raise ValueError('not a URL; it looks like "http://localhost:8000/v1"')
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError('a server\'s URL starts with http:// or https://, as in "http://localhost:8000/v1"')
    if parsed.query or parsed.fragment:
        raise ValueError("a base URL has no ?query or #fragment; default_headers can carry what a gateway needs")
    return url.strip()


def _url(url: str) -> httpx.URL | None:
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, ValueError):
        return None
    return parsed if (parsed.port or 0) < 65_536 else None


def addresses(base_url: str | list[str]) -> tuple[Address, ...]:
    """The replicas behind a checked `base_url`, in order."""
    return tuple(_address(url) for url in ([base_url] if isinstance(base_url, str) else base_url))


def _address(url: str) -> Address:
    parsed = httpx.URL(url)
    plain = str(parsed.copy_with(username=None, password=None)).rstrip("/").removesuffix("/embeddings")
    root = plain.removesuffix("/v1").rstrip("/")
    return Address(f"{root}/v1", root, _basic(parsed))


def _basic(url: httpx.URL) -> str | None:
    if not url.userinfo:
        return None
    pair = f"{unquote(url.username)}:{unquote(url.password)}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def proxy(value: str | None) -> str | None:
    """Check a proxy's URL."""
    if value is not None:
        parsed = _url(value)
        if parsed is None or parsed.scheme not in ("http", "https", "socks5", "socks5h"):
            raise ValueError('a proxy looks like "http://proxy.example:3128"')
    return value


def headers(value: Any) -> Any:
    """Check header names and values, without quoting the latter."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError('headers are a dict such as {"X-Tenant": "a"}')  # noqa: TRY004 - pydantic's way
    for name, text in value.items():
        if not isinstance(name, str) or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"{name!r} is not a header name")
        if not isinstance(text, str) or not text.isascii() or not text.isprintable():
            raise ValueError(f"the value of header {name!r} must be printable ASCII")
    return dict(value)


def hidden(value: str | list[str] | None) -> str | list[str] | None:
    """The same with user:password replaced, for reprs, dumps and messages."""
    if isinstance(value, list):
        return [str(hidden(url)) for url in value]
    if value is None or "@" not in value:
        return value
    scheme, _, rest = value.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}"


def without(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced: as a word, since a key may be as short as "k"."""
    for secret in secrets:
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return text
