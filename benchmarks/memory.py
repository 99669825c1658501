"""What memory 100,000 texts take: through `Embedder.stream`, as one array, and as LangChain's lists of floats.

    python benchmarks/memory.py [--texts 100000] [--json benchmarks/results/memory.json]

Each way runs in a process of its own, against a local server that answers at once: RSS when the embedder is warm, at
the end with the result still held, and at its peak. `stream`'s texts come from a generator and its blocks are dropped,
as a job that writes them to a store would.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import report
from fast_server import DIMENSION, MODEL, FastServer, quiet_environment

from langchain_vllm_embed import VLLMEmbeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

_MIB = 2**20
_WAYS = {
    "stream": "Embedder.stream, blocks dropped",
    "arrays": "Embedder.embed, one array",
    "lists": "VLLMEmbeddings.embed_documents, lists",
}


def _texts(count: int) -> Iterator[str]:
    return (f"text {number} {'some words of a text ' * 24}" for number in range(count))


def _rss() -> float:
    return float(psutil.Process().memory_info().rss) / _MIB


def _peak() -> float:
    """Highest RSS so far; Linux tells it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (_MIB if sys.platform == "darwin" else 1024)


def run(way: str, url: str, count: int) -> dict[str, float]:
    """Embed in this process, and tell MiB and seconds."""
    quiet_environment()
    embeddings = VLLMEmbeddings(model=MODEL, base_url=url)
    embedder = embeddings.embedder
    embedder.embed(list(_texts(2_048)))
    given = [] if way == "stream" else list(_texts(count))
    start, begin = _rss(), time.perf_counter()
    result: Any = None
    if way == "stream":
        rows = 0
        for block in embedder.stream(_texts(count)):
            rows += len(block.vectors)
    else:
        result = embedder.embed(given) if way == "arrays" else embeddings.embed_documents(given)
        rows = len(result)
    seconds = time.perf_counter() - begin
    if rows != count:
        raise SystemExit(f"{count} texts gave {rows} vectors")
    end = _rss()
    return {"start": start, "end": end, "peak": max(_peak(), end), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--way", choices=list(_WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.way, options.url, options.texts)))
        return
    machine = report.environment()
    print(f"{machine['date']}  {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}")
    found: dict[str, dict[str, float]] = {}
    with FastServer() as server:
        for way in _WAYS:
            command = [sys.executable, __file__, "--way", way, "--url", server.url, "--texts", str(options.texts)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[way] = json.loads(done.stdout)
    rows = [
        [_WAYS[way], *(f"{mib[name]:,.0f}" for name in ("start", "end", "peak")), f"{mib['peak'] - mib['start']:,.0f}"]
        for way, mib in found.items()
    ]
    title = f"{options.texts:,} texts of 500 characters, {DIMENSION}-d: MiB of the process"
    report.show(title, ["", "start", "end", "peak", "peak - start"], rows)
    print("\nThe start holds the texts themselves, but for stream, which reads them as it goes.")
    if options.json:
        report.write(options.json, {**machine, "texts": options.texts, "dimension": DIMENSION, "mib": found})


if __name__ == "__main__":
    main()
