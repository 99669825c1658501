import pytest
from _fake_client import client_of

from vllm_embed.testing import FakeVLLMServer


@pytest.fixture
def client(server):
    """Of the fake server."""
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def minilm():
    """A client of a fake that is started as the real server was whose answers are recorded."""
    with FakeVLLMServer(model="minilm", api_key="k", root="/models/minilm") as server, client_of(server) as client:
        yield client
