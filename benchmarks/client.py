"""What the client costs: ours beside LangChain's, LlamaIndex's and OpenAI's own, in one run against a local server.

    python benchmarks/client.py [--quick] [--json benchmarks/results/client.json]

The server answers at once, with 1,024-d vectors made beforehand, on another core: what is measured is the client.
Clients take turns within every round, shuffled, each after a short call that is not measured; figures are medians over
the rounds, ratios the medians of each round's ratio to LangChain's `OpenAIEmbeddings`. It fails for wrong vectors,
never for slow ones.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import report
from fast_server import DIMENSION, FastServer, quiet_environment, vectors
from peers import BASELINE, CLIENTS, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SENTENCE = "the of a server reads every document once and keeps what an index needs to find it again by meaning"
_DOCUMENT_WORDS = 100
"""About 120 tokens, 500 characters."""
_QUERY_WORDS = 12
_GPU_PER_S = 10_000.0
_LATENCY_S = 0.01
_QUIET = 1.15
_SLOW = "sdk-float"
"""Costs 1.5 ms a document: a tenth of the documents tells."""

_Rounds = dict[str, list[dict[str, float]]]
"""By client, one dict of figures for each round."""


class Sizes(NamedTuple):
    """How much is measured."""

    rounds: int
    documents: int
    queries: int
    saturating: int
    saturating_rounds: int
    at_once: int
    at_once_rounds: int


FULL = Sizes(9, 2_048, 100, 8_192, 3, 2_000, 3)
"""Three to four minutes."""
QUICK = Sizes(3, 2_048, 50, 4_096, 1, 2_000, 1)
"""One minute."""


class _Measure(NamedTuple):
    """One question put to several clients: per client and round, a few figures."""

    title: str
    columns: tuple[str, ...]
    rounds: _Rounds
    ratio_of: str
    """The column whose ratio to the baseline is taken."""
    inverse: bool = False
    """Whether more is better: the ratio is then how many times as fast."""

    def median(self, key: str, column: str) -> float:
        return statistics.median(figures[column] for figures in self.rounds[key])

    def ratio(self, key: str) -> float:
        pairs = zip(self.rounds[key], self.rounds[BASELINE], strict=True)
        ratios = [one[self.ratio_of] / base[self.ratio_of] for one, base in pairs]
        return statistics.median(1 / ratio if self.inverse else ratio for ratio in ratios)

    def show(self) -> None:
        rows = [
            [CLIENTS[key][0], *(_number(self.median(key, c)) for c in self.columns), f"{self.ratio(key):.2f}"]
            for key in self.rounds
        ]
        head = ["client (texts per request)", *self.columns, "times as fast" if self.inverse else "ratio"]
        report.show(self.title, head, rows)

    def plain(self) -> dict[str, Any]:
        return {
            key: {
                "client": CLIENTS[key][0],
                **{column: self.median(key, column) for column in self.columns},
                "ratio": self.ratio(key),
                "rounds": rounds,
            }
            for key, rounds in self.rounds.items()
        }


def _number(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def texts(count: int, words: int) -> list[str]:
    """Texts of so many words, no two the same."""
    vocabulary = _SENTENCE.split()
    some = [" ".join(vocabulary[(at * step) % len(vocabulary)] for at in range(words - 2)) for step in range(1, 18)]
    return [f"text {number} {some[number % len(some)]}" for number in range(count)]


def _turns(keys: list[str], rounds: int) -> Iterator[str]:
    """Every client once a round, shuffled: what the one before leaves in caches and memory evens out."""
    order = random.Random(0)
    for _ in range(rounds):
        yield from order.sample(keys, len(keys))


def _measured(keys: list[str], rounds: int, once: Callable[[str], dict[str, float]]) -> _Rounds:
    found: _Rounds = {key: [] for key in keys}
    for key in _turns(keys, rounds):
        gc.collect()
        found[key].append(once(key))
    return found


def bulk(server: FastServer, clients: dict[str, Client], sizes: Sizes) -> _Measure:
    """CPU of this process for each document of a bulk call, its vectors dropped again."""
    documents = texts(sizes.documents, _DOCUMENT_WORDS)
    server.behave()

    def once(key: str) -> dict[str, float]:
        mine = documents[:: 10 if key == _SLOW else 1]
        clients[key].bulk(mine[:200])
        start, cpu = time.perf_counter(), time.process_time()
        clients[key].bulk(mine)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
        return {"CPU us": cpu / len(mine) * 1e6, "wall us": wall / len(mine) * 1e6}

    title = f"(a) one document in bulk, {sizes.documents:,} documents of {len(documents[0])} characters a call"
    return _Measure(title, ("CPU us", "wall us"), _measured(list(CLIENTS), sizes.rounds, once), "CPU us")


def single(server: FastServer, clients: dict[str, Client], sizes: Sizes) -> _Measure:
    """One query at a time."""
    queries = texts(sizes.queries, _QUERY_WORDS)
    server.behave()

    def once(key: str) -> dict[str, float]:
        ask, walls = clients[key].query, []
        for query in queries[:5]:
            ask(query)
        cpu = time.process_time()
        for query in queries:
            start = time.perf_counter()
            ask(query)
            walls.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
        return {"p50 us": statistics.median(walls) * 1e6, "CPU us": cpu / len(queries) * 1e6}

    keys = ["arrays", "lists", "lists-llama-index", BASELINE, "llama-index", "sdk", "sdk-float"]
    title = f"(b) one query at a time, {sizes.queries} queries a round"
    return _Measure(title, ("p50 us", "CPU us"), _measured(keys, 2 * sizes.rounds, once), "p50 us")


def saturation(server: FastServer, clients: dict[str, Client], sizes: Sizes) -> _Measure:
    """Documents a second reached in one bulk call, of a server that takes them one after the other."""
    documents = texts(sizes.saturating, _DOCUMENT_WORDS)

    def once(key: str) -> dict[str, float]:
        mine = documents[:: 10 if key == _SLOW else 1]
        server.behave(documents_per_s=_GPU_PER_S)
        start = time.perf_counter()
        kept = clients[key].bulk(mine)
        rate = len(kept) / (time.perf_counter() - start)
        counted = server.counters()
        return {"documents/s": rate, "% of server": 100 * rate / _GPU_PER_S, "in flight": counted["most_in_flight"]}

    title = f"(c) a serial server of {_GPU_PER_S:,.0f} documents/s, {sizes.saturating:,} documents in one call"
    columns = ("documents/s", "% of server", "in flight")
    found = _measured(list(CLIENTS), sizes.saturating_rounds, once)
    return _Measure(title, columns, found, "% of server")


def together(server: FastServer, sizes: Sizes) -> _Measure:
    """Many awaited single queries at once, by a client made for the event loop that it runs in."""
    queries = texts(sizes.at_once, _QUERY_WORDS)

    async def ask(client: Client) -> dict[str, float]:
        await client.aquery(queries[0])
        server.behave(latency_s=_LATENCY_S)
        start, cpu = time.perf_counter(), time.process_time()
        found = await asyncio.gather(*map(client.aquery, queries))
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
        assert len(found) == len(queries)
        counted = server.counters()
        requests, in_flight = counted["requests"], counted["most_in_flight"]
        return {"seconds": seconds, "CPU s": cpu, "requests": requests, "in flight": in_flight}

    def once(key: str) -> dict[str, float]:
        client = CLIENTS[key][1](server.url)
        figures = asyncio.run(ask(client))
        client.close()
        return figures

    keys = ["arrays", "lists", "lists-llama-index", BASELINE, "llama-index", "sdk"]
    title = f"(d) {sizes.at_once:,} awaited queries at once; {_LATENCY_S * 1e3:g} ms a request, any number side by side"
    found = _measured(keys, sizes.at_once_rounds, once)
    return _Measure(title, ("seconds", "CPU s", "requests", "in flight"), found, "seconds", inverse=True)


def targets(found: dict[str, _Measure]) -> list[dict[str, Any]]:
    """What the project promises, beside what was measured now."""
    goals = (
        ("bulk, lists, 128 texts a request as the peer: CPU, ratio", "<=", 0.45, found["bulk"].ratio("lists-128")),
        ("bulk, arrays, 128 texts a request: CPU, ratio", "<=", 0.16, found["bulk"].ratio("arrays-128")),
        ("one query: p50, ratio", "<=", 0.6, found["single"].ratio("lists")),
        ("arrays, % of a serial server", ">=", 95.0, found["saturation"].median("arrays", "% of server")),
        ("2,000 queries at once, times as fast", ">=", 10.0, found["together"].ratio("lists")),
    )
    return [
        {"what": what, "goal": f"{sign} {goal:g}", "measured": got, "met": got <= goal if sign == "<=" else got >= goal}
        for what, sign, goal, got in goals
    ]


def busy(found: dict[str, _Measure]) -> float:
    """Wall time for each CPU second of the baseline, which waits for nothing else: 1.0 to 1.1 on a quiet machine."""
    waits = (("bulk", "wall us", "CPU us"), ("single", "p50 us", "CPU us"), ("together", "seconds", "CPU s"))
    return max(
        statistics.fmean(figures[wall] / figures[cpu] for figures in found[name].rounds[BASELINE])
        for name, wall, cpu in waits
    )


def _checked(server: FastServer) -> dict[str, Client]:
    """Every client, made and warm, after a look at whether its vectors are right."""
    clients = {key: make(server.url) for key, (_, make) in CLIENTS.items()}
    for key, client in clients.items():
        documents = np.asarray(client.bulk(texts(20, _DOCUMENT_WORDS)))
        query = np.asarray(client.query("a query")).reshape(-1)
        right = vectors(DIMENSION, 1)[0]
        if documents.shape != (20, DIMENSION) or not np.allclose(documents[0], right) or not np.allclose(query, right):
            raise SystemExit(f"{CLIENTS[key][0]} gives wrong vectors")
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures there")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    quiet_environment()
    machine = report.environment()
    with FastServer() as server:
        place = "client and server on a core each" if server.pinned else "not pinned to cores"
        print(f"{machine['date']}  {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {place}")
        clients = _checked(server)
        found: dict[str, _Measure] = {}
        for name, measure in (("bulk", bulk), ("single", single), ("saturation", saturation)):
            found[name] = measure(server, clients, sizes)
            found[name].show()
        found["together"] = together(server, sizes)
        found["together"].show()
    promised = targets(found)
    rows = [[t["what"], t["goal"], f"{t['measured']:.3g}", "yes" if t["met"] else "NO"] for t in promised]
    report.show(f"Targets; ratios are to {CLIENTS[BASELINE][0]}", ["", "target", "measured", "met"], rows)
    if (waited := busy(found)) > _QUIET:
        print(f"\nNot to be quoted: others used this core, a CPU second took {waited:.1f} s. Repeat when it is quiet.")
    if options.json:
        results = {name: {"title": measure.title, "clients": measure.plain()} for name, measure in found.items()}
        ran = {"quick": options.quick, "pinned": server.pinned, "baseline": CLIENTS[BASELINE][0], **sizes._asdict()}
        ran["wall_per_cpu"] = busy(found)
        report.write(options.json, {**machine, "run": ran, "targets": promised, "results": results})


if __name__ == "__main__":
    main()
