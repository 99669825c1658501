"""A stand-in for vLLM: `LLM` with the one method that embeds, and faults on order. Words are tokens.

It never stands for vLLM's vectors, only for how it is called, refuses and dies; see tests/live for the real one.
"""

import hashlib
import multiprocessing
import os
import queue
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch

__version__ = "0.32.0"
LIMIT = 16
WIDTH = 8


class VLLMValidationError(Exception):
    pass


class EngineDeadError(Exception):
    pass


class PoolingParams:
    def __init__(self, *, dimensions=None, use_activation=None):
        self.dimensions = dimensions
        self.use_activation = use_activation


def token(word):
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") | 2


class Tokenizer:
    """[1] words [2]; `specials=0` leaves those two out."""

    specials = True

    def __call__(
        self,
        texts,
        *,
        add_special_tokens,
        truncation,
        max_length,
        return_attention_mask,
        return_token_type_ids,
        verbose,
    ):
        assert add_special_tokens
        assert (return_attention_mask, return_token_type_ids, verbose) == (False, False, False)
        return {"input_ids": [self.ids(text, max_length if truncation else None) for text in texts]}

    def ids(self, text, length=None):
        words = [token(word) for word in text.split()]
        if not self.specials:
            return words[:length]
        return [1, *words[: None if length is None else length - 2], 2]


class World:
    """What happened to all engines of this process, and what is to happen."""

    def __init__(self):
        self.made = []
        self.calls = []
        self.threads = set()
        self.shut = 0
        self.finalizers = []
        self.cores = []
        self.with_core = False
        self.start_fault = None
        self.fault = None
        self.before_encode = lambda prompts: None
        self.before_start = lambda: None
        self.own_reading = False


world = World()


def vector(ids):
    digest = hashlib.sha256(repr(list(ids)).encode()).digest()
    values = [byte / 255 - 0.5 for byte in digest[:WIDTH]]
    length = sum(value * value for value in values) ** 0.5
    return [value / length for value in values]


class LLM:
    def __init__(self, model, runner, **arguments):
        assert runner == "pooling"
        world.threads.add(threading.get_ident())
        world.made.append((model, arguments))
        if "nonsense" in arguments:
            raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'nonsense'")
        if seconds := os.environ.get("STAND_IN_LOADS_S"):
            time.sleep(float(seconds))
        world.before_start()
        if world.start_fault is not None:
            raise world.start_fault
        self._tokenizer = Tokenizer()
        self._finalizer = weakref.finalize(self, print, "vLLM cleans up in its own way")
        world.finalizers.append(self._finalizer)
        self._core = None
        if world.with_core or os.environ.get("STAND_IN_CORE"):
            spawn = multiprocessing.get_context("spawn")
            world.cores.append(spawn.Process(target=time.sleep, args=(100,), name="EngineCore"))
            self._core = world.cores[-1]
            self._core.start()
        self.outputs = queue.Queue()
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(model=f"root of {model}", max_model_len=LIMIT, encoder_config=None),
            engine_core=SimpleNamespace(shutdown=self._shutdown, outputs_queue=self.outputs),
        )

    def _shutdown(self, timeout):
        self._finalizer.detach()
        if self._core is not None:
            self._core.kill()
        world.threads.add(threading.get_ident())
        world.shut += 1
        if note := os.environ.get("STAND_IN_NOTE"):
            with Path(note).open("a") as file:
                file.write(f"shut in {os.getpid()}\n")

    def get_tokenizer(self):
        return self._tokenizer

    def encode(self, prompts, pooling_params, *, pooling_task, use_tqdm, tokenization_kwargs=None, lora_request=None):
        assert (pooling_task, use_tqdm) == ("embed", False)
        world.threads.add(threading.get_ident())
        world.calls.append(list(prompts))
        world.before_encode(prompts)
        if self._core is not None and not self._core.is_alive():
            raise self.outputs.get()  # as vLLM 0.32 waits for a core that was killed
        if world.fault is not None:
            raise world.fault
        if pooling_params.dimensions is not None:
            raise VLLMValidationError(
                f"Model 'm' does not support Matryoshka embeddings; dimensions must be unset (received dimensions="
                f"{pooling_params.dimensions})."
            )
        outputs = [self._output(prompt, pooling_params, tokenization_kwargs or {}) for prompt in prompts]
        if lora_request is not None and lora_request.lora_path != "of another model":
            for output in outputs:
                output.outputs.data = torch.Tensor(-output.outputs.data.array)
        return outputs

    def _output(self, prompt, pooling_params, tokenizing):
        if isinstance(prompt, str):
            length = tokenizing.get("truncate_prompt_tokens")
            ids = self._tokenizer.ids(prompt, LIMIT if length == -1 else length)
            if world.own_reading:
                ids = [3, *ids[1:]]
        else:
            ids = prompt["prompt_token_ids"]
        if len(ids) > LIMIT:
            raise VLLMValidationError(
                f"This model's maximum context length is {LIMIT} tokens. However, your prompt contains at least "
                f"{LIMIT + 1} input tokens, which exceeds this limit."
            )
        if not ids:
            raise VLLMValidationError("The decoder prompt cannot be empty")
        data = vector(ids)
        if token("nan") in ids:
            data[0] = float("nan")
        if pooling_params.use_activation is False:
            data = [3 * value for value in data]
        return SimpleNamespace(prompt_token_ids=list(ids), outputs=SimpleNamespace(data=torch.Tensor(data)))
