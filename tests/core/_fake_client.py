"""How the tests of the fake server speak to it."""

import socket
from contextlib import contextmanager

import httpx
import numpy as np
import pybase64


@contextmanager
def client_of(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client


def embed(client, texts, **fields):
    return client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64", **fields})


def message(reply):
    return reply.json()["error"]["message"]


def vectors(reply, dtype="<f4"):
    """The vectors of a reply in the order of its rows, from base64 or from floats."""
    return [
        np.frombuffer(pybase64.b64decode(given), dtype) if isinstance(given, str) else np.array(given, np.float32)
        for given in (row["embedding"] for row in reply.json()["data"])
    ]


def raw(server, data):
    """All bytes that come back for these, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def give_up(server):
    """A client that sends a request, and leaves when it has arrived."""
    body = b'{"input": "one"}'
    head = f"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        server.wait_for(requests=1)
    server.wait_for(answered=1)
