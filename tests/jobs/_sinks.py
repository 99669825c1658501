"""Sinks of files, some rows for them, and what was opened is closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_embed.jobs._row import Row
from vllm_embed.jobs._targets import file_target

__all__ = ["WIDTH", "close_what_was_opened", "row", "sink_at", "vectors", "write"]

WIDTH = 3
_opened: list = []


@pytest.fixture(autouse=True)
def close_what_was_opened():
    yield
    while _opened:
        _opened.pop().close()


def sink_at(path: Path, state: dict):
    sink = file_target(path).make()
    _opened.append(sink)
    sink.open(state)
    return sink


def row(number: int, **columns) -> Row:
    return Row(f"id{number}", f"text {number}", columns, "in.jsonl", number)


def vectors(numbers, width: int = WIDTH) -> np.ndarray:
    return np.array([[number + i / 8 for i in range(width)] for number in numbers], np.float32).reshape(-1, width)


def write(sink, numbers, **columns) -> dict:
    return sink.write([row(number, **columns) for number in numbers], vectors(numbers))
