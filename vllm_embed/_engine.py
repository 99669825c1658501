"""vLLM in this process, as the dispatcher sees it: what a server's replicas are over HTTP."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from vllm_embed import _engines, _llm, _wire
from vllm_embed._backend import About, Failed, Limits
from vllm_embed._wire import Reply
from vllm_embed.errors import BadReplyError, ClosedError, ConfigurationError, VLLMEmbedError
from vllm_embed.info import EndpointInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_embed._running import Running
    from vllm_embed.settings import Settings

__all__ = ["Engine"]

_log = logging.getLogger("vllm_embed")

_PLACE = "in process"
_FIRST, _FEWEST, _MOST = 256, 32, 4096
"""Texts of one batch: the first, and the bounds for those after it."""
_BATCH_S = 1.0
"""Seconds of work in one batch: the engine idles for some ms between two, and a query waits for two at most."""
_CHARS = 2_000_000
"""Characters of one batch; its token ids are some 20 MB."""


class Engine:
    """An engine in this process, shared with whoever asks for the same model and arguments.

    It is started by the first text, and freed when the last of its users closes. One that failed stays so for those
    who have it.

    Args:
        settings: `model` and `engine_args`.
    """

    slots: Final = 2
    """One batch is embedded while the next is tokenized."""

    def __init__(self, settings: Settings) -> None:
        assert settings.model is not None  # noqa: S101 - Settings looked
        self.limits = Limits(_FIRST, _CHARS)
        self._model = settings.model
        self._arguments = settings.engine_args
        self._engine: Running | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._counted = {"requests": 0, "texts": 0, "failures": 0, "in_flight": 0}

    def send(self, texts: Sequence[str], fields: Mapping[str, Any], avoid: Any = None) -> Reply:  # noqa: ARG002
        """One batch. Texts that are refused are told apart before, and cost nobody else's vector.

        Raises:
            Failed: holding the typed error.
        """
        with self._counting(len(texts)):
            try:
                return self._embed(self._started(), texts, fields)
            except VLLMEmbedError as exc:
                exc.model = self._model
                raise Failed(exc) from exc

    @contextlib.contextmanager
    def _counting(self, texts: int) -> Iterator[None]:
        self._count(requests=1, texts=texts, in_flight=1)
        start = time.monotonic()
        try:
            yield
        except Failed:
            self._count(failures=1)
            raise
        finally:
            self._count(in_flight=-1)
            _log.debug("%s: %d texts, %.1f ms", _PLACE, texts, (time.monotonic() - start) * 1e3)

    def _count(self, **changes: int) -> None:
        with self._lock:
            for name, change in changes.items():
                self._counted[name] += change

    def _started(self) -> Running:
        with self._lock:
            if self._closed:
                raise ClosedError
            if self._engine is None:
                if importlib.util.find_spec("vllm") is None:
                    raise ConfigurationError(_llm.NO_VLLM)
                self._engine = _engines.acquire(self._model, self._arguments)
            return self._engine

    def _embed(self, engine: Running, texts: Sequence[str], fields: Mapping[str, Any]) -> Reply:
        pooling = {name: value for name, value in fields.items() if name != "truncate_prompt_tokens"}
        cut = "truncate_prompt_tokens" in fields
        reader = engine.llm().reader
        prompts: Sequence[Any]
        refused: dict[int, VLLMEmbedError] = {}
        try:
            if reader is None:
                prompts = list(texts)
                rows = engine.encode(prompts, pooling, {"truncate_prompt_tokens": -1} if cut else {})
            else:
                prompts, refused = reader.read(texts, cut=cut)
                rows = engine.encode(prompts, pooling, {}) if prompts else np.empty((0, 0), dtype=np.float32)
        except VLLMEmbedError:
            raise
        except Exception as exc:
            raise self._refusal(exc, texts) from exc
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            sent = [index for index in range(len(texts)) if index not in refused]
            for row in np.flatnonzero(~finite):
                refused[sent[row]] = BadReplyError("a vector that is not finite (NaN or infinity)")
            rows = rows[finite]
        for error in refused.values():
            error.model = self._model
        if 2 * len(texts) >= self.limits.texts:
            self.limits.texts = min(max(round(engine.rate * _BATCH_S), _FEWEST), _MOST)
        return Reply(rows, 0 if reader is None else sum(map(len, prompts)), refused)

    def _refusal(self, exc: Exception, texts: Sequence[str]) -> VLLMEmbedError:
        """What the server would have answered: the same class, and advice for this place."""
        if isinstance(exc, TypeError) and "argument" in str(exc):
            return ConfigurationError(f"extra_body: in process it is the arguments of vllm.PoolingParams: {exc}")
        body = {"error": {"message": str(exc), "param": getattr(exc, "parameter", None)}}
        error = _wire.read_error(400, orjson.dumps(body), texts=texts)
        said = str(error).replace(
            "start vLLM with --hf-overrides '{\"is_matryoshka\": true}'",
            'set engine_args={"hf_overrides": {"is_matryoshka": True}}',
        )
        return error.copy(said.removeprefix("400 "))

    def another(self, than: Any) -> bool:  # noqa: ARG002
        """There is one place."""
        return False

    def troubles(self) -> str:
        """There is one place."""
        return ""

    def model(self) -> str:
        """The hub id or folder."""
        return self._model

    def count(self, text: str) -> int:
        """Tokens of a text by the engine's own tokenizer, special ones included."""
        reader = self._started().llm().reader
        if reader is None:
            raise ConfigurationError(
                'long_text="chunk" cannot count tokens of this model in process: the engine reads texts in its '
                'own way. Use long_text="truncate", or a server'
            )
        return reader.count(text)

    def limit(self) -> int:
        """Most tokens of one text, special ones included."""
        return self._started().llm().limit

    def about(self) -> About:
        """What the engine says of itself, started if need be."""
        llm = self._started().llm()
        place = EndpointInfo(url=_PLACE, healthy=True, state="up", version=llm.version, **self._counted)
        return About(llm.root, llm.limit, llm.version, (place,))

    def traffic(self) -> dict[str, dict[str, int]]:
        """Counters of this embedder's batches."""
        return {_PLACE: dict(self._counted)}

    def close(self) -> None:
        """Give the engine back."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
        if engine is not None:
            _engines.release(engine)

    def forked(self) -> None:
        """In a forked child: an engine of the parent's says so when it is used; none yet means one of our own."""
        self._lock = threading.Lock()
        self._counted["in_flight"] = 0
