"""Tokens of a text by the server's own tokenizer: `/tokenize`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import orjson
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random_exponential

from vllm_embed.errors import (
    BadReplyError,
    ModelNotFoundError,
    ServerTimeoutError,
    ServerUnreachableError,
    VLLMEmbedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_embed._http import Http, HttpReply
    from vllm_embed._replicas import Replicas
    from vllm_embed.settings import Settings

__all__ = ["Tokens"]


class Tokens:
    """Counts tokens, at whichever replica is well and has the least to do.

    Args:
        settings: how often and how long to try.
        http: asks.
        replicas: any of them may answer.
        model: name of the model.
        refusal: the typed error of an answer that says no.
    """

    def __init__(
        self,
        settings: Settings,
        http: Http,
        replicas: Replicas,
        model: Callable[[], str],
        refusal: Callable[[HttpReply, Sequence[str]], VLLMEmbedError],
    ) -> None:
        self._settings = settings
        self._http = http
        self._replicas = replicas
        self._model = model
        self._refusal = refusal
        self._limit = 0

    def count(self, text: str) -> int:
        """Special ones included."""
        return int(self._asked(text)["count"])

    def limit(self) -> int:
        """Most tokens of one text, asked for once."""
        if not self._limit:
            self._limit = int(self._asked("a")["max_model_len"])
        return self._limit

    def _asked(self, text: str) -> dict[str, Any]:
        body = orjson.dumps({"model": self._model(), "prompt": text})
        retrying = Retrying(
            retry=retry_if_exception_type((ServerUnreachableError, ServerTimeoutError)),
            wait=wait_random_exponential(multiplier=0.5, max=30),
            stop=stop_after_attempt(self._settings.max_retries + 1) | stop_after_delay(self._settings.retry_deadline),
            reraise=True,
        )
        return retrying(self._ask, body)

    def _ask(self, body: bytes) -> dict[str, Any]:
        replica = min(self._replicas.all, key=lambda r: (r.out_until, r.in_a_row, r.in_flight))
        url = f"{replica.address.root}/tokenize"
        try:
            answer = self._http.exchange("POST", replica.address, url, body)
        except (ServerUnreachableError, ServerTimeoutError):
            replica.in_a_row += 1
            raise
        if answer.status == 404:
            raise ModelNotFoundError(
                f"{url} answers 404, so tokens cannot be counted there: let the gateway pass /tokenize on, or use "
                'long_text="truncate" instead of "chunk", and chunk sizes in characters',
                endpoint=replica.address.url,
                status=404,
            )
        if answer.status != 200:
            raise self._refusal(answer, ())
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            reply: dict[str, Any] = orjson.loads(answer.content)
            if reply["count"] >= 0 and reply["max_model_len"] > 0:
                return reply
        raise BadReplyError(f"{url} does not answer as vLLM does", endpoint=replica.address.url)
