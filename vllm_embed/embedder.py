"""`Embedder`: texts in, vectors out. The one object behind both adapters."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from vllm_embed import _stream, _text
from vllm_embed._core import PROBE, Core, bar_of, listed
from vllm_embed._identity import Identity
from vllm_embed._job import refusal
from vllm_embed.errors import ClosedError, ConfigurationError
from vllm_embed.info import Block, ServerInfo, Stats
from vllm_embed.settings import Kind, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray

    from vllm_embed._job import Job
    from vllm_embed._prompts import Prompts
    from vllm_embed._stream import OnError
    from vllm_embed.fingerprint import Fingerprint

__all__ = ["Embedder"]

_SAME: Final[Any] = object()
"""An argument that was left out, where None means something."""


class Embedder:
    """Embeds texts with a running `vllm serve`, or with vLLM in this process.

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
        self._core = Core(self._settings).join()
        self._identity = Identity(self._core, self._settings)
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
        self._check_call(kind)
        texts = listed(texts)
        with bar_of(self._settings, len(texts), kind) as bar:
            if not texts:
                return self._nothing()
            self._settle()
            job = self._core.job(texts, self._settings, kind, self._identity.prompt(kind, prompt), on_rows=bar)
            self._core.dispatcher.run(job)
            return self._core.seen(job.future.result(), len(texts))

    async def aembed(
        self, texts: Iterable[str], kind: Kind = "document", prompt: str | None = None
    ) -> NDArray[np.float32]:
        """`embed`, awaited: the event loop runs on meanwhile. Once cancelled, no new request goes out for it."""
        self._check_call(kind)
        texts = listed(texts)
        with bar_of(self._settings, len(texts), kind) as bar:
            if not texts:
                return self._nothing()
            if not self._identity.settled:
                await asyncio.to_thread(self._identity.settle)
            job = self._core.job(texts, self._settings, kind, self._identity.prompt(kind, prompt), on_rows=bar)
            self._core.dispatcher.start(job)
            try:
                vectors = await asyncio.wrap_future(job.future)
            except asyncio.CancelledError:
                self._core.dispatcher.cancel(job)
                raise
            return self._core.seen(vectors, len(texts))

    def stream(
        self,
        texts: Iterable[str],
        kind: Kind = "document",
        on_error: OnError = "raise",
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
            listed(texts)
        self._check_call(kind)
        return self._blocks(iter(texts), kind, on_error, prompt)

    def _blocks(self, texts: Iterator[str], kind: Kind, on_error: OnError, prompt: str | None) -> Iterator[Block]:
        self._settle()
        prompt = self._identity.prompt(kind, prompt)
        with bar_of(self._settings, None, kind) as bar:

            def make(block: list[str]) -> Job:
                return self._core.job(block, self._settings, kind, prompt, on_rows=bar, rows=True)

            yield from _stream.blocks(self._core, texts, make, on_error)

    def info(self) -> ServerInfo:
        """What is served: asked of every replica now; the dimension by one embedding when none was made yet.

        Raises:
            VLLMEmbedError: when the model cannot be told, or no replica embeds.
        """
        self._check_open()
        model = self._core.backend.model()
        if not self._core.dimension:
            self.embed([PROBE], prompt="")
        about = self._core.backend.about()
        return ServerInfo(
            model=model,
            root=about.root,
            dimension=self._core.dimension,
            max_model_len=about.max_model_len,
            version=about.version,
            endpoints=about.endpoints,
        )

    def model(self) -> str:
        """Name of the model: the setting, or the one that the server lists, asked for once.

        Raises:
            ConfigurationError: the server lists several, or none.
            VLLMEmbedError: the server cannot be asked.
        """
        return self._core.backend.model()

    def prompts(self) -> Prompts:
        """What goes before texts, "auto" looked up: `.query` and `.document`, "" for nothing. Raises as `embed`."""
        self._check_open()
        return self._identity.prompts()

    def count(self, text: str, kind: Kind = "document", prompt: str | None = None) -> int:
        """Tokens of a text as it would be sent, by the model's own tokenizer, with the prompt and special tokens.

        Raises:
            VLLMEmbedError: no replica answers `/tokenize`; a gateway may hide it.
        """
        return self._core.backend.count(self.preview(text, kind, prompt))

    def limit(self) -> int:
        """Most tokens of one text, prompt and special tokens included; asked for once.

        Raises:
            VLLMEmbedError: as in `count`.
        """
        self._check_open()
        return self._core.backend.limit()

    def preview(self, text: str, kind: Kind = "document", prompt: str | None = None) -> str:
        """The text as it would be sent: cleaned, with its prompt.

        Raises:
            InvalidInputError: it would be refused before it is sent.
        """
        self._check_call(kind)
        options = self._settings
        put = self._identity.prompt(kind, prompt)
        prepared = _text.prepare([text], prompt=put, unicode=options.unicode, blank_text=options.blank_text)
        if prepared.refused:
            raise refusal(dict(prepared.refused), 1, None)
        return prepared.texts[0]

    def fingerprint(self) -> Fingerprint:
        """What makes these vectors these vectors, measured now: keep it beside the index that they go into.

        `expect=` checks it on first use: `embedder.fingerprint().save("index.fingerprint.json")` and later
        `Embedder(expect="index.fingerprint.json")`.
        """
        self._check_open()
        return self._identity.fingerprint()

    @property
    def namespace(self) -> str:
        """A short stable name of the model and the settings that decide a vector, for caches and files.

        Another prompt, dimension or model is another name; another key, address or timeout is not. Asks the server for
        the model's name when `model` is None.
        """
        self._check_open()
        return self._identity.namespace()

    def stats(self) -> Stats:
        """Counters since the start, siblings included."""
        return self._core.stats()

    def with_prompts(self, *, query: str | None = _SAME, document: str | None = _SAME) -> Embedder:
        """A sibling with other prompts that shares connections, queue and bound. A prompt left out stays as it is.

        What `expect` describes had this embedder's prompts, so the sibling expects nothing.
        The connections close when the last of the siblings does.
        """
        self._check_open()
        changes = {"query_prompt": query, "document_prompt": document}
        sibling = copy.copy(self)
        sibling._settings = self._settings.model_copy(  # noqa: SLF001 - our own class
            update={"expect": None, **{name: prompt for name, prompt in changes.items() if prompt is not _SAME}}
        )
        sibling._identity = Identity(self._core, sibling._settings)  # noqa: SLF001
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

    def _settle(self) -> None:
        if not self._identity.settled:
            self._identity.settle()

    def _check_call(self, kind: Kind) -> None:
        self._check_open()
        if kind not in ("query", "document"):
            raise ConfigurationError(f'kind={kind!r}: "query" or "document"')

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError

    def _nothing(self) -> NDArray[np.float32]:
        return np.empty((0, self._core.dimension), dtype=np.float32)
