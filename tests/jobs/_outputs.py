"""What an output holds, whatever its format, and a corpus to fill it with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pyarrow import dataset

__all__ = ["ENDINGS", "rows_of", "write_lines"]

ENDINGS = [".parquet", ".jsonl", ".npy"]


def rows_of(path: Path) -> list[dict]:
    """Every row in order, with `embedding` as float32, read as its users read it."""
    if path.suffix == ".parquet":
        rows = dataset.dataset(path, format="parquet").to_table().to_pylist() if any(path.glob("part-*")) else []
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text("utf8").splitlines()]
    else:
        array = np.load(path)
        rows = [json.loads(line) for line in path.with_suffix(".ids.jsonl").read_text("utf8").splitlines()]
        assert array.dtype == np.float32
        assert len(array) == len(rows)
        rows = [row | {"embedding": vector} for row, vector in zip(rows, array, strict=True)]
    return [row | {"embedding": np.asarray(row["embedding"], np.float32)} for row in rows]


def write_lines(path: Path, rows: list[dict]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path
