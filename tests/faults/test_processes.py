"""Fork, spawn, threads that die: one object, whatever process it finds itself in."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import textwrap

import httpx
import numpy as np
import pytest

from vllm_embed import Embedder
from vllm_embed.testing import FakeVLLMServer

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_afresh_and_the_parent_goes_on(server: FakeVLLMServer) -> None:
    embedder = Embedder(base_url=server.base_url, model="fake-model")
    want = embedder.embed(["a", "b"])
    asyncio.run(embedder.aembed([f"t{i}" for i in range(500)]))  # worker threads and connections that the child lacks
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            sync = embedder.embed(["a", "b"])
            awaited = asyncio.run(embedder.aembed([f"t{i}" for i in range(500)]))
            os.write(write, b"ok" if (sync == want).all() and awaited.shape == (500, 16) else b"wrong")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"ok"
    os.waitpid(child, 0)
    np.testing.assert_array_equal(embedder.embed(["a", "b"]), want)
    embedder.close()


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_injected_client_is_refused_in_a_forked_child(server: FakeVLLMServer) -> None:
    with httpx.Client() as client:
        embedder = Embedder(base_url=server.base_url, model="fake-model", http_client=client)
        embedder.embed(["a"])
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            try:
                embedder.embed(["a"])
            except Exception as exc:
                os.write(write, str(exc).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert b"make the embedder in the child" in pipe.read()
        os.waitpid(child, 0)


def _in_child(embedder: Embedder) -> np.ndarray:
    return embedder.embed(["a", "b"])


def test_a_spawned_child_it_was_pickled_to_embeds(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url, api_key="k1") as embedder:
        want = embedder.embed(["a", "b"])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(_in_child, (embedder,)), want)
    assert server.request_headers[-1]["authorization"] == "Bearer k1"


def test_a_script_ends_by_itself_without_close(server: FakeVLLMServer) -> None:
    script = f"""
        import asyncio
        from vllm_embed import Embedder
        embedder = Embedder(base_url={server.base_url!r})
        print(asyncio.run(embedder.aembed(["t"] * 300)).shape, embedder.embed(["a"]).shape)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr, done.returncode) == ("(300, 16) (1, 16)\n", "", 0)


def test_nothing_is_printed_even_when_the_server_is_away() -> None:
    script = """
        from vllm_embed import Embedder, errors
        try:
            Embedder(base_url="http://127.0.0.1:9", model="m", max_retries=1).embed(["a"])
        except errors.ServerUnreachableError:
            pass
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
