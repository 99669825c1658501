"""A column of texts becomes a column of vectors, for whatever maps batches: Ray Data, Spark, Dask, pandas, Arrow."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vllm_embed._job import refusal
from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError
from vllm_embed.fingerprint import Fingerprint
from vllm_embed.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vllm_embed._stream import OnError
    from vllm_embed.errors import VLLMEmbedError
    from vllm_embed.settings import Kind

__all__ = ["EmbedColumn", "portable"]

Batch = TypeVar("Batch")


class EmbedColumn:
    """A callable that adds vectors to batches of rows, and that travels: it pickles, with its key.

    It takes a mapping of arrays, a pandas DataFrame, or a pyarrow Table or RecordBatch, and returns the same kind, with
    one column more. Its embedder is made on first use in the process it is in; every copy there uses the same one, so
    `max_concurrency` holds for the process. It ends with the process.

    Vectors are rows of a float32 array of shape (n, d) in a mapping, one float32 array a cell in pandas, and a
    fixed-size list of float32 in Arrow.

    Args:
        settings: a `Settings`, or none.
        column: the texts.
        output_column: the vectors.
        on_error: "raise" ends with the first batch that has texts that cannot be embedded; with "yield" such a row has
            no vector (null; NaN in a mapping of arrays) and the reason in `error_column`. Other errors are raised
            always.
        error_column: with "yield", the reasons; null where there is a vector.
        kind: "query" or "document"; decides the prompt.
        **options: settings by name, see `Settings`.

    Raises:
        ConfigurationError: for options that cannot work, and for an `http_client`, which cannot travel.

    Example:
        ```python
        from vllm_embed import EmbedColumn

        embed = EmbedColumn(column="text", base_url="http://localhost:8000/v1")
        frame = embed(frame)  # pandas: frame["embedding"]
        ```
    """

    def __init__(
        self,
        settings: Settings | None = None,
        /,
        *,
        column: str = "text",
        output_column: str = "embedding",
        on_error: OnError = "raise",
        error_column: str = "error",
        kind: Kind = "document",
        **options: Any,
    ) -> None:
        if on_error not in ("raise", "yield"):
            raise ConfigurationError(f'on_error={on_error!r}: "raise" or "yield"')
        if kind not in ("query", "document"):
            raise ConfigurationError(f'kind={kind!r}: "query" or "document"')
        names = [column, output_column, *([error_column] if on_error == "yield" else [])]
        if len({*names}) < len(names):
            raise ConfigurationError(f"column, output_column and error_column: three names, not {names}")
        if settings is not None:
            options = {**settings.settings(), **options}
        self._settings = portable(Settings(**options))
        self._key = hashlib.sha256(pickle.dumps(self._settings)).digest()
        self._column = column
        self._output = output_column
        self._on_error = on_error
        self._errors = error_column
        self._kind: Kind = kind

    def __call__(self, batch: Batch) -> Batch:
        """The batch with a column of vectors.

        Raises:
            InvalidInputError: with "raise"; its `reasons` are by the row's place in the batch.
            VLLMEmbedError: any other of `vllm_embed.errors`.
        """
        shape = _shape(batch)
        there = shape.columns(batch)
        if self._column not in there:
            raise ConfigurationError(f"there is no column {self._column!r}: the batch has {there}")
        added = [self._output, *([self._errors] if self._on_error == "yield" else [])]
        if taken := [name for name in added if name in there]:
            raise ConfigurationError(
                f"the batch has a column {taken[0]!r} already: drop it, or choose another output_column or error_column"
            )
        vectors, reasons = self._embedded(shape.texts(batch, self._column))
        errors = self._errors if self._on_error == "yield" else None
        extended: Batch = shape.extended(batch, self._output, vectors, reasons, errors)
        return extended

    def _embedded(self, texts: Sequence[Any]) -> tuple[NDArray[np.float32], dict[int, str]]:
        embedder = self._embedder()
        blocks, failures = [], {}
        for block in embedder.stream(texts, self._kind, "yield"):
            blocks.append(block.vectors)
            failures.update(block.failures)
        if not blocks:
            return np.empty((0, embedder.info().dimension), np.float32), {}
        if failures and self._on_error == "raise":
            raise self._refusal(failures, len(texts))
        return np.concatenate(blocks), {at: str(error) for at, error in failures.items()}

    def _refusal(self, failures: dict[int, VLLMEmbedError], count: int) -> VLLMEmbedError:
        error = refusal(failures, count, None)
        return error.copy(
            f"column {self._column!r}, by row of the batch: {error} "
            'With on_error="yield" such rows get a reason instead of a vector.'
        )

    def _embedder(self) -> Embedder:
        # Making one opens nothing, so of two that are made at the same time one is dropped.
        return _embedders.get(self._key) or _embedders.setdefault(self._key, Embedder(self._settings))

    def __repr__(self) -> str:
        return f"EmbedColumn({self._settings!r}, column={self._column!r}, output_column={self._output!r})"


_embedders: dict[bytes, Embedder] = {}
"""This process's, by their settings: Spark unpickles the callable for every task, and an engine may take minutes."""


