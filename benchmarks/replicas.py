"""Two replicas beside one: what balancing reaches of what the servers can do.

Each replica is a server of its own process that answers at a set number of documents a second, so the sum is known.

    python benchmarks/replicas.py [--documents 60000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_embed import Embedder
from vllm_embed.testing import FakeVLLMServer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def _serve(documents_per_s: float, pipe: Connection) -> None:
    with FakeVLLMServer(dimension=64) as server:
        server.documents_per_s = documents_per_s
        pipe.send(server.base_url)
        pipe.recv()


def _measure(speeds: list[float], documents: int) -> float:
    spawn = multiprocessing.get_context("spawn")
    processes, pipes, urls = [], [], []
    for speed in speeds:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(speed, theirs))
        process.start()
        processes.append(process)
        pipes.append(ours)
        urls.append(ours.recv())
    texts = [f"document {i % 500}" for i in range(documents)]  # few different ones: the servers know their vectors
    with Embedder(base_url=urls, model="fake-model") as embedder:
        embedder.embed(texts[:2_000])
        start = time.perf_counter()
        embedder.embed(texts)
        seconds = time.perf_counter() - start
    for process, pipe in zip(processes, pipes, strict=True):
        pipe.send("end")
        process.join()
    return documents / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    one = _measure([5_000], options.documents // 2)
    two = _measure([5_000, 5_000], options.documents)
    uneven = _measure([5_000, 500], options.documents // 2)
    rows = {
        "one replica of 5,000 documents/s": (one, one / 5_000, "of its speed"),
        "two of 5,000": (two, two / one, "times one (aim 1.9)"),
        "one of 5,000, one of 500": (uneven, uneven / 5_500, "of their sum (aim 0.9)"),
    }
    print(f"{'servers':<36}{'documents/s':>12}{'ratio':>8}")
    for name, (speed, ratio, of) in rows.items():
        print(f"{name:<36}{speed:>12,.0f}{ratio:>8.2f}  {of}")
    if options.json:
        options.json.write_text(
            json.dumps({name: {"documents_per_s": row[0], "ratio": row[1]} for name, row in rows.items()})
        )


if __name__ == "__main__":
    main()
