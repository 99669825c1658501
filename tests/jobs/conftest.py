from collections import Counter
from pathlib import Path

import pytest

from vllm_embed import jobs
from vllm_embed.testing import FakeVLLMServer


@pytest.fixture
def received(server: FakeVLLMServer) -> Counter:
    """How often the server was asked for each text."""
    counts: Counter = Counter()
    server.refuse = lambda text: counts.update([text])
    return counts


@pytest.fixture
def embed(server: FakeVLLMServer, tmp_path: Path):
    """`jobs.embed` into a file of the test's folder, by the fake server."""

    def run(inputs, output: str | Path = "x.parquet", **options) -> jobs.Summary:
        options.setdefault("base_url", server.base_url)
        return jobs.embed(inputs, tmp_path / output, **options)

    return run
