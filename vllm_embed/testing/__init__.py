"""A fake vLLM server for tests: it speaks vLLM's wire, counts what it sees, and misbehaves on order.

It answers as vLLM 0.32 does (its replies were taken from a running server), over real sockets on 127.0.0.1, with
vectors that are functions of the text alone:

    from vllm_embed import Embedder
    from vllm_embed.testing import FakeVLLMServer, Fault

    with FakeVLLMServer(dimension=8) as server, Embedder(base_url=server.base_url) as embedder:
        server.order(Fault.status(503))
        vectors = embedder.embed(["one", "two"])
        assert (vectors[0] == server.vector("one")).all()
        assert server.requests == 2
"""

from vllm_embed.testing._faults import Fault
from vllm_embed.testing._server import FakeVLLMServer
from vllm_embed.testing._text import count_tokens

__all__ = ["FakeVLLMServer", "Fault", "count_tokens"]
