"""What a job costs beyond its embedder: CPU and memory of `jobs.embed` from JSON lines to Parquet, by rows.

    python benchmarks/jobs.py [--rows 10000 100000 1000000] [--json benchmarks/results/jobs.json]

Each size runs in a process of its own, against a local server that answers at once with 1,024-d vectors, and beside it
`Embedder.stream` alone over the same texts. CPU is that of the whole process, its start and a first, small job not
counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import report
from fast_server import DIMENSION, MODEL, FastServer, quiet_environment

from vllm_embed import Embedder, jobs

if TYPE_CHECKING:
    from collections.abc import Iterator


def _texts(count: int) -> Iterator[str]:
    return (f"text {number} {'some words of a text ' * 24}" for number in range(count))


def run(way: str, url: str, rows: int, folder: Path) -> dict[str, float]:
    """In this process: microseconds a row, and the peak in MiB."""
    quiet_environment()
    with Embedder(model=MODEL, base_url=url) as embedder:
        embedder.embed(list(_texts(2_048)))
        if way == "job":  # once, for what a process pays once, such as importing pyarrow
            jobs.embed(folder / "in.jsonl", folder / "warm.parquet", embedder=embedder, limit=2_048)
        begin, cpu = time.perf_counter(), time.process_time()
        if way == "stream":
            done = sum(len(block.vectors) for block in embedder.stream(_texts(rows)))
        else:
            done = jobs.embed(folder / "in.jsonl", folder / "out.parquet", embedder=embedder, limit=rows).rows
        cpu, wall = time.process_time() - cpu, time.perf_counter() - begin
    if done != rows:
        raise SystemExit(f"{rows} rows gave {done}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {"cpu_us": cpu / rows * 1e6, "wall_us": wall / rows * 1e6, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.way, options.url, options.rows[0], options.folder)))
        return
    machine = report.environment()
    print(f"{machine['date']}  {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    with FastServer() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "in.jsonl").open("wb") as file:
            for number, text in enumerate(_texts(max(options.rows))):
                file.write(orjson.dumps({"id": f"doc-{number}", "text": text, "year": 2000 + number % 20}) + b"\n")
        for rows in options.rows:
            for way in ("stream", "job"):
                command = [sys.executable, __file__, "--way", way, "--url", server.url]
                command += ["--rows", str(rows), "--folder", name]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found.setdefault(str(rows), {})[way] = json.loads(done.stdout)
            for left in folder.glob("*.parquet*"):
                shutil.rmtree(left)
    table = []
    for rows, ways in found.items():
        more = ways["job"]["cpu_us"] - ways["stream"]["cpu_us"]
        figures = (
            ways["stream"]["cpu_us"],
            ways["job"]["cpu_us"],
            more,
            ways["job"]["wall_us"],
            ways["job"]["peak_mib"],
        )
        table.append([f"{int(rows):,}", *(f"{figure:,.1f}" for figure in figures)])
    title = f"JSON lines to Parquet, {DIMENSION}-d, texts of 510 characters: microseconds a row, MiB"
    report.show(title, ["rows", "stream CPU", "job CPU", "the job's own", "job wall", "peak"], table)
    if options.json:
        report.write(options.json, {**machine, "dimension": DIMENSION, "rows": found})


if __name__ == "__main__":
    main()
