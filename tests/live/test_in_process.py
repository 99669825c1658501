"""vLLM in this process: the same vectors, settings and errors as over HTTP."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from _models import variant
from test_parity import CLEANED, SENT

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder, errors

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # vLLM and torch deprecate things of their own

ARGUMENTS = {"dtype": "float32"}


@pytest.fixture(scope="module")
def options(live_model):
    return {"model": live_model, "in_process": True, "engine_args": ARGUMENTS, "long_text": "truncate"}


@pytest.fixture(scope="module")
def embedder(options):
    with Embedder(**options) as made:
        yield made


def right(got, want):
    assert (np.sum(np.asarray(got) * np.asarray(want), axis=1) >= 0.99999).all()


def test_vectors_are_the_servers_and_sentence_transformers_for_every_kind_of_text(embedder, live_server, encode):
    with Embedder(**live_server.options, long_text="truncate") as served:
        over_http = served.embed(SENT)
    got = embedder.embed(SENT)
    right(got, over_http)
    right(got, [encode(text) for text in CLEANED])
    right(asyncio.run(embedder.aembed(SENT)), over_http)
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(lambda _: embedder.embed(SENT), range(8)):
            right(rows, over_http)


def test_both_adapters_share_the_engine_that_is_loaded(embedder, options, encode):
    engine = embedder._core.backend._engine
    langchain, llama_index = VLLMEmbeddings(**options), VLLMEmbedding(**options)
    want = [encode("Saturn has rings.")]
    right([langchain.embed_query("Saturn has rings.")], want)
    right(langchain.embed_documents(["Saturn has rings."]), want)
    right([asyncio.run(langchain.aembed_query("Saturn has rings."))], want)
    right(llama_index.get_text_embedding_batch(["Saturn has rings."]), want)
    right([llama_index.get_query_embedding("Saturn has rings.")], want)
    right(asyncio.run(llama_index.aget_text_embedding_batch(["Saturn has rings."])), want)
    assert langchain.embedder._core.backend._engine is engine
    assert llama_index.embedder._core.backend._engine is engine


def test_a_refused_text_costs_only_itself(options, encode):
    with Embedder(**{**options, "long_text": "error"}) as embedder:
        with pytest.raises(errors.InputTooLongError, match="402 tokens, the limit is 256") as caught:
            embedder.embed(["first", "word " * 400, "last"])
        assert caught.value.indexes == (1,)
        right(caught.value.vectors[[0, 2]], [encode("first"), encode("last")])
        with pytest.raises(errors.ServerStatusError, match="is_matryoshka"):
            Embedder(**options, dimensions=64).embed(["a"])


def test_long_texts_are_chunked_as_over_http(options, live_server):
    text = "Rivers and bridges, and the people who cross them. " * 200
    with Embedder(**live_server.options, long_text="chunk") as served:
        want = served.embed([text])
    with Embedder(**{**options, "long_text": "chunk"}) as embedder:
        right(embedder.embed([text]), want)


def test_prompts_and_fingerprints_are_those_of_the_server(options, live_server, encode):
    with Embedder(**live_server.options, query_prompt="query: ", long_text="truncate") as served:
        made = served.fingerprint()
    with Embedder(**options, query_prompt="query: ", expect=made) as embedder:
        right(embedder.embed(["rings"], kind="query"), [encode("query: rings")])
    with (
        Embedder(**options, expect=made) as embedder,
        pytest.raises(errors.FingerprintMismatchError, match="query_prompt"),
    ):
        embedder.embed(["rings"])


def test_info_tells_of_the_engine(embedder, live_model):
    info = embedder.info()
    assert (info.model, info.dimension, info.max_model_len) == (live_model, 384, 256)


def _embed_in_child(embedder, pipe):
    try:
        pipe.send(embedder.embed(["a"]).shape)
    except errors.VLLMEmbedError as exc:
        pipe.send(str(exc))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_gets_a_sentence_and_the_parent_goes_on(embedder):
    embedder.embed(["a"])
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_embed_in_child, args=(embedder, theirs))
    child.start()
    assert ours.poll(30), "the child hangs"
    said = ours.recv()
    child.join(30)
    assert "fork" in said
    assert embedder.embed(["a"]).shape == (1, 384)


def _script(path):
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def test_an_old_bert_checkpoint_loads_with_hf_overrides_and_the_process_ends_silently(live_model, tmp_path, encode):
    old = Path(variant(live_model, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "architectures": ["BertForAncientTasks"]}))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import json
        from vllm_embed import Embedder

        if __name__ == "__main__":
            arguments = {{"dtype": "float32", "hf_overrides": {{"architectures": ["BertModel"]}}}}
            embedder = Embedder(model={str(old)!r}, in_process=True, engine_args=arguments)
            print(json.dumps(embedder.embed(["Saturn has rings."]).tolist()))
        """)
    )
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    done = _script(script)
    assert done.returncode == 0, done.stderr
    right(json.loads(done.stdout.splitlines()[-1]), [encode("Saturn has rings.")])
    assert "Traceback" not in done.stderr
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and p.is_running()]
    assert not [p for p in left if "python" in p.name()]


def test_a_script_without_a_main_guard_gets_the_sentence(live_model, tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(f"""
        from vllm_embed import Embedder

        Embedder(model={live_model!r}, in_process=True).embed(["a"])
        """)
    )
    done = _script(script)
    assert done.returncode != 0
    assert "__main__" in done.stderr
