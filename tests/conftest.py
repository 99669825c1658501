"""What every test shares: no key or address from the environment, no socket off this machine."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from vllm_embed import Embedder
from vllm_embed.testing import FakeVLLMServer

# A run in the background (nohup, some CI) inherits ignored signals; what is tested here is what they do.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_BASE_URL", "VLLM_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _only_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert address[0] in ("127.0.0.1", "::1", "localhost"), f"a test reached for {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def server() -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(dimension=16) as fake:
        yield fake


@pytest.fixture
def embedder(server: FakeVLLMServer) -> Iterator[Embedder]:
    with Embedder(base_url=server.base_url, model="fake-model") as made:
        yield made
