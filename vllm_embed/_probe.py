"""Is a port free, and does the server behind it embed."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from http import HTTPStatus

import httpx

from vllm_embed.embedder import Embedder
from vllm_embed.errors import EngineError, ServerTimeoutError, ServerUnreachableError, VLLMEmbedError

__all__ = ["check_free", "embeds", "free_ports"]

_TEXTS = ["a first text", "and another one"]


def free_ports(host: str, first: int, count: int) -> list[int]:
    """`count` ports from `first` on, all free; any free ones when `first` is 0.

    Raises:
        EngineError: one is taken, or the host is not this machine.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(_bound(host, first + index if first else 0)) for index in range(count)]
        return [int(bound.getsockname()[1]) for bound in sockets]


def check_free(host: str, port: int) -> None:
    """Raise an `EngineError` when nothing can listen there."""
    _bound(host, port).close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
    except OSError as exc:
        raise EngineError(f"host={host!r} is no address to listen on: {exc}") from exc
    try:
        # Connections of a server that just stopped do not count, as they do not for vLLM; a listening one does.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            raise EngineError(
                f"port {port} on {host} is already in use, perhaps by another server: "
                "stop that one, choose another port, or take port=0 for any free one"
            ) from exc
        raise EngineError(f"cannot listen on {host!r}, port {port}: {os.strerror(exc.errno or 0)}") from exc
    return bound


def embeds(client: httpx.Client, base_url: str, model: str, key: str | None) -> bool:
    """Whether the server is up and gives one vector for each text; False while it loads.

    Raises:
        EngineError: it is up and will never embed.
    """
    try:
        if client.get(f"{base_url.removesuffix('/v1')}/health").status_code != HTTPStatus.OK:
            return False
    except httpx.TransportError:
        return False
    with Embedder(base_url=base_url, model=model, api_key=key or "", http_client=client, max_retries=0) as embedder:
        try:
            embedder.embed(_TEXTS)
        except (ServerUnreachableError, ServerTimeoutError):
            return False
        except VLLMEmbedError as exc:
            if (exc.status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return False
            said = f"{base_url} is up but does not embed: {exc}"
            raise EngineError(said, endpoint=base_url, model=model, status=exc.status) from exc
    return True
