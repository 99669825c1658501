"""`Embedder`: texts in, vectors out. The one object behind both adapters."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import threading
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
from tqdm import tqdm

from vllm_embed import _text
from vllm_embed._dispatch import Dispatcher
from vllm_embed._job import Job, refusal
from vllm_embed._server import Server
from vllm_embed.errors import ClosedError, ConfigurationError, InvalidInputError, VLLMEmbedError
from vllm_embed.info import Block, EndpointInfo, ServerInfo, Stats
from vllm_embed.settings import Kind, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

__all__ = ["Embedder"]

_SAME: Final[Any] = object()
"""An argument that was left out, where None means something."""
_PROBE = "a"
"""Any text: its vector tells the dimension."""
_AHEAD = 2
"""Blocks that `stream` keeps on the way for each request in flight."""


class _Core:
    """What an embedder shares with its siblings: the server, the queue, the bound."""

    def __init__(self, settings: Settings) -> None:
        self.server = Server(settings)
        self.dispatcher = Dispatcher(self.server, settings)
        self.fields = _fields(settings)
        self.dimension = 0
        self._users = 0
        self._lock = threading.Lock()

    def join(self) -> Self:
        with self._lock:
            self._users += 1
        return self

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.dispatcher.close()


def _fields(settings: Settings) -> dict[str, Any]:
    """Request fields beside model and input, as vLLM names them."""
    fields = dict(settings.extra_body or {})
    if settings.dimensions is not None:
        fields["dimensions"] = settings.dimensions
    if settings.long_text == "truncate":
        fields["truncate_prompt_tokens"] = -1  # and no truncation_side: setting one cuts [SEP] or EOS
    return fields


class Embedder:
    """Embeds texts with a running `vllm serve`.

    One object serves scripts, running event loops, many `asyncio.run` in a row, threads, and forked children; all its
    calls share one queue and one bound. Making one opens no socket and starts no thread. It can be pickled, with its
    key, unless it was given an `http_client`.

    Args:
        settings: a `Settings`, or none.
        **options: settings by name, see `Settings`.

    Raises:
        ConfigurationError: for options that cannot work.

    Example:
        ```python
        from vllm_embed import Embedder

        with Embedder(base_url="http://localhost:8000/v1") as embedder:
            vectors = embedder.embed(["A sentence.", "Another."])  # float32, shape (2, d)
        ```
    """

    def __init__(self, settings: Settings | None = None, /, **options: Any) -> None:
        if settings is not None:
            options = {**settings.settings(), **options}
        self._settings = Settings(**options)
        self._core = _Core(self._settings).join()
        self._open = True

    @property
    def settings(self) -> Settings:
        """The settings in force; frozen."""
        return self._settings

    def embed(self, texts: Iterable[str], kind: Kind = "document", prompt: str | None = None) -> NDArray[np.float32]:
        """The vectors of texts, in order.

        Args:
            texts: any number of str. Not a single str.
            kind: "query" or "document"; decides the prompt, and queries go ahead of documents.
            prompt: replaces the kind's prompt for this call; "" sends none.

        Returns:
            float32, shape (n, d). For no texts (0, d), with d = 0 while no vector was seen.

        Raises:
            InvalidInputError: naming every text that cannot be embedded; its `vectors` holds the others.
            VLLMEmbedError: any other of `vllm_embed.errors`.
        """
        texts = _listed(texts)
        with self._bar(len(texts), kind) as bar:
            job = self._job(texts, kind, prompt, on_rows=bar)
            if job is None:
                return self._nothing()
            self._core.dispatcher.run(job)
            return self._rows(len(texts), job.future.result())

    async def aembed(
        self, texts: Iterable[str], kind: Kind = "document", prompt: str | None = None
    ) -> NDArray[np.float32]:
        """`embed`, awaited: the event loop runs on meanwhile. Once cancelled, no new request goes out for it."""
        texts = _listed(texts)
        with self._bar(len(texts), kind) as bar:
            job = self._job(texts, kind, prompt, on_rows=bar)
            if job is None:
                return self._nothing()
            self._core.dispatcher.start(job)
            try:
                vectors = await asyncio.wrap_future(job.future)
            except asyncio.CancelledError:
                self._core.dispatcher.cancel(job)
                raise
            return self._rows(len(texts), vectors)

    def stream(
        self,
        texts: Iterable[str],
        kind: Kind = "document",
        on_error: Literal["raise", "yield"] = "raise",
        prompt: str | None = None,
    ) -> Iterator[Block]:
        """The vectors of any number of texts, block by block in order, in bounded memory.

        Two blocks of at most `batch_size` texts and `max_batch_chars` characters are on the way for each request that
        may be in flight; `texts` is read no further ahead, in the thread that asks for the next block.

        Args:
            texts: may be endless.
            kind: as in `embed`.
            on_error: "raise" ends the stream at the first block with a refused text; with "yield" such a text is a NaN
                row and an entry in the block's `failures`, and the stream goes on. Other errors are raised always.
            prompt: as in `embed`.

        Raises:
            InvalidInputError: with `indexes` into the stream.
            VLLMEmbedError: any other of `vllm_embed.errors`.
        """
        if on_error not in ("raise", "yield"):
            raise ConfigurationError(f'on_error={on_error!r}: "raise" or "yield"')
        if isinstance(texts, (str, bytes)):
            _listed(texts)
        return self._blocks(iter(texts), kind, on_error, prompt)

    def _blocks(
        self, texts: Iterator[Any], kind: Kind, on_error: Literal["raise", "yield"], prompt: str | None
    ) -> Iterator[Block]:
        dispatcher, limits = self._core.dispatcher, self._core.dispatcher.limits
        ahead: collections.deque[tuple[int, int, Job]] = collections.deque()
        most = _AHEAD * self._core.server.slots
        read, more = 0, True
        with self._bar(None, kind) as bar:
            try:
                while True:
                    while more and len(ahead) < most:
                        block = _block(texts, limits.texts, limits.chars)
                        if not block:
                            more = False
                            break
                        job = self._job(block, kind, prompt, on_rows=bar, rows=True)
                        assert job is not None  # noqa: S101 - rows=True
                        dispatcher.start(job)
                        ahead.append((read, len(block), job))
                        read += len(block)
                    if not ahead:
                        return
                    yield self._block(*ahead[0], on_error)
                    ahead.popleft()
            finally:
                for _, _, job in ahead:
                    dispatcher.cancel(job)

    def _block(self, start: int, count: int, job: Job, on_error: Literal["raise", "yield"]) -> Block:
        failures: dict[int, VLLMEmbedError] = {}
        try:
            vectors = job.future.result()
        except VLLMEmbedError as exc:
            if not exc.indexes or exc.vectors is None:
                raise
            vectors = exc.vectors
            failures = {
                start + index: error.copy(indexes=(start + index,), reasons={start + index: str(error)})
                for index, error in sorted(job.refused.items())
            }
            if on_error == "raise":
                raise refusal(failures, start + count, None) from exc
        return Block(start, self._rows(count, vectors), failures)

    def info(self) -> ServerInfo:
        """What is served: asked of every replica now; the dimension by one embedding when none was made yet.

        Raises:
            VLLMEmbedError: when the model cannot be told, or no replica embeds.
        """
        self._check_open()
        server = self._core.server
        model = server.model()
        if not self._core.dimension:
            self.embed([_PROBE], prompt="")
        card = None
        endpoints = []
        for replica in server.replicas.all:
            with contextlib.suppress(VLLMEmbedError):
                card = card or server.card(replica)
            endpoints.append(
                EndpointInfo(
                    url=replica.address.url,
                    healthy=server.healthy(replica),
                    state=server.replicas.state(replica),
                    version=server.version(replica),
                    requests=replica.requests,
                    texts=replica.texts,
                    failures=replica.failures,
                    in_flight=replica.in_flight,
                )
            )
        return ServerInfo(
            model=model,
            root=card.root if card else None,
            dimension=self._core.dimension,
            max_model_len=card.max_model_len if card else None,
            version=next((endpoint.version for endpoint in endpoints if endpoint.version), None),
            endpoints=tuple(endpoints),
        )

    def stats(self) -> Stats:
        """Counters since the start, siblings included."""
        counters = self._core.dispatcher.counters
        return Stats(
            texts=counters.texts,
            requests=counters.requests,
            retries=counters.retries,
            prompt_tokens=counters.prompt_tokens,
            in_flight=counters.in_flight,
            most_in_flight=counters.most_in_flight,
            endpoints={
                replica.address.url: {
                    "requests": replica.requests,
                    "texts": replica.texts,
                    "failures": replica.failures,
                    "in_flight": replica.in_flight,
                }
                for replica in self._core.server.replicas.all
            },
        )

    def with_prompts(self, *, query: str | None = _SAME, document: str | None = _SAME) -> Embedder:
        """A sibling with other prompts that shares connections, queue and bound. A prompt left out stays as it is.

        The connections close when the last of the siblings does.
        """
        self._check_open()
        changes = {"query_prompt": query, "document_prompt": document}
        sibling = copy.copy(self)
        sibling._settings = self._settings.model_copy(  # noqa: SLF001 - our own class
            update={name: prompt for name, prompt in changes.items() if prompt is not _SAME}
        )
        self._core.join()
        return sibling

    def close(self) -> None:
        """Release threads and connections, unless a sibling still uses them. Idempotent."""
        if self._open:
            self._open = False
            self._core.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Embedder({self._settings!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Embedder, (self._settings,)

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Embedder:
        return Embedder(self._settings)

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError

    def _job(
        self,
        texts: Sequence[Any],
        kind: Kind,
        prompt: str | None,
        *,
        on_rows: Callable[[int], object] | None,
        rows: bool = False,
    ) -> Job | None:
        """The job of some texts; None for no texts.

        When nothing is left to send but a row is wanted, for zeros or with `rows` for NaNs, one more text goes along
        to tell the width; it is the row after the last.
        """
        self._check_open()
        if kind not in ("query", "document"):
            raise ConfigurationError(f'kind={kind!r}: "query" or "document"')
        if not texts:
            return None
        options = self._settings
        if prompt is None:
            prompt = options.query_prompt if kind == "query" else options.document_prompt
        sent, refused, zero = _text.prepare(
            texts, prompt=prompt, unicode=options.unicode, blank_text=options.blank_text
        )
        skipped = {*refused, *zero}
        pending: Sequence[int] = [i for i in range(len(sent)) if i not in skipped] if skipped else range(len(sent))
        if not pending:
            if not zero and not rows:
                raise refusal(dict(refused), len(texts), None)
            pending = [len(sent)]
            sent.append(_PROBE)
        return Job(
            sent,
            pending,
            self._core.fields,
            query=kind == "query",
            refused=dict(refused),
            zero=zero,
            on_rows=on_rows,
        )

    def _nothing(self) -> NDArray[np.float32]:
        return np.empty((0, self._settings.dimensions or self._core.dimension), dtype=np.float32)

    def _rows(self, count: int, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        self._core.dimension = vectors.shape[1]
        return vectors[:count]

    @contextlib.contextmanager
    def _bar(self, total: int | None, kind: Kind) -> Iterator[Callable[[int], object] | None]:
        if not self._settings.show_progress or kind == "query":
            yield None
            return
        with tqdm(total=total, unit="doc", desc="embedding") as bar:
            yield bar.update


def _listed(texts: Iterable[str]) -> Sequence[Any]:
    if isinstance(texts, (str, bytes)):
        kind = type(texts).__name__
        raise InvalidInputError(f"a list of texts is needed, this is a single {kind}: put it into a list")
    return texts if isinstance(texts, list) else list(texts)


def _block(texts: Iterator[Any], most: int, chars: int) -> list[Any]:
    """The next texts that fill one request; the last may go over the characters."""
    block: list[Any] = []
    used = 0
    for text in texts:
        block.append(text)
        used += len(text) if isinstance(text, str) else 0
        if len(block) >= most or used >= chars:
            break
    return block
