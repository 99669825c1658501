"""Embedding on Ray: a Ray Data dataset gets a column of vectors, and a job's texts are embedded by several processes.

Each Ray actor holds one `Embedder`, and its own `max_concurrency` requests in flight. Settings travel to the actors
pickled, with their key.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import signal
import threading
import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from vllm_embed._column import EmbedColumn, portable
from vllm_embed._stream import AHEAD, in_order
from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError, EngineError, VLLMEmbedError
from vllm_embed.info import Block
from vllm_embed.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from vllm_embed._backend import Limits
    from vllm_embed._stream import OnError
    from vllm_embed.settings import Kind

__all__ = ["embed_dataset", "stream"]

_WORKERS: Final = 2
"""Actors, where a server does the work: one process can feed some GPUs, and the second fills the gaps of the first."""
_REQUESTS: Final = 4
"""Requests in a batch of Ray Data for each that may be in flight: at a batch's end fewer and fewer are."""
_RESTARTS: Final = 3
"""Of an actor that died; what it had not finished is done again."""


def embed_dataset(
    dataset: Any,
    *,
    column: str = "text",
    output_column: str = "embedding",
    workers: int | None = None,
    on_error: OnError = "raise",
    error_column: str = "error",
    kind: Kind = "document",
    **settings: Any,
) -> Any:
    """A Ray Data dataset with a column of vectors, a fixed-size list of float32; lazy, as `Dataset.map_batches`.

    The vectors are those of `Embedder.embed` with the same settings. All other columns stay as they are; blocks come in
    the order that Ray's `preserve_order` says.

    Args:
        dataset: a `ray.data.Dataset`.
        column: the texts.
        output_column: the vectors.
        workers: actors, each with an `Embedder` and `max_concurrency` requests in flight to each replica. None: 2; in
            process one for each GPU.
        on_error: "raise": a text that cannot be embedded fails the dataset with its reason. "yield": its vector is null
            and `error_column` has the reason, null for all others.
        error_column: with "yield", the reasons.
        kind: "query" or "document"; decides the prompt.
        **settings: see `Settings`.

    Returns:
        A `ray.data.Dataset`.

    Raises:
        ConfigurationError: for settings that cannot work, or without Ray. What fails later is raised by Ray, with our
            error's text.
    """
    ray = _ray()
    made = Settings(**settings)
    options: dict[str, Any] = {"on_error": on_error, "error_column": error_column, "kind": kind}
    EmbedColumn(made, column=column, output_column=output_column, **options)  # refuses here what cannot work
    with _planned(made) as (limits, slots):
        rows = limits.texts * slots * _REQUESTS
    gpus = _gpus(ray, made)
    return dataset.map_batches(
        EmbedColumn,
        fn_constructor_args=(portable(made),),
        fn_constructor_kwargs={"column": column, "output_column": output_column, **options},
        compute=ray.data.ActorPoolStrategy(size=_count(ray, workers, gpus, in_process=made.in_process)),
        batch_format="pyarrow",
        batch_size=rows,
        num_cpus=0,  # it waits for servers, or for its GPU; reading and writing need the cores
        **({"num_gpus": gpus} if gpus else {}),
    )


@contextlib.contextmanager
def stream(settings: Settings, *, workers: int | None = None) -> Iterator[Callable[[Iterator[Any]], Iterator[Block]]]:
    """What `Embedder.stream(on_error="yield")` is, with the texts embedded by Ray actors.

    Ray is started on this machine unless a cluster is connected or found, as `ray.init()` finds it; what was started
    here is shut down here. An actor that dies is started again, and its blocks are embedded again.

    Args:
        settings: each actor's.
        workers: actors. None: 2; in process one for each GPU.

    Yields:
        Texts in order to blocks in order.

    Raises:
        ConfigurationError: without Ray, or for settings that cannot travel.
        EngineError: Ray does not start, or its actors keep dying.
        VLLMEmbedError: any other of `vllm_embed.errors`, from an actor.
    """
    settings = portable(settings)
    with _started() as ray, _planned(settings) as (limits, slots):
        gpus = _gpus(ray, settings)
        make = ray.remote(_Actor).options(
            num_cpus=0,
            num_gpus=gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            max_concurrency=AHEAD * slots,
            scheduling_strategy="SPREAD",
        )
        actors = [make.remote(settings) for _ in range(_count(ray, workers, gpus, in_process=settings.in_process))]
        try:
            yield _Stream(ray, actors, limits, AHEAD * slots * len(actors))
        finally:
            for actor in actors:
                ray.kill(actor)


class _Done(NamedTuple):
    """What an actor made of a block of texts."""

    vectors: NDArray[np.float32]
    failures: dict[int, VLLMEmbedError]
    """By place in the block."""
    limits: Limits
    """Of a request, as this actor's server takes them."""
    requests: int
    """Since its last answer."""
    prompt_tokens: int


