"""Two real servers behind one embedder, killed and restarted while it works."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from vllm_embed import Embedder, errors
from vllm_embed.serving import VLLMServer

pytestmark = pytest.mark.live

TEXTS = [f"document number {i} about {word}" for i in range(1_250) for word in ("rings", "moons", "dust", "ice")]


def _start(folder: str, port: int = 0) -> VLLMServer:
    return VLLMServer(
        folder, port=port, api_key="k1", served_model_name="minilm", dtype="float32", vllm_args=["--max-num-seqs", "64"]
    ).start()


def _kill(server: VLLMServer) -> None:
    os.killpg(server.processes[0].pid, signal.SIGKILL)


def test_killed_servers_cost_no_vector_come_back_and_are_named_when_all_are_gone(live_server) -> None:
    with Embedder(base_url=live_server.base_url, api_key=live_server.api_key) as alone:
        want = alone.embed(TEXTS)
    one = _start(live_server.folder)
    two = _start(live_server.folder)
    again = None
    urls = [one.base_url, two.base_url]
    try:
        with Embedder(base_url=urls, api_key="k1", max_retries=8) as embedder:

            def kill_in_the_middle() -> None:
                while embedder.stats().endpoints[two.base_url]["texts"] < 500:
                    time.sleep(0.005)
                _kill(two)

            killer = threading.Thread(target=kill_in_the_middle)
            killer.start()
            got = embedder.embed(TEXTS)
            killer.join()
            assert embedder.stats().endpoints[two.base_url]["failures"] > 0
            assert (np.sum(got * want, axis=1) >= 0.99999).all()

            two.stop()
            again = _start(live_server.folder, port=int(urls[1].rsplit(":", 1)[1].removesuffix("/v1")))
            before = embedder.stats().endpoints[urls[1]]["texts"]
            while embedder.stats().endpoints[urls[1]]["texts"] == before:
                embedder.embed(TEXTS[:640])

            _kill(one)
            _kill(again)
            with pytest.raises(errors.ServerUnreachableError, match="no replica answered") as caught:
                embedder.embed(TEXTS)
            assert all(url in str(caught.value) for url in urls)
    finally:
        for server in (one, two, again):
            if server is not None:
                server.stop()
