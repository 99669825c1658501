"""vLLM over HTTP, as the dispatcher sees it: one attempt at one request, and what the server says of itself."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from vllm_embed import _address, _wire
from vllm_embed._backend import About, Failed, Limits
from vllm_embed._http import Http
from vllm_embed._replicas import Replica, Replicas
from vllm_embed._tokens import Tokens
from vllm_embed.errors import (
    BadReplyError,
    ConfigurationError,
    ModelNotFoundError,
    ServerStatusError,
    ServerTimeoutError,
    ServerUnreachableError,
    VLLMEmbedError,
)
from vllm_embed.info import EndpointInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_embed._http import HttpReply
    from vllm_embed._wire import Reply
    from vllm_embed.settings import Settings

__all__ = ["ModelCard", "Server"]

_log = logging.getLogger("vllm_embed")

_ASK_S = 10.0
"""Seconds for the small questions: models, version, health."""


@dataclass(frozen=True)
class ModelCard:
    """An entry of `/v1/models`."""

    id: str
    root: str | None
    max_model_len: int | None


class Server:
    """One or many replicas of `vllm serve`.

    Args:
        settings: all of them; read once.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        addresses = _address.addresses(settings.base_url)
        self._http = Http(settings, addresses)
        self.replicas = Replicas(addresses, settings.max_concurrency)
        self.limits = Limits(settings.batch_size, settings.max_batch_chars)
        self._lengths: dict[str, int | None] = {}
        self._model = settings.model
        self._version: str | None = None
        self._tokens = Tokens(settings, self._http, self.replicas, self.model, self._refusal)
        self._asking = threading.Lock()

    @property
    def slots(self) -> int:
        """Requests that may be in flight now."""
        return self.replicas.slots

    def send(self, texts: Sequence[str], fields: Mapping[str, Any], avoid: Replica | None = None) -> Reply:
        """One attempt at one request, at the replica with the fewest in flight.

        Raises:
            Failed: holding the typed error; what to do about it is the caller's to decide.
        """
        try:
            body = _wire.request_body(self.model(), texts, self._as_known(fields))
        except VLLMEmbedError as exc:
            raise Failed(exc) from exc
        replica = self.replicas.take(avoid)
        start = time.monotonic()
        status = 0
        try:
            if not replica.checked and len(self.replicas) > 1:
                self._compare(replica)
            answer = self._http.exchange("POST", replica.address, f"{replica.address.url}/embeddings", body)
            status = answer.status
            if status != 200:
                raise self._refusal(answer, texts)
            reply = _wire.read_reply(answer.content, len(texts))
            self._compare_width(replica, reply.vectors.shape[1])
        except VLLMEmbedError as exc:
            exc.endpoint, exc.model = replica.address.url, self._model
            retry_after = _seconds(answer.headers.get("retry-after")) if status else None
            if isinstance(exc, (ServerUnreachableError, ServerTimeoutError, BadReplyError)) or status >= 429:
                self.replicas.failed(replica, exc, retry_after)
            else:
                self.replicas.done(replica, len(texts))
            raise Failed(exc, replica, retry_after) from exc
        except BaseException:  # Ctrl-C in a thread that carries its own request
            self.replicas.done(replica, 0)
            raise
        finally:
            ms = (time.monotonic() - start) * 1e3
            _log.debug("%s: %d texts, %.1f ms, status %d", replica.address.url, len(texts), ms, status)
        self.replicas.done(replica, len(texts), time.monotonic() - start)
        return reply

    def _as_known(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields under the names that this server's version knows; asked for once, and only where it matters."""
        if "use_activation" not in fields:
            return fields
        if self._version is None:
            self._version = self.version(self.replicas.all[0]) or ""
        numbers = re.match(r"0\.(\d+)", self._version)
        if numbers and int(numbers[1]) < 16:  # use_activation was called normalize from 0.10.2 to 0.15
            return {"normalize" if name == "use_activation" else name: value for name, value in fields.items()}
        return fields

    def _compare(self, replica: Replica) -> None:
        """Once a replica, and again after a failure: it serves our model as the others do.

        Raises:
            ConfigurationError: another name or limit, saying whose.
        """
        url, model = replica.address.url, self.model()
        try:
            cards = self.cards(replica)
        except (ModelNotFoundError, BadReplyError):
            cards = []  # a gateway hides the list: only the vectors tell
        card = next((card for card in cards if card.id == model), None)
        if cards and card is None:
            names = ", ".join(repr(card.id) for card in cards)
            raise ConfigurationError(f"the replicas serve different models: {url} serves {names}, not {model!r}")
        if card is not None:
            self._lengths[url] = card.max_model_len
            if len(set(self._lengths.values())) > 1:
                told = "; ".join(f"{where}: {limit}" for where, limit in self._lengths.items())
                raise ConfigurationError(f"the replicas differ in max_model_len, so in what they cut or refuse: {told}")
        replica.checked = True

    def _compare_width(self, replica: Replica, width: int) -> None:
        replica.width = width
        known = {r.address.url: r.width for r in self.replicas.all if r.width}
        if len(set(known.values())) > 1:
            told = "; ".join(f"{where}: {size}" for where, size in known.items())
            raise ConfigurationError(f"the replicas' vectors differ in width: {told}")

    def _refusal(self, answer: HttpReply, texts: Sequence[str]) -> VLLMEmbedError:
        error = _wire.read_error(answer.status, answer.content, texts=texts, secrets=self._http.secrets)
        if 300 <= answer.status < 400:
            target = urlsplit(answer.headers.get("location", ""))
            to = f"{target.scheme}://{target.hostname}" if target.hostname else "nowhere"
            error = ServerStatusError(
                f"{answer.status}: the server redirects to {to}, which is not followed; put the final address into "
                "base_url",
                status=answer.status,
            )
        return error

    def another(self, than: Replica) -> bool:
        """Whether a replica other than this one is up."""
        return self.replicas.another(than)

    def troubles(self) -> str:
        """Each replica with its last failure; "" for a single one."""
        return self.replicas.troubles() if len(self.replicas) > 1 else ""

    def model(self) -> str:
        """Name to send: the setting, or the one model that the server lists, asked for once.

        Raises:
            ConfigurationError: several are listed, or none.
        """
        if self._model is None:
            with self._asking:
                if self._model is None:
                    self._model = self._only_model()
        return self._model

    def _only_model(self) -> str:
        cards: list[ModelCard] = []
        for replica in self.replicas.all:
            try:
                cards = self.cards(replica)
                break
            except (ServerUnreachableError, ServerTimeoutError):
                if replica is self.replicas.all[-1]:
                    raise
        if len(cards) != 1:
            names = ", ".join(repr(card.id) for card in cards) or "none"
            raise ConfigurationError(f"the server lists {len(cards)} models ({names}): name one with model=")
        return cards[0].id

    def cards(self, replica: Replica) -> list[ModelCard]:
        """What a replica's `/v1/models` lists."""
        answer = self._http.exchange("GET", replica.address, f"{replica.address.url}/models", timeout=self._patience())
        if answer.status != 200:
            error = self._refusal(answer, ())
            error.endpoint = replica.address.url
            raise error
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            return [
                ModelCard(str(card["id"]), card.get("root"), card.get("max_model_len"))
                for card in orjson.loads(answer.content)["data"]
            ]
        raise BadReplyError(f"{replica.address.url}/models does not answer as vLLM does", endpoint=replica.address.url)

    def card(self, replica: Replica) -> ModelCard | None:
        """The entry of our model; None where the server does not list it."""
        model = self.model()
        return next((card for card in self.cards(replica) if card.id == model), None)

    def version(self, replica: Replica) -> str | None:
        """VLLM's version; None where a gateway hides the route."""
        with contextlib.suppress(VLLMEmbedError, orjson.JSONDecodeError, KeyError, TypeError):
            answer = self._http.exchange(
                "GET", replica.address, f"{replica.address.root}/version", timeout=self._patience()
            )
            return str(orjson.loads(answer.content)["version"])
        return None

    def healthy(self, replica: Replica) -> bool:
        """Whether `/health` answers 200, or a gateway hides it (404)."""
        with contextlib.suppress(VLLMEmbedError):
            answer = self._http.exchange(
                "GET", replica.address, f"{replica.address.root}/health", timeout=self._patience()
            )
            return answer.status in (200, 401, 403, 404)
        return False

    def about(self) -> About:
        """What every replica says now."""
        card = None
        endpoints = []
        for replica in self.replicas.all:
            with contextlib.suppress(VLLMEmbedError):
                card = card or self.card(replica)
            endpoints.append(
                EndpointInfo(
                    url=replica.address.url,
                    healthy=self.healthy(replica),
                    state=self.replicas.state(replica),
                    version=self.version(replica),
                    **self._counted(replica),
                )
            )
        return About(
            root=card.root if card else None,
            max_model_len=card.max_model_len if card else None,
            version=next((endpoint.version for endpoint in endpoints if endpoint.version), None),
            endpoints=tuple(endpoints),
        )

    def traffic(self) -> dict[str, dict[str, int]]:
        """Counters of each replica, by URL."""
        return {replica.address.url: self._counted(replica) for replica in self.replicas.all}

    def _counted(self, replica: Replica) -> dict[str, int]:
        return {name: getattr(replica, name) for name in ("requests", "texts", "failures", "in_flight")}

    def count(self, text: str) -> int:
        """Tokens of a text by the server's own tokenizer, special ones included.

        Raises:
            VLLMEmbedError: no replica answers `/tokenize`; a gateway may hide it.
        """
        return self._tokens.count(text)

    def limit(self) -> int:
        """Most tokens of one text, special ones included; known for LoRA too, unlike in `/v1/models`."""
        return self._tokens.limit()

    def _patience(self) -> float:
        return min(_ASK_S, self._settings.timeout)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def forked(self) -> None:
        """In a forked child: nothing of the parent's is in use here."""
        self._asking = threading.Lock()
        self._http.forked()
        self.replicas.forked()


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(float(retry_after), 0.0) if retry_after else None
    except ValueError:
        with contextlib.suppress(TypeError, ValueError):  # an HTTP date; vLLM sends neither, a gateway may
            return max(parsedate_to_datetime(retry_after or "").timestamp() - time.time(), 0.0)
    return None
