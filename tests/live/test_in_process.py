"""Real vLLM in this process: the same vectors, the same errors, and processes that start and end as they should.

An engine takes 20 to 60 seconds to load on two cores, so most tests share one, and a script shows several things.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from test_parity import CLEANED, LEAST_COSINE, OF_ONE_TEXT, OF_TEXTS, SENT, TEXTS, cosine

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding
from vllm_embed import Embedder, errors
from vllm_embed._engines import engines

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT TESTED: vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM and torch are loaded into this process, and they warn
]

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"dtype": "float32"}
QUIET = ("leaked", "Traceback", "Exception ignored", "died", "ERROR")
"""What an exit must not say."""


@pytest.fixture(scope="module")
def options(live_model: str) -> dict[str, object]:
    return {"model": live_model, "in_process": True, "engine_args": ARGUMENTS, "long_text": "truncate"}


@pytest.fixture(scope="module")
def here(options) -> Iterator[SimpleNamespace]:
    """Both adapters and the embedder over one engine in this process."""
    made = SimpleNamespace(
        langchain=VLLMEmbeddings(**options), llama_index=VLLMEmbedding(**options), embedder=Embedder(**options)
    )
    made.embedder.embed(["load"])
    yield made
    for one in (made.langchain.embedder, made.llama_index.embedder, made.embedder):
        one.close()
    assert not engines.running
    assert not engines.ending


def test_the_vectors_are_the_servers(here, live_server) -> None:
    with Embedder(**live_server.options, long_text="truncate") as served:
        theirs = served.embed(SENT)
    ours = here.embedder.embed(SENT)
    assert min(map(cosine, ours, theirs)) >= LEAST_COSINE
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("method", OF_ONE_TEXT)
def test_the_vector_of_one_text_is_that_of_sentence_transformers(here, encode, method) -> None:
    wrong = [
        name
        for name, (text, cleaned) in TEXTS.items()
        if cosine(OF_ONE_TEXT[method](here, text), encode(cleaned)) < LEAST_COSINE
    ]
    assert wrong == []


@pytest.mark.parametrize("method", OF_TEXTS)
def test_the_vectors_of_many_texts_are_those_of_sentence_transformers(here, encode, method) -> None:
    vectors = OF_TEXTS[method](here, SENT * 5)
    assert min(map(cosine, vectors, [encode(cleaned) for cleaned in CLEANED] * 5)) >= LEAST_COSINE


def test_threads_share_the_engine_and_keep_their_order(here) -> None:
    want = here.embedder.embed(SENT)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: here.embedder.embed(SENT), range(16)):
            np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_prompt_goes_before_the_text(here, encode) -> None:
    prompted = here.embedder.with_prompts(query="query: ", document="passage: ")
    assert cosine(prompted.embed(["rings"], "query")[0], encode("query: rings")) >= LEAST_COSINE
    assert cosine(prompted.embed(["rings"])[0], encode("passage: rings")) >= LEAST_COSINE
    prompted.close()


def test_a_second_embedder_with_the_same_arguments_loads_nothing(here, options) -> None:
    before = _cores()
    start = time.monotonic()
    with Embedder(**{**options, "long_text": "error", "query_prompt": "q "}) as second:
        second.embed(["a"])
    assert time.monotonic() - start < 5
    assert _cores() == before
    assert len(before) == 1
    here.embedder.embed(["still there"])


def test_a_refused_text_costs_only_itself(here, options, live_server) -> None:
    texts = ["one", "word " * 300, "three", "a" * 100 + " b" * 5_000, "five"]
    refused = {}
    for name, settings in (("here", options), ("served", {**live_server.options})):
        with (
            Embedder(**{**settings, "long_text": "error"}) as embedder,
            pytest.raises(errors.InputTooLongError) as caught,
        ):
            embedder.embed(texts)
        refused[name] = caught.value
    ours, theirs = refused["here"], refused["served"]
    assert ours.indexes == theirs.indexes == (1, 3)
    assert ours.reasons[1] == "302 tokens, the limit is 256"
    np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-5)  # NaN rows at the same places
    np.testing.assert_allclose(ours.vectors[[0, 2, 4]], here.embedder.embed(["one", "three", "five"]), atol=1e-5)


def test_dimensions_are_refused_and_made_up_for_as_over_http(here, options) -> None:
    with (
        Embedder(**options, dimensions=100) as embedder,
        pytest.raises(errors.ServerStatusError, match="is_matryoshka.*dimensions_fallback"),
    ):
        embedder.embed(["a"])
    with Embedder(**options, dimensions=100, dimensions_fallback="client") as embedder:
        cut = here.embedder.embed(["a"])[:, :100]
        np.testing.assert_allclose(embedder.embed(["a"]), cut / np.linalg.norm(cut), atol=1e-5)


def test_raw_vectors_are_not_of_unit_length(here, options) -> None:
    with Embedder(**options, normalize=False) as embedder:
        raw = embedder.embed(["Saturn has rings."])[0]
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    assert cosine(raw, here.embedder.embed(["Saturn has rings."])[0]) >= LEAST_COSINE


def test_info_tells_of_the_engine(here, live_model) -> None:
    info = here.embedder.info()
    assert (info.model, info.root, info.dimension, info.max_model_len) == (live_model, live_model, 384, 256)
    assert info.version == importlib.import_module("vllm").__version__
    assert [place.url for place in info.endpoints] == ["in process"]


def test_an_old_checkpoint_loads_under_a_known_architecture(here, encode, live_model, tmp_path) -> None:
    """A second engine beside the first: other arguments, another engine."""
    folder = tmp_path / "old-bert"
    folder.mkdir()
    for file in Path(live_model).rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(live_model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModelOldName"]}))
    overrides = {"hf_overrides": {"architectures": ["BertModel"]}}
    with Embedder(model=str(folder), in_process=True, engine_args={**ARGUMENTS, **overrides}) as old:
        vectors = old.embed(["Saturn has rings.", "서울은 대한민국의 수도이다."])
        assert len(_cores()) == 2
    assert cosine(vectors[0], encode("Saturn has rings.")) >= LEAST_COSINE
    assert cosine(vectors[1], encode("서울은 대한민국의 수도이다.")) >= LEAST_COSINE
    assert len(_cores()) == 1
    here.embedder.embed(["still there"])


def test_an_engine_that_cannot_start_says_so(tmp_path) -> None:
    with (
        Embedder(model=str(tmp_path / "nothing-here"), in_process=True) as embedder,
        pytest.raises(errors.EngineError, match=r"vLLM cannot start '.*nothing-here'"),
    ):
        embedder.embed(["a"])
    with (
        Embedder(model="m", in_process=True, engine_args={"dtipe": "half"}) as embedder,
        pytest.raises(errors.ConfigurationError, match="engine_args: .*dtipe"),
    ):
        embedder.embed(["a"])


def _embed(embedder: Embedder) -> np.ndarray:
    return embedder.embed(["a", "b"])


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_worker_of_a_pool_is_refused_at_once(options, method) -> None:
    embedder = Embedder(**{**options, "engine_args": {**ARGUMENTS, "seed": 1}})  # not the one that runs here
    with (
        multiprocessing.get_context(method).Pool(1) as pool,
        pytest.raises(errors.EngineError, match="daemonic process"),
    ):
        pool.apply_async(_embed, (embedder,)).get(60)


def test_an_ingestion_pipeline_of_one_process_runs(here) -> None:
    documents = [Document(text=f"document {i}") for i in range(8)]
    nodes = IngestionPipeline(transformations=[here.llama_index]).run(documents=documents)
    assert [len(node.embedding) for node in nodes] == [384] * 8


def _cores() -> set[int]:
    children = psutil.Process().children()  # a server's core is a child of the server
    return {child.pid for child in children if "EngineCore" in child.name()}


class Script:
    """A script of its own process, and what was left of its processes when it had ended."""

    def __init__(self, code: str, folder: Path, model: str, **env: str) -> None:
        path = folder / "script.py"
        path.write_text(textwrap.dedent(code))
        self.process = subprocess.Popen(
            [sys.executable, str(path), model],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
            start_new_session=True,
        )
        seen: dict[int, psutil.Process] = {}
        until = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < until:
            for child in _children(self.process.pid):
                seen[child.pid] = child
            time.sleep(0.2)
        self.ended = self.process.poll() is not None
        gone = time.monotonic() + 10
        while any(map(_lives, seen.values())) and time.monotonic() < gone:
            time.sleep(0.2)
        self.left = [child for child in seen.values() if _lives(child)]
        for child in self.left:
            child.kill()
        self.process.kill()
        self.out = self.process.communicate()[0]
        self.errors = (folder / "stderr").read_text()
        self.exit = self.errors.partition("THE END")[2]

    def check(self, out: str) -> None:
        assert self.ended, self.errors
        assert self.out == out, self.errors
        assert self.left == []
        assert [word for word in QUIET if word in self.exit] == []


def _children(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_script_may_just_end_and_its_spawned_child_has_an_engine_of_its_own(tmp_path, live_model) -> None:
    code = """
        import concurrent.futures, multiprocessing, sys
        from vllm_embed import Embedder

        def work(embedder):
            return embedder.embed(["a", "b"]).shape

        if __name__ == "__main__":
            embedder = Embedder(model=sys.argv[1], in_process=True, engine_args={"dtype": "float32"})
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                print(pool.submit(work, embedder).result())
            print(embedder.embed(["a"] * 100).shape)
            print("THE END", file=sys.stderr)
    """
    Script(code, tmp_path, live_model).check("(2, 384)\n(100, 384)\n")


def test_a_fork_is_refused_and_a_killed_core_is_an_error_after_which_a_new_embedder_works(tmp_path, live_model) -> None:
    code = """
        import os, sys
        import psutil
        from vllm_embed import Embedder, errors

        def made():
            return Embedder(model=sys.argv[1], in_process=True, engine_args={"dtype": "float32"})

        if __name__ == "__main__":
            embedder = made()
            embedder.embed(["a"])
            child = os.fork()
            if child == 0:
                try:
                    embedder.embed(["a"])
                except errors.EngineError as exc:
                    print("spawn method" in str(exc), flush=True)
                sys.exit()  # with all the clean-up of an interpreter, as a worker of gunicorn
            os.waitpid(child, 0)
            print(embedder.embed(["b"]).shape, flush=True)
            core, = [c for c in psutil.Process().children(recursive=True) if "EngineCore" in c.name()]
            core.kill()
            for _ in range(2):
                try:
                    embedder.embed(["a"] * 1000)
                except errors.EngineError as exc:
                    print("its process died" in str(exc), flush=True)
            embedder.close()
            embedder = made()
            print(embedder.embed(["c"]).shape, flush=True)
            embedder.close()
            embedder.close()
    """
    script = Script(code, tmp_path, live_model)
    script.check("True\n(1, 384)\nTrue\nTrue\n(1, 384)\n")
    assert "can only" not in script.errors  # multiprocessing's, in the forked child


def test_a_script_without_a_main_guard_gets_a_sentence_before_anything_loads(tmp_path, live_model) -> None:
    code = """
        import sys
        from vllm_embed import Embedder, errors

        try:
            Embedder(model=sys.argv[1], in_process=True).embed(["a"])
        except errors.EngineError as exc:
            print('script.py, line 6, would then run a second time. Put' in str(exc), "vllm" in sys.modules)
        print("THE END", file=sys.stderr)
    """
    start = time.monotonic()
    Script(code, tmp_path, live_model).check("True False\n")
    assert time.monotonic() - start < 20


def test_an_ingestion_pipeline_of_processes_is_refused_with_a_sentence_and_ends(tmp_path, live_model) -> None:
    code = """
        import sys
        from llama_index.core import Document
        from llama_index.core.ingestion import IngestionPipeline
        from llama_index_vllm_embed import VLLMEmbedding
        from vllm_embed import errors

        if __name__ == "__main__":
            pipeline = IngestionPipeline(transformations=[VLLMEmbedding(model=sys.argv[1], in_process=True)])
            try:
                pipeline.run(documents=[Document(text=f"document {i}") for i in range(8)], num_workers=2)
            except errors.EngineError as exc:
                print("IngestionPipeline(num_workers=...)" in str(exc), "num_workers=None" in str(exc))
            print("THE END", file=sys.stderr)
    """
    start = time.monotonic()
    Script(code, tmp_path, live_model).check("True True\n")
    assert time.monotonic() - start < 60


def test_without_multiprocessing_the_engine_works_in_its_thread(tmp_path, live_model) -> None:
    code = """
        import sys
        import psutil
        from vllm_embed import Embedder

        embedder = Embedder(model=sys.argv[1], in_process=True, engine_args={"dtype": "float32"})  # no main guard
        print(embedder.embed(["a"]).shape, len(psutil.Process().children(recursive=True)))
        print("THE END", file=sys.stderr)
    """
    Script(code, tmp_path, live_model, VLLM_ENABLE_V1_MULTIPROCESSING="0").check("(1, 384) 0\n")


def test_ctrl_c_while_the_engine_loads_ends_it(tmp_path, live_model) -> None:
    code = """
        import os, signal, sys, threading, time
        import psutil
        from vllm_embed import Embedder

        interrupted = []

        def interrupt():
            while not [c for c in psutil.Process().children(recursive=True) if "EngineCore" in c.name()]:
                time.sleep(0.1)
            interrupted.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        if __name__ == "__main__":
            threading.Thread(target=interrupt, daemon=True).start()
            try:
                Embedder(model=sys.argv[1], in_process=True, engine_args={"dtype": "float32"}).embed(["a"])
            except KeyboardInterrupt:
                print("interrupted" if time.monotonic() - interrupted[0] < 2 else "late")
    """
    script = Script(code, tmp_path, live_model)
    assert script.ended
    assert script.out == "interrupted\n"  # a moment later, not when it is loaded
    assert script.left == []
    ours = [line for line in script.errors.splitlines() if line.startswith("Traceback")]
    assert ours == []  # a worker of 0.27 logs one of its own when its core goes
