"""What an embedder and its siblings share, and how a call becomes a job."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from vllm_embed import _text
from vllm_embed._dispatch import Dispatcher
from vllm_embed._engine import Engine
from vllm_embed._job import Job, refusal
from vllm_embed._server import Server
from vllm_embed.errors import InvalidInputError
from vllm_embed.info import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vllm_embed._backend import Backend
    from vllm_embed.settings import Kind, Settings

__all__ = ["PROBE", "Core", "bar_of", "listed"]

PROBE = "a"
"""Any text: its vector tells the dimension."""


class Core:
    """The backend, the queue and the bound, shared by siblings; closed by the last of them."""

    def __init__(self, settings: Settings) -> None:
        self.backend: Backend = Engine(settings) if settings.in_process else Server(settings)
        self.dispatcher = Dispatcher(self.backend, settings)
        self.dimension = settings.dimensions or 0
        self._fields = _fields(settings)
        self._users = 0
        self._lock = threading.Lock()

    def join(self) -> Self:
        """Count a user in."""
        with self._lock:
            self._users += 1
        return self

    def leave(self) -> None:
        """Count a user out; the last one closes."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.dispatcher.close()

    def job(
        self,
        texts: Sequence[Any],
        settings: Settings,
        kind: Kind,
        prompt: str,
        *,
        on_rows: Callable[[int], object] | None,
        rows: bool = False,
    ) -> Job:
        """The job of at least one text.

        When nothing is left to send but a row is wanted, for zeros or with `rows` for NaNs, one more text goes along
        to tell the width; it is the row after the last.

        Args:
            texts: the caller's, unchecked.
            settings: text rules.
            kind: decides the lane.
            prompt: put before each text.
            on_rows: told of rows that are done.
            rows: whether rows are wanted even when every text is refused.

        Raises:
            InvalidInputError: every text is refused before anything is sent.
        """
        prepared = _text.prepare(texts, prompt=prompt, unicode=settings.unicode, blank_text=settings.blank_text)
        sent, skipped = prepared.texts, {*prepared.refused, *prepared.zero}
        pending: Sequence[int] = [i for i in range(len(sent)) if i not in skipped] if skipped else range(len(sent))
        if not pending:
            if not prepared.zero and not rows:
                raise refusal(dict(prepared.refused), len(texts), None)
            pending = [len(sent)]
            sent.append(PROBE)
        return Job(
            sent,
            pending,
            self._fields,
            query=kind == "query",
            refused=dict(prepared.refused),
            zero=prepared.zero,
            cleaned=prepared.cleaned,
            prompt=prompt,
            on_rows=on_rows,
        )

    def stats(self) -> Stats:
        """Counters of all that share it."""
        counters = self.dispatcher.counters
        return Stats(
            texts=counters.texts,
            requests=counters.requests,
            retries=counters.retries,
            prompt_tokens=counters.prompt_tokens,
            in_flight=counters.in_flight,
            most_in_flight=counters.most_in_flight,
            endpoints=self.backend.traffic(),
        )

    def seen(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """The rows that the caller asked for; their width is remembered."""
        self.dimension = vectors.shape[1]
        return vectors[:count]


@contextlib.contextmanager
def bar_of(settings: Settings, total: int | None, kind: Kind) -> Iterator[Callable[[int], object] | None]:
    """A progress bar where `show_progress` asks for one: what to tell of rows that are done."""
    if not settings.show_progress or kind == "query":
        yield None
        return
    with tqdm(total=total, unit="doc", desc="embedding") as bar:
        yield bar.update


def listed(texts: Iterable[str]) -> Sequence[Any]:
    """The texts as a sequence; a single str is a slip, not a list of characters."""
    if isinstance(texts, (str, bytes)):
        kind = type(texts).__name__
        raise InvalidInputError(f"a list of texts is needed, this is a single {kind}: put it into a list")
    return texts if isinstance(texts, list) else list(texts)


def _fields(settings: Settings) -> dict[str, Any]:
    """Request fields beside model and input, as vLLM names them."""
    fields = dict(settings.extra_body or {})
    if settings.dimensions is not None:
        fields["dimensions"] = settings.dimensions
    if settings.normalize is False:
        fields["use_activation"] = False
    if settings.long_text == "truncate":
        fields["truncate_prompt_tokens"] = -1  # and no truncation_side: setting one cuts [SEP] or EOS
    return fields
