"""The embedder in process beside `LLM.embed` and `LLM.encode` called directly, on the same engine, in turns.

    python benchmarks/in_process.py --model FOLDER [--texts FILE.json] [--dtype half] [--gpu-memory-utilization 0.4]

All rows are the same engine in the same process, so nothing but the way to it differs. Texts over the model's limit are
cut, in all of them alike. The ratio is of best rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_embed import Embedder

if TYPE_CHECKING:
    from collections.abc import Callable

CUT = {"truncate_prompt_tokens": -1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--texts", type=Path, help="JSON list of str; default: made of this project's own words")
    parser.add_argument("--count", type=int, help="use this many of the texts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = json.loads(options.texts.read_text("utf8")) if options.texts else made_up(600)
    texts = texts[: options.count]
    arguments: dict[str, Any] = {"dtype": options.dtype}
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    with Embedder(model=options.model, in_process=True, engine_args=arguments, long_text="truncate") as embedder:
        start = time.monotonic()
        info = embedder.info()
        print(f"vLLM {info.version}, {info.root}, {info.dimension}-d, {len(texts)} texts", end="")
        print(f", loaded in {time.monotonic() - start:.0f} s{gpu_memory()}")
        measure(embedder, texts, options.rounds)


def measure(embedder: Embedder, texts: list[str], rounds: int) -> None:
    llm = embedder._core.backend._engine.llm()._llm  # noqa: SLF001 - the engine itself; its own thread is idle meanwhile
    ways: dict[str, Callable[[], Any]] = {
        "LLM.embed": lambda: llm.embed(texts, use_tqdm=False, tokenization_kwargs=dict(CUT)),
        "LLM.encode": lambda: llm.encode(texts, pooling_task="embed", use_tqdm=False, tokenization_kwargs=dict(CUT)),
        "Embedder.embed": lambda: embedder.embed(texts),
        "Embedder.stream": lambda: sum(len(block.vectors) for block in embedder.stream(texts)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for way in ways.values():
        way()  # everything is warm, and the embedder knows the engine's speed
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - start)
    best = len(texts) / min(seconds["LLM.embed"])
    print(f"\n| way | documents/s, best of {rounds} | all rounds | to LLM.embed |\n|---|---|---|---|")
    for name, took in seconds.items():
        rates = [len(texts) / second for second in took]
        print(f"| {name} | {max(rates):.1f} | {', '.join(f'{r:.1f}' for r in rates)} | {max(rates) / best:.3f} |")
    theirs = np.asarray([output.outputs.embedding for output in results["LLM.embed"]], dtype=np.float32)
    ours = results["Embedder.embed"]
    cosines = (theirs * ours).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    print(f"\nleast cosine of Embedder.embed to LLM.embed: {cosines.min():.7f}")
    times = []
    for number in range(100):
        start = time.perf_counter()
        embedder.embed([f"which of the texts is number {number}?"], "query")
        times.append(time.perf_counter() - start)
    direct = []
    for number in range(100):
        start = time.perf_counter()
        llm.embed([f"which of the texts is number {number}?"], use_tqdm=False)
        direct.append(time.perf_counter() - start)
    print(f"one query, p50: LLM.embed {np.median(direct) * 1e3:.2f} ms, Embedder.embed {np.median(times) * 1e3:.2f} ms")
    print(f"batch that the embedder settled on: {embedder._core.backend.limits.texts} texts")  # noqa: SLF001


def made_up(count: int) -> list[str]:
    """Texts of 10 to 150 words from this repository's files."""
    root = Path(__file__).parents[1]
    words = " ".join(file.read_text("utf8") for file in sorted(root.rglob("vllm_embed/**/*.py"))).split()
    rng = random.Random(0)
    starts = (rng.randrange(len(words) - 200) for _ in range(count))
    return [" ".join(words[start : start + rng.randrange(10, 150)]) for start in starts]


def gpu_memory() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    used = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return f", GPU memory used: {', '.join(used.split(chr(10))).strip(', ')}"


if __name__ == "__main__":
    sys.exit(main())
