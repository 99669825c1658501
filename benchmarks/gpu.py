"""One GPU, one run: plain forward, sentence-transformers, vLLM in process, and one to three servers behind one client.

    python benchmarks/gpu.py --model FOLDER --texts TEXTS.json [--json FILE] [--only servers,forward,...]

TEXTS.json is a list of strings. FOLDER is a sentence-transformers model that vLLM serves. Servers are started here,
side by side, on `--port` and the following ones; GPU memory is what nvidia-smi reports above what was used before.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_embed import Embedder
from vllm_embed.serving import VLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "benchmark"
NAME = "benchmark-model"
PARTS = ("servers", "forward", "sentence-transformers", "in-process")


def memory_mib() -> int:
    """GPU memory in use on the first GPU; 0 without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return 0


class Table:
    """Rows as they come, printed at once, so that a run that is cut short has told what it measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, speeds: list[float], memory: int | None = None, note: str = "") -> float:
        """Print and keep one row; the median of the runs is what counts."""
        middle = statistics.median(speeds)
        row = {"what": what, "documents_per_s": round(middle, 1), "runs": [round(s, 1) for s in speeds]}
        self.rows.append({**row, "gpu_memory_mib": memory, "note": note})
        told = f"{memory:>8} MiB" if memory else " " * 12
        print(f"{what:<56}{middle:>9,.0f}/s {told}  {note} {[round(s) for s in speeds]}", flush=True)
        return middle


def timed(texts: list[str], call: Callable[[list[str]], object]) -> float:
    start = time.perf_counter()
    call(texts)
    return len(texts) / (time.perf_counter() - start)


def servers(table: Table, options: argparse.Namespace, texts: list[str]) -> None:
    """One, two and three servers, by our client with its defaults and by LangChain's."""
    before = memory_mib()
    arguments = ["--gpu-memory-utilization", "0.2", *options.vllm_args.split()]
    made = [
        VLLMServer(
            options.model,
            port=options.port + i,
            api_key=KEY,
            served_model_name=NAME,
            dtype=options.dtype,
            vllm_args=arguments,
            log_dir=options.logs,
            on_progress=(lambda line: print(line, file=sys.stderr, flush=True)) if i == 0 else None,
        )
        for i in range(options.servers)
    ]
    start = time.perf_counter()
    try:
        with concurrent.futures.ThreadPoolExecutor(len(made)) as pool:
            list(pool.map(VLLMServer.start, made))
        print(f"{len(made)} servers healthy after {time.perf_counter() - start:.0f} s", flush=True)
        each = (memory_mib() - before) // len(made)
        urls = [server.base_urls[0] for server in made]
        speeds: dict[str, list[float]] = {}
        clients = {}
        for count in range(1, len(urls) + 1):
            for batch, flight in ((64, 16), (32, 64)):
                which = "defaults, 64 texts x 16 in flight" if batch == 64 else f"{batch} texts x {flight} in flight"
                clients[f"{count} server{'s' * (count > 1)}, vllm-embed, {which}"] = (count, batch, flight)
        for _ in range(options.rounds):
            for name, (count, batch, flight) in clients.items():
                with Embedder(
                    base_url=urls[:count], api_key=KEY, model=NAME, batch_size=batch, max_concurrency=flight
                ) as embedder:
                    embedder.embed(texts[:512])
                    speeds.setdefault(name, []).append(timed(texts, embedder.embed))
        for name, (count, _, _) in clients.items():
            table.add(name, speeds[name], each * count)
        langchain(table, urls[0], texts, each)
    finally:
        for server in made:
            server.stop()


def langchain(table: Table, url: str, texts: list[str], memory: int) -> None:
    from langchain_openai import OpenAIEmbeddings  # noqa: PLC0415 - a peer, not a need

    peer = OpenAIEmbeddings(base_url=url, api_key=KEY, model=NAME, check_embedding_ctx_length=False)
    peer.embed_documents(texts[:64])
    table.add("1 server, LangChain OpenAIEmbeddings (its defaults)", [timed(texts, peer.embed_documents)], memory)


def forward(table: Table, options: argparse.Namespace, _: list[str]) -> None:
    """The model's own forward at a fixed length: what the GPU could do if nothing else took time."""
    import torch  # noqa: PLC0415 - heavy
    from transformers import AutoModel  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, options.dtype)
    model = AutoModel.from_pretrained(options.model, torch_dtype=kind).to(device).eval()
    for batch in (64, 256):
        ids = torch.randint(1_000, 20_000, (batch, options.length), device=device)
        mask = torch.ones_like(ids)
        rounds = max(2, options.forward_texts // batch)
        with torch.inference_mode():
            for _warm in range(2):
                model(input_ids=ids, attention_mask=mask)
            synchronize(torch)
            start = time.perf_counter()
            for _round in range(rounds):
                model(input_ids=ids, attention_mask=mask)
            synchronize(torch)
        speed = batch * rounds / (time.perf_counter() - start)
        table.add(f"plain forward, {options.length} tokens each, batch {batch}", [speed], note=options.dtype)
    del model
    free(torch)


def sentence_transformers(table: Table, options: argparse.Namespace, texts: list[str]) -> None:
    import torch  # noqa: PLC0415 - heavy
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    before = memory_mib()
    model = SentenceTransformer(options.model, model_kwargs={"torch_dtype": getattr(torch, options.dtype)})
    model.encode(texts[:256], batch_size=64, show_progress_bar=False)
    for batch in (32, 256):
        encode = functools.partial(model.encode, batch_size=batch, show_progress_bar=False)
        speed = timed(texts[: options.st_texts], encode)
        table.add(f"sentence-transformers {options.dtype}, batch {batch}", [speed], memory_mib() - before)
    del model, encode
    free(torch)


def in_process(_: Table, options: argparse.Namespace, __: list[str]) -> None:
    """`LLM.embed` called directly and ours, over one engine in a process of its own, which prints its own table."""
    script = Path(__file__).with_name("in_process.py")
    command = [sys.executable, str(script), "--model", options.model, "--texts", options.texts]
    command += ["--dtype", options.dtype, "--gpu-memory-utilization", "0.2", "--rounds", str(options.rounds)]
    subprocess.run([*command, *(["--count", str(options.count)] if options.count else [])], check=True)


def synchronize(torch: object) -> None:
    if torch.cuda.is_available():  # type: ignore[attr-defined]
        torch.cuda.synchronize()  # type: ignore[attr-defined]


def free(torch: object) -> None:
    gc.collect()
    if torch.cuda.is_available():  # type: ignore[attr-defined]
        torch.cuda.empty_cache()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--count", type=int, help="take only so many of the texts")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--length", type=int, default=275, help="tokens a text has on average")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--vllm-args", default="")
    parser.add_argument("--forward-texts", type=int, default=8_192)
    parser.add_argument("--st-texts", type=int, default=4_000)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--logs", default="benchmark-logs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = json.loads(Path(options.texts).read_text())[: options.count]
    table = Table()
    table.rows.append(
        {
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "python": platform.python_version(),
            "texts": len(texts),
        }
    )
    parts = dict(zip(PARTS, (servers, forward, sentence_transformers, in_process), strict=True))
    for part in options.only.split(","):
        try:
            parts[part](table, options, texts)
        finally:
            if options.json:
                options.json.write_text(json.dumps(table.rows, indent=1))


if __name__ == "__main__":
    main()
