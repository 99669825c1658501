"""A local server that answers `/v1/embeddings` faster than any client here can ask: what is measured is the client.

It speaks just enough of vLLM's wire, with replies made once for each (dimension, count, format) and kept; of a request
it looks only at the number of inputs, `encoding_format` and `dimensions`. It can act slower on purpose: a fixed latency
for each request, or one serial GPU of so many documents a second that requests queue for.

    with FastServer() as server:       # a process of its own, on another core than the caller where the system allows
        server.behave(latency_s=0.01)  # also sets the counters to zero
        ...                            # requests to server.url
        server.counters()              # {"requests": ..., "texts": ..., "most_in_flight": ..., "cpu_s": ...}
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson

DIMENSION = 1024
MODEL = "bench"
_CHUNK = 256 * 1024
"""Bytes handed to the transport at once: below Python 3.12 it copies what the socket does not take, again and again."""
_SPIN_S = 0.0015
"""The serial GPU is exact to microseconds: the event loop's timers are not, so the last moment is polled."""


class FastServer:
    """The server as a child process, which ends when this object closes or its process dies.

    Args:
        pin: keep this process to its first core and the server to its second, where there are two.
    """

    def __init__(self, *, pin: bool = True) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.pinned = pin and len(cores) >= 2
        command = [sys.executable, str(Path(__file__).resolve())]
        if self.pinned:
            command += ["--core", str(cores[1])]
            os.sched_setaffinity(0, cores[:1])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._root = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.url = f"{self._root}/v1"

    def behave(self, *, latency_s: float = 0.0, documents_per_s: float = 0.0) -> None:
        """Choose how it acts from now on, and set the counters to zero. 0 means at once, and without a limit."""
        body = json.dumps({"latency_s": latency_s, "documents_per_s": documents_per_s}).encode()
        self._ask("/behave", body)

    def counters(self) -> dict[str, float]:
        """Requests, texts, most requests in flight and its own CPU seconds since the last `behave`."""
        return self._ask("/counters")

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self._root + path, body, timeout=10) as reply:
            return json.loads(reply.read())

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def quiet_environment() -> None:
    """Keep keys, proxies and tracing of the environment out: nothing but the local server is asked."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_", "VLLM_")) or name.lower().endswith("_proxy"):
            del os.environ[name]


@functools.cache
def vectors(dimension: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The rows of a reply: unit length, each its own."""
    rows = np.random.default_rng(0).standard_normal((count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f4")


@functools.cache
def _reply(dimension: int, count: int, encoding: str) -> bytes:
    """A whole HTTP reply, as vLLM 0.32 words it."""
    rows = vectors(dimension, count)
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": base64.b64encode(row.tobytes()).decode() if encoding == "base64" else row.tolist(),
        }
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": 120 * count, "total_tokens": 120 * count, "completion_tokens": 0}
    return _http(
        orjson.dumps(
            {"id": "embd-0", "object": "list", "created": 0, "model": MODEL, "data": data, "usage": usage},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
    )


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class _State:
    """How the server acts, and what it counted."""

    def __init__(self) -> None:
        self.behave({})

    def behave(self, options: dict[str, float]) -> None:
        self.latency_s = options.get("latency_s", 0.0)
        self.documents_per_s = options.get("documents_per_s", 0.0)
        self.gpu_free_at = 0.0
        self.requests = self.texts = self.in_flight = self.most_in_flight = 0
        self._cpu = time.process_time()

    def counters(self) -> dict[str, float]:
        cpu_s = time.process_time() - self._cpu
        counted = {name: getattr(self, name) for name in ("requests", "texts", "most_in_flight")}
        return {**counted, "cpu_s": cpu_s}

    def ready_at(self, now: float, count: int) -> float:
        """When a request of so many texts, here now, is answered."""
        if self.documents_per_s:
            self.gpu_free_at = max(now, self.gpu_free_at) + count / self.documents_per_s
            now = self.gpu_free_at
        return now + self.latency_s


class _Connection(asyncio.Protocol):
    """One client's connection; requests on it come one after the other."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._in = bytearray()
        self._out = memoryview(b"")
        self._full = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        self._in += data
        end = self._in.find(b"\r\n\r\n")
        if end < 0:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self._in[:end])
        stop = end + 4 + (int(length[1]) if length else 0)
        if len(self._in) >= stop:
            path = bytes(self._in[: self._in.find(b"\r\n")]).split(b" ")[1]
            body = bytes(self._in[end + 4 : stop])
            del self._in[:stop]
            self._answer(path, body)

    def _answer(self, path: bytes, body: bytes) -> None:
        state = self._state
        if path != b"/v1/embeddings":
            answers: dict[bytes, Any] = {b"/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model"}]}}
            if path == b"/behave":
                state.behave(orjson.loads(body))
            self._write(_http(orjson.dumps(answers.get(path, state.counters()))))
            return
        asked = orjson.loads(body)
        count = len(asked["input"]) if isinstance(asked["input"], list) else 1
        state.requests += 1
        state.texts += count
        state.in_flight += 1
        state.most_in_flight = max(state.most_in_flight, state.in_flight)
        reply = _reply(asked.get("dimensions") or DIMENSION, count, asked.get("encoding_format") or "float")
        now = self._loop.time()
        when = state.ready_at(now, count)
        if when <= now:
            self._done(reply)
        elif state.documents_per_s:
            self._loop.call_at(when - _SPIN_S, self._poll, when, reply)
        else:
            self._loop.call_at(when, self._done, reply)

    def _poll(self, when: float, reply: bytes) -> None:
        if self._loop.time() < when:
            self._loop.call_soon(self._poll, when, reply)
        else:
            self._done(reply)

    def _done(self, reply: bytes) -> None:
        self._state.in_flight -= 1
        self._write(reply)

    def _write(self, reply: bytes) -> None:
        self._out = memoryview(reply)
        self._push()

    def _push(self) -> None:
        while self._out and not self._full and not self._transport.is_closing():
            chunk, self._out = self._out[:_CHUNK], self._out[_CHUNK:]
            self._transport.write(chunk)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._push()


async def _serve() -> None:
    state = _State()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(state), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--core", type=int, help="core to run on")
    core = parser.parse_args().core
    if core is not None:
        os.sched_setaffinity(0, [core])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_serve())
