"""vLLM servers for embedding, started and stopped by Python."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
from pydantic import SecretStr

from vllm_embed import _launch, _probe, _process
from vllm_embed._serverlog import ended, phase
from vllm_embed.errors import ConfigurationError, EngineError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

__all__ = ["VLLMServer"]

_POLL_S = 0.25
_SILENCE_S = 15.0  # progress repeats itself after this long without news
_PROBE_TIMEOUT_S = 60.0
_LAST_PORT = 65_535
_OURS = {
    "--host": "host",
    "--port": "port",
    "--model": "model",
    "--uds": "host and port",
    "--root-path": "host and port",
    "--ssl-keyfile": "plain http here and TLS in front of it",
}
"""Options of vLLM's that would move the server away from where it is looked for, and what to use instead."""


class VLLMServer:
    """One or many `vllm serve` replicas of one embedding model, healthy inside the `with` block and gone after it.

        with VLLMServer("BAAI/bge-m3", replicas=2) as server:
            embeddings = VLLMEmbeddings(model=server.model_name, base_url=server.base_url)

    Healthy means that `/health` answers and a true embedding came back. On one GPU the replicas share its memory, with
    several each gets one, without NVIDIA GPUs they share the cores. The processes end with this one however it ends,
    SIGKILL included, within 10 seconds; the thread that started them may end before. vLLM is not imported here.

    Args:
        model: name on the hub, or a folder.
        replicas: how many servers.
        host: address to listen on.
        port: of the first replica, the others follow; 0 picks free ones.
        api_key: what clients must send; None takes the environment's VLLM_API_KEY, "" asks for none. Handed to vLLM in
            its environment, which `ps` does not show.
        served_model_name: name for requests; None takes `model`.
        dtype: as vLLM's `--dtype`; None leaves it to vLLM.
        vllm_args: more of vLLM's options, passed on as they are; they win over ours.
        env: added to this process's environment for the servers.
        log_dir: folder for one log a replica, appended to. None makes a temporary one, removed when all ends well.
        startup_timeout: seconds that one replica may take until it is healthy.
        on_progress: called with one short line at a time while the servers load, in the thread that calls `start`.
        command: what stands in for `vllm serve`, such as `["nice", "vllm", "serve"]`; model and options follow it.

    Raises:
        ConfigurationError: at once, for arguments that cannot work.
    """

    def __init__(
        self,
        model: str,
        *,
        replicas: int = 1,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | SecretStr | None = None,
        served_model_name: str | None = None,
        dtype: str | None = None,
        vllm_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        startup_timeout: float = 900.0,
        on_progress: Callable[[str], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        if replicas < 1:
            raise ConfigurationError(f"replicas={replicas!r}: at least 1")
        if not 0 <= port <= _LAST_PORT - replicas + 1:
            raise ConfigurationError(f"port={port!r} with {replicas} replicas: 0 to {_LAST_PORT - replicas + 1}")
        for name, instead in _OURS.items():
            if _launch.option(vllm_args, name) is not None:
                raise ConfigurationError(f"{name} among vLLM's arguments: use {instead}")
        self._model = str(Path(model).expanduser()) if model.startswith("~") else model
        self._replicas = replicas
        self._host = host
        self._port = port
        key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
        self._env = {**(env or {}), **({} if key is None else {"VLLM_API_KEY": key})}
        self._served_model_name = served_model_name
        self._dtype = dtype
        self._vllm_args = tuple(vllm_args)
        self._log_dir = log_dir
        self._startup_timeout = startup_timeout
        self._on_progress = on_progress or (lambda _line: None)
        self._command = command
        self._own_log_dir: Path | None = None
        self._running: list[_process.ServerProcess] = []
        self._ports: list[int] = []
        self._log_paths: list[Path] = []
        self._owner = 0

    @property
    def model_name(self) -> str:
        """The name that requests use."""
        return _launch.option(self._vllm_args, "--served-model-name") or self._served_model_name or self._model

    @property
    def base_urls(self) -> list[str]:
        """One ".../v1" for each replica, empty before the first start."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104
        return [f"http://{f'[{host}]' if ':' in host else host}:{port}/v1" for port in self._ports]

    @property
    def base_url(self) -> str | list[str]:
        """What `VLLMEmbeddings(base_url=...)` takes: the URL of one replica, the list of several."""
        return self.base_urls[0] if len(self._ports) == 1 else self.base_urls

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """One process for each replica, leader of the group in which all its children are; empty after `stop`."""
        return [process.popen for process in self._running]

    @property
    def log_paths(self) -> list[Path]:
        """One log for each replica, empty before the first start."""
        return list(self._log_paths)

    def start(self) -> Self:
        """Start all replicas and wait until they are healthy; nothing to do while they run.

        Raises:
            EngineError: vLLM is missing, a port is taken, or a server did not come up: why, from its log, and where
                the log is. No process is left.
        """
        self._forget_if_forked()
        if self._running:
            return self
        env = {**os.environ, **self._env}
        if self._model.startswith(("/", ".")) and not Path(self._model).exists():
            raise EngineError(f"no such model folder: {self._model}", model=self._model)
        engine = _launch.Engine(tuple(self._command)) if self._command else _launch.find_engine()
        self._ports = _probe.free_ports(self._host, self._port, self._replicas)
        launches = _launch.plan(
            engine,
            _launch.machine(env),
            model=self._model,
            ports=self._ports,
            host=self._host,
            served_model_name=self._served_model_name,
            dtype=self._dtype,
            vllm_args=self._vllm_args,
            env=env,
        )
        folder = self._log_folder()
        self._log_paths = [folder / f"vllm-{port}.log" for port in self._ports]
        self._owner = os.getpid()
        key = _launch.option(self._vllm_args, "--api-key") or env.get("VLLM_API_KEY")
        started = time.monotonic()
        try:
            for wave in _launch.waves(launches):
                processes = []
                for launch in wave:
                    _probe.check_free(self._host, launch.port)
                    processes.append(_process.ServerProcess(launch, folder / f"vllm-{launch.port}.log"))
                    self._running.append(processes[-1])
                self._await(processes, key, started)
        except BaseException as exc:
            self._stop(keep_logs=isinstance(exc, Exception))  # not for Ctrl-C
            raise
        self._running.sort(key=lambda process: self._ports.index(process.port))
        return self

    def stop(self) -> None:
        """Stop all replicas and their children, within 5 seconds; nothing to do when none runs."""
        self._forget_if_forked()
        self._stop(keep_logs=any(process.poll() is not None for process in self._running))

    def check(self) -> None:
        """Nothing while all replicas run.

        Raises:
            EngineError: a replica has ended: which, why, and where its log is.
        """
        self._forget_if_forked()
        for process in self._running:
            if (code := process.poll()) is not None:
                raise self._failure(process, ended(code))

    def wait(self) -> None:
        """Block as long as all replicas run.

        Raises:
            EngineError: as `check`.
        """
        while self._running:
            self.check()
            time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _forget_if_forked(self) -> None:
        if self._owner != os.getpid():  # the servers are the parent's, and so is the end of them
            self._running = []
            self._own_log_dir = None

    def _stop(self, *, keep_logs: bool) -> None:
        try:
            _process.stop(self._running)
        finally:
            self._running = []
            if self._own_log_dir is not None and not keep_logs:
                shutil.rmtree(self._own_log_dir, ignore_errors=True)
            self._own_log_dir = None

    def _log_folder(self) -> Path:
        if self._log_dir is None:
            self._own_log_dir = Path(tempfile.mkdtemp(prefix="vllm-embed-"))
            return self._own_log_dir
        folder = Path(self._log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _await(self, processes: Sequence[_process.ServerProcess], key: str | None, started: float) -> None:
        """Wait until these are healthy, and tell how they come along."""
        phases = dict.fromkeys(processes, "starting vLLM")
        told = dict.fromkeys(processes, -math.inf)
        # Without the environment: a proxy in it is not for this machine's own servers.
        with httpx.Client(trust_env=False, verify=False, timeout=_PROBE_TIMEOUT_S) as client:  # noqa: S501
            while phases:
                for process in list(phases):
                    healthy = self._is_healthy(process, client, key, phases[process])
                    news = [text for line in process.log.new_lines() if (text := phase(line)) is not None]
                    latest = "ready" if healthy else news[-1] if news else phases[process]
                    now = time.monotonic()
                    if latest != phases[process] or now - told[process] > _SILENCE_S:
                        phases[process], told[process] = latest, now
                        which = f"port {process.port}: " if self._replicas > 1 else ""
                        self._on_progress(f"[{now - started:3.0f} s] {which}{latest}")
                    if healthy:
                        del phases[process]
                time.sleep(_POLL_S if phases else 0)

    def _is_healthy(self, process: _process.ServerProcess, client: httpx.Client, key: str | None, doing: str) -> bool:
        url = self._url(process)
        if (code := process.poll()) is not None:
            raise self._failure(process, ended(code))
        try:
            if _probe.embeds(client, url, self.model_name, key):
                return True
        except EngineError as exc:
            raise EngineError(f"{exc}\nLog: {process.log.path}", endpoint=url, status=exc.status) from exc
        if time.monotonic() - process.started > self._startup_timeout:
            raise self._failure(process, f"was not healthy after {self._startup_timeout:g} s ({doing})")
        return False

    def _url(self, process: _process.ServerProcess) -> str:
        return self.base_urls[self._ports.index(process.port)]

    def _failure(self, process: _process.ServerProcess, what: str) -> EngineError:
        url, reason = self._url(process), process.log.reason() or "its log is empty"
        return EngineError(f"vLLM at {url} {what}: {reason}\nLog: {process.log.path}", endpoint=url, model=self._model)
