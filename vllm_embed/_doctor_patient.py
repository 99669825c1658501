"""What the doctor's checks look at: one server, through the core's own eyes, and what its model's files say."""

from __future__ import annotations

import functools
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import orjson

from vllm_embed import _address, _prompts, _wire
from vllm_embed._core import PROBE
from vllm_embed._http import Http
from vllm_embed._server import Server
from vllm_embed.embedder import Embedder
from vllm_embed.errors import BadReplyError, ModelNotFoundError
from vllm_embed.fingerprint import CANARIES

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed._http import HttpReply
    from vllm_embed.info import ServerInfo
    from vllm_embed.settings import Settings

__all__ = ["LEVELS", "Finding", "Level", "Patient"]

Level = Literal["wrong", "blocked", "warning", "info"]
LEVELS: Final[tuple[Level, ...]] = ("wrong", "blocked", "warning", "info")
"""In the order in which findings are told: vectors are wrong; could not look; may go wrong; good to know."""

_TEXTS = 48
_BETWEEN = re.compile(r"(?<=[.!?])\s+|^#.*$", re.MULTILINE)
"""Between sentences, headings included."""
_SHIPPED = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor found."""

    id: str
    level: Level
    text: str
    fix: str = ""
    """What to do about it, in one sentence; "" where there is nothing to do."""


class Patient:
    """One server, met: it answers, and it embeds. A context manager.

    Args:
        settings: for one server; prompts, `dimensions` and `expect` are not used for the vectors here.

    Raises:
        VLLMEmbedError: it cannot be looked at.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.model_copy(
            update={"max_retries": 0, "expect": None, "dimensions": None, "model": settings.model}
        )
        self.dimensions = settings.dimensions
        (self.address,) = _address.addresses(settings.base_url)
        self.http = Http(self.settings, (self.address,))
        self.embedder = Embedder(self.settings.model_copy(update={"query_prompt": None, "document_prompt": None}))
        try:
            self._meet()
            self.info: ServerInfo = self.embedder.info()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        with closing(Server(self.settings)) as server:
            try:
                names = [card.id for card in server.cards(server.replicas.all[0])]
            except (ModelNotFoundError, BadReplyError):
                if self.settings.model is None:
                    raise
                names = []  # a gateway hides the list
        if self.settings.model is None and len(names) != 1:
            listed = ", ".join(map(repr, names)) or "none"
            raise ModelNotFoundError(f"{self.address.url}: the server lists {len(names)} models ({listed})")
        if self.settings.model is not None and names and self.settings.model not in names:
            listed = ", ".join(map(repr, names))
            raise ModelNotFoundError(f"{self.address.url}: {self.settings.model!r} is not served, but {listed}")
        try:
            self.embedder.embed([PROBE])
        except ModelNotFoundError as exc:
            if not names:
                raise
            raise ModelNotFoundError(
                f"{self.address.url}: the server lists {self.settings.model or names[0]!r}, but answers "
                f"{exc.status} to /embeddings: it serves a chat model, or a gateway hides the route"
            ) from exc

    def post(self, url: str, **body: Any) -> HttpReply:
        """The reply to a JSON body, with the model's name in it."""
        return self.http.exchange("POST", self.address, url, orjson.dumps({"model": self.info.model, **body}))

    def embed_raw(self, **body: Any) -> tuple[NDArray[np.float32], int]:
        """The vectors and the token count of `POST /v1/embeddings` with exactly this body.

        Raises:
            VLLMEmbedError: a refusal, or a reply that is not vectors.
        """
        texts = body["input"]
        answer = self.post(f"{self.address.url}/embeddings", **body)
        if answer.status != 200:
            raise _wire.read_error(answer.status, answer.content, texts=texts, secrets=self.http.secrets)
        reply = _wire.read_reply(answer.content, len(texts))
        return reply.vectors, reply.prompt_tokens

    def ask(self, route: str, **body: Any) -> dict[str, Any] | None:
        """What a route beside /v1 says, as JSON; None where it is hidden or says something else."""
        answer = self.post(f"{self.address.root}/{route}", **body)
        try:
            said = orjson.loads(answer.content) if answer.status == 200 else None
        except orjson.JSONDecodeError:
            return None
        return said if isinstance(said, dict) else None

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """Shipped texts in several scripts that fit the model: no tokenizer makes more than one token of a byte."""
        most = min(self.info.max_model_len or 256, 1_000) - 6
        passages = [path.read_text("utf8") for path in sorted(_SHIPPED.iterdir()) if path.suffix in (".md", ".txt")]
        sentences = [" ".join(part.split()) for text in passages for part in re.split(_BETWEEN, text)]
        fitting = sorted({sentence for sentence in sentences if 10 < len(sentence.encode()) <= most})
        wanted = _TEXTS - len(CANARIES)
        return *CANARIES, *fitting[:: max(1, len(fitting) // wanted)][:wanted]

    @functools.cached_property
    def vectors(self) -> NDArray[np.float32]:
        """Of `texts`, without a prompt."""
        return self.embedder.embed(self.texts, prompt="")

    def model_path(self, file: str) -> Path | None:
        """A file of the model's, where its folder or the hub's cache is on this machine."""
        names = dict.fromkeys(filter(None, (self.info.root, self.info.model)))
        return next((path for name in names if (path := _prompts.model_file(name, file)) is not None), None)

    def model_json(self, file: str) -> Any:
        """A JSON file of the model's; None where there is none to read."""
        path = self.model_path(file)
        try:
            return None if path is None else orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None

    def close(self) -> None:
        """Release the connections."""
        self.embedder.close()
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
