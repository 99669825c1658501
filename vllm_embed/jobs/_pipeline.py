"""Reading, embedding and writing at the same time, with bounded queues between them.

reader thread --batches of rows--> the caller's thread: plan, embed --rows with vectors--> writer thread: sink, ledger
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from vllm_embed._stream import PAUSE
from vllm_embed.jobs._row import Reject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_embed.info import Block
    from vllm_embed.jobs._ledger import Ledger
    from vllm_embed.jobs._plan import Planned, Planner
    from vllm_embed.jobs._row import Row
    from vllm_embed.jobs._sink import Sink

__all__ = ["Pipeline"]

_READ_ROWS: Final = 512
"""Rows that the reader hands over at once."""
_READ_AHEAD: Final = 4
"""Of those, how many wait."""
_IDLE_S: Final = 1.0
"""Without a row for so long, what was read is finished and written."""
_COMMIT_S: Final = 5.0
_COMMIT_LEAST, _COMMIT_MOST, _COMMIT_SHARE = 1024, 8192, 64
_COMMIT_BYTES: Final = 32 << 20
"""Rows are written after so long, or when there are so many: a 64th of what the output has, at least 1,024, at most
8,192 or so many bytes of vectors. So a kill costs little of what was done, and a large output has large files."""
_WAITING: Final = 4 * _COMMIT_MOST
"""Most rows that wait for vectors; rows with the same text cost no request and could be any number."""
_END: Final = None


class _Batch(NamedTuple):
    rows: list[Row]
    hashes: list[bytes]
    vectors: bytearray
    """With more room than the rows fill, perhaps."""
    size: int
    """Bytes of a vector."""


class Pipeline:
    """One run of a job.

    Args:
        items: what is read; iterated over in a thread of its own.
        planner: decides about each.
        ledger: what is done.
        sink: open.
        stream: as `Embedder.stream` with `on_error="yield"`.
        on_reject: told of each row that has no vector.
        on_rows: called now and then, from the caller's thread.
    """

    def __init__(
        self,
        items: Iterable[Row | Reject],
        planner: Planner,
        ledger: Ledger,
        sink: Sink,
        stream: Callable[[Iterator[Any]], Iterator[Block]],
        *,
        on_reject: Callable[[Reject], object],
        on_rows: Callable[[], object] = lambda: None,
    ) -> None:
        self._items = items
        self._planner = planner
        self._ledger = ledger
        self._sink = sink
        self._stream = stream
        self._on_reject = on_reject
        self._on_rows = on_rows
        self._read: queue.Queue[list[Row | Reject] | BaseException | None] = queue.Queue(_READ_AHEAD)
        self._write: queue.Queue[_Batch | None] = queue.Queue(1)
        self._acknowledged: collections.deque[list[Row]] = collections.deque()
        self._waiting: collections.deque[Planned] = collections.deque()
        self._ready: list[Planned] = []
        self._vectors: bytearray | None = None
        self._place = memoryview(b"")
        self._spare: collections.deque[bytearray] = collections.deque()
        """Room for vectors that was written, to be filled again: new ones cost more than filling them."""
        self._since = time.monotonic()
        self._failed: BaseException | None = None
        self._unread: BaseException | None = None
        """Why reading ended early."""
        self._over = threading.Event()
        self.embedded = self.replaced = self.written = 0

    def run(self) -> None:
        """Until the input ends. However it ends, what has its vectors is written first.

        Raises:
            VLLMEmbedError: from reading, embedding or writing.
        """
        reader = threading.Thread(target=self._reading, name="vllm-embed-read", daemon=True)
        writer = threading.Thread(target=self._writing, name="vllm-embed-write", daemon=True)
        reader.start()
        writer.start()
        try:
            for block in self._stream(self._texts()):
                self._take(block)
                self._on_rows()
            self._advance()
        finally:
            self._over.set()
            self._hand_over()
            self._put(_END)
            writer.join()
            self._acknowledge()
        if (failed := self._failed or self._unread) is not None:
            raise failed

    def _reading(self) -> None:
        started, batch = time.monotonic(), list[Any]()
        try:
            for item in self._items:
                batch.append(item)
                if len(batch) >= _READ_ROWS or time.monotonic() - started > _IDLE_S:
                    self._offer(batch)
                    started, batch = time.monotonic(), []
            self._offer(batch)
            self._offer(_END)
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            self._offer(batch)
            self._offer(exc)

    def _offer(self, batch: list[Row | Reject] | BaseException | None) -> None:
        while not self._over.is_set():
            try:
                return self._read.put(batch, timeout=_IDLE_S)
            except queue.Full:
                continue
        return None

    def _batches(self) -> Iterator[list[Row | Reject]]:
        """What was read; an empty batch where nothing was for a while."""
        while True:
            try:
                batch = self._read.get(timeout=_IDLE_S)
            except queue.Empty:
                batch = []
            if batch is _END:
                return
            if isinstance(batch, BaseException):
                self._unread = batch  # once what was read before is done
                return
            self._tick()
            yield batch

    def _texts(self) -> Iterator[Any]:
        """Texts to embed; in between, rows that need none are written, or rejected."""
        for batch in self._batches():
            if not batch and self._waiting:
                yield PAUSE
            found = self._ledger.find([item.id for item in batch if not isinstance(item, Reject)])
            for planned in self._planner.plan(batch, found):
                if isinstance(planned, Reject):
                    self._on_reject(planned)
                    continue
                self._waiting.append(planned)
                if planned.first:
                    yield planned.text
                elif len(self._waiting) > _WAITING:
                    self._advance()
                    if len(self._waiting) > _WAITING:
                        yield PAUSE

    def _take(self, block: Block) -> None:
        """Give the block's vectors to the rows that wait for them first."""
        # As bytes: numpy lets go of the interpreter's lock for each copy of over 500 floats, and waits for it again.
        vectors = memoryview(np.ascontiguousarray(block.vectors).data).cast("B")
        size = len(vectors) // len(block.vectors)
        for i in range(len(block.vectors)):
            while not self._waiting[0].first:
                self._finish(self._waiting.popleft())
            planned = self._waiting.popleft()
            if (error := block.failures.get(block.start + i)) is not None:
                planned.shared.error = str(error)
            else:
                self._planner.known.keep(planned.shared, vectors[i * size : (i + 1) * size])
                self.embedded += 1
            self._finish(planned)
        self._advance()

    def _advance(self) -> None:
        """Finish rows whose text was embedded for a row before them, and write now and then."""
        waiting = self._waiting
        while waiting and not waiting[0].first:
            self._finish(waiting.popleft())
        if time.monotonic() - self._since > _COMMIT_S:
            self._hand_over()

    def _finish(self, planned: Planned) -> None:
        shared = planned.shared
        shared.waiting -= 1
        if shared.vector is None:
            row = planned.row
            self._on_reject(Reject(row.source, row.line, row.id, shared.error or "not embedded"))
            self._planner.pending.pop(row.id, None)
            return
        size, count = len(shared.vector), len(self._ready)
        if self._vectors is None:
            self._vectors = self._spare.pop() if self._spare else bytearray(size * _most(size))
            self._place = memoryview(self._vectors)
        self._place[count * size : (count + 1) * size] = shared.vector
        self._ready.append(planned)
        self.replaced += planned.replaces
        enough = max(_COMMIT_LEAST, self._ledger.total // _COMMIT_SHARE)
        if count + 1 >= enough or (count + 2) * size > len(self._vectors):
            self._hand_over()

    def _tick(self) -> None:
        if self._failed is not None:
            raise self._failed
        self._acknowledge()
        self._advance()
        self._on_rows()

    def _hand_over(self) -> None:
        """Rows with vectors to the writer."""
        self._since = time.monotonic()
        if not self._ready or self._vectors is None:
            return
        ready, vectors = self._ready, self._vectors
        self._ready, self._vectors = [], None
        size = len(ready[0].shared.vector or b"")
        self._put(_Batch([planned.row for planned in ready], [planned.hash for planned in ready], vectors, size))

    def _put(self, batch: _Batch | None) -> None:
        while self._failed is None:
            try:
                return self._write.put(batch, timeout=_IDLE_S)
            except queue.Full:
                continue
        return None

    def _writing(self) -> None:
        try:
            while (batch := self._write.get()) is not _END:
                count = len(batch.rows)
                vectors = np.frombuffer(batch.vectors, np.float32, count * batch.size // 4).reshape(count, -1)
                if self._sink.knows_ids:
                    self._ledger.intend(row.id for row in batch.rows)
                state = self._sink.write(batch.rows, vectors)
                ids = (row.id for row in batch.rows)
                self._ledger.commit(list(zip(ids, batch.hashes, strict=True)), state)
                self._acknowledged.append(batch.rows)
                self._spare.append(batch.vectors)
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            self._failed = exc

    def _acknowledge(self) -> None:
        while self._acknowledged:
            rows = self._acknowledged.popleft()
            self.written += len(rows)
            self._planner.written(row.id for row in rows)


def _most(size: int) -> int:
    """Rows of one commit, for vectors of so many bytes."""
    return max(1, min(_COMMIT_MOST, _COMMIT_BYTES // size))