def portable(settings: Settings) -> Settings:
    """The settings as another machine can use them: a fingerprint's path is read here.

    Raises:
        ConfigurationError: they hold an `http_client`, or name a fingerprint that is not there.
    """
    if isinstance(settings.expect, str):
        settings = settings.model_copy(update={"expect": Fingerprint.load(settings.expect)})
    pickle.dumps(settings)
    return settings


class _Arrays:
    """A mapping of arrays, as Ray Data's "numpy" batches."""

    def columns(self, batch: Any) -> list[str]:
        return list(batch)

    def texts(self, batch: Any, column: str) -> list[Any]:
        values = batch[column]
        return values.tolist() if hasattr(values, "tolist") else list(values)

    def extended(
        self, batch: Any, name: str, vectors: NDArray[np.float32], reasons: dict[int, str], errors: str | None
    ) -> Any:
        return {**batch, name: vectors, **({} if errors is None else {errors: _cells(len(vectors), reasons)})}


class _Pandas(_Arrays):
    """A DataFrame; its index stays."""

    def extended(
        self, batch: Any, name: str, vectors: NDArray[np.float32], reasons: dict[int, str], errors: str | None
    ) -> Any:
        cells = _cells(len(vectors), {at: row for at, row in enumerate(vectors) if at not in reasons})
        added = {name: cells, **({} if errors is None else {errors: _cells(len(vectors), reasons)})}
        return batch.assign(**added)


class _Arrow(_Arrays):
    """A Table or a RecordBatch; its schema's metadata stays."""

    def columns(self, batch: Any) -> list[str]:
        return list(batch.schema.names)

    def texts(self, batch: Any, column: str) -> list[Any]:
        found: list[Any] = batch.column(column).to_pylist()
        return found

    def extended(
        self, batch: Any, name: str, vectors: NDArray[np.float32], reasons: dict[int, str], errors: str | None
    ) -> Any:
        import pyarrow as pa  # noqa: PLC0415 - the batch is its

        count, width = vectors.shape
        missing = np.zeros(count, dtype=bool)
        missing[list(reasons)] = True
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
        lists = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(missing) if reasons else None)
        schema, columns = batch.schema.append(pa.field(name, lists.type)), [*batch.columns, lists]
        if errors is not None:
            schema = schema.append(pa.field(errors, pa.string()))
            columns.append(pa.array([reasons.get(at) for at in range(count)], pa.string()))
        return type(batch).from_arrays(columns, schema=schema)


def _cells(count: int, values: Mapping[int, Any]) -> NDArray[np.object_]:
    """A column of objects; None where there is no value."""
    cells = np.full(count, None, dtype=object)
    for at, value in values.items():
        cells[at] = value
    return cells


def _shape(batch: Any) -> _Arrays:
    if isinstance(batch, Mapping):
        return _Arrays()
    if hasattr(batch, "schema") and hasattr(batch, "to_pylist"):
        return _Arrow()
    if hasattr(batch, "iloc") and hasattr(batch, "assign"):
        return _Pandas()
    raise ConfigurationError(
        "a batch is a mapping of arrays, a pandas DataFrame, or a pyarrow Table or RecordBatch, "
        f"not {type(batch).__name__}"
    )