class _Actor:
    """One embedder in a process of its own. Its methods run in as many threads as there may be blocks in flight."""

    def __init__(self, settings: Settings) -> None:
        self._embedder = Embedder(settings)
        self._told = (0, 0)
        self._lock = threading.Lock()

    def embed(self, texts: list[Any]) -> _Done | VLLMEmbedError:
        """Errors are returned: Ray would wrap a raised one in its own."""
        try:
            blocks = list(self._embedder.stream(texts, on_error="yield"))
        except VLLMEmbedError as exc:
            return exc
        failures = {at: error for block in blocks for at, error in block.failures.items()}
        with self._lock:
            before, stats = self._told, self._embedder.stats()
            self._told = now = (stats.requests, stats.prompt_tokens)
        return _Done(
            np.concatenate([block.vectors for block in blocks]),
            failures,
            _limits(self._embedder),
            now[0] - before[0],
            now[1] - before[1],
        )


class _Stream:
    """Blocks over actors, in turn.

    Attributes:
        requests: made by the actors for the blocks that were handed out.
        prompt_tokens: of them, as the server counted them.
    """

    def __init__(self, ray: Any, actors: list[Any], limits: Limits, room: int) -> None:
        self._ray = ray
        self._actors = actors
        self._turn = itertools.cycle(actors)
        self._limits = limits
        self._room = room
        self.requests = self.prompt_tokens = 0

    def __call__(self, texts: Iterator[Any]) -> Iterator[Block]:
        return in_order(
            texts, self._limits, lambda: self._room, start=self._start, finish=self._finish, cancel=self._cancel
        )

    def _start(self, texts: list[Any]) -> Any:
        return next(self._turn).embed.remote(texts)

    def _finish(self, start: int, _: int, way: Any) -> Block:
        try:
            done = self._ray.get(way)
        except self._ray.exceptions.RayError as exc:
            raise EngineError(
                f"a Ray actor failed, also after {_RESTARTS} restarts, and the texts from {start} on are not embedded. "
                f"Is there memory enough, and vllm-embed installed on every machine? Ray says: {exc}"
            ) from exc
        if isinstance(done, VLLMEmbedError):
            raise done
        self.requests += done.requests
        self.prompt_tokens += done.prompt_tokens
        self._limits.texts, self._limits.chars = done.limits.texts, done.limits.chars
        failures = {
            start + at: error.copy(indexes=(start + at,), reasons={start + at: str(error)})
            for at, error in done.failures.items()
        }
        return Block(start, np.array(done.vectors), failures)  # not Ray's memory, which is read-only

    def _cancel(self, way: Any) -> None:
        self._ray.cancel(way)


def _limits(embedder: Embedder) -> Limits:
    return embedder._core.backend.limits  # noqa: SLF001 - our own class


@contextlib.contextmanager
def _planned(settings: Settings) -> Iterator[tuple[Limits, int]]:
    """Limits and slots of an embedder with these settings; nothing is connected or loaded for it."""
    with Embedder(settings) as embedder:
        yield _limits(embedder), embedder._core.backend.slots  # noqa: SLF001 - our own class


def _ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError('Ray is not installed: pip install "vllm-embed[ray]"')
    if "RAY_ADDRESS" not in os.environ:
        # Under `uv run`, Ray (2.43 and later) would have its workers run `uv run` too, in a copy of the working
        # directory. On this machine they can share our environment. Read when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray  # noqa: PLC0415 - extra, and slow

    return ray


@contextlib.contextmanager
def _started() -> Iterator[Any]:
    """Ray, connected; what was started here is shut down."""
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's tips for its future versions
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as exc:
        raise EngineError(f"Ray does not start, or cannot be reached: {exc}") from exc
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    try:
        yield ray
    finally:
        ray.shutdown()


def _gpus(ray: Any, settings: Settings) -> int:
    """GPUs of one actor: in process, what its engine takes, where there are any."""
    if not settings.in_process or not ray.cluster_resources().get("GPU"):
        return 0
    arguments = settings.engine_args
    return int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))


def _count(ray: Any, workers: int | None, gpus: int, *, in_process: bool) -> int:
    """Actors to start.

    Raises:
        ConfigurationError: fewer than one, or more than there are GPUs for: Ray would wait for them without end.
    """
    if workers is not None and workers < 1:
        raise ConfigurationError(f"workers={workers}: at least 1")
    room = int(ray.cluster_resources()["GPU"]) // gpus if gpus else None
    if room is not None and (workers or 1) > room:
        raise ConfigurationError(f"workers={workers or 1} with {gpus} GPUs each: there are GPUs for {room}")
    return workers or room or (1 if in_process else _WORKERS)
