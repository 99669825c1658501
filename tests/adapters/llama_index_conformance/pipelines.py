from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

from llama_index_conformance.basis import QUESTION, TEXTS, Basis
from llama_index_conformance.observers import awaited

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Pipelines(Basis):
    """Ingestion pipelines, in this process and over several, and an index with its retriever."""

    def test_pipeline(self, door):
        pipeline = IngestionPipeline(transformations=[self.make()], disable_cache=True)
        self.check_all([node.embedding for node in _run(door, pipeline)])

    def test_pipeline_caches_under_the_identity(self, door):
        pipeline = IngestionPipeline(transformations=[self.make()])
        first = [node.embedding for node in _run(door, pipeline)]
        again = IngestionPipeline(transformations=[self.make()], cache=pipeline.cache)
        assert [node.embedding for node in _run(door, again)] == first
        assert len(pipeline.cache.cache.get_all(collection=pipeline.cache.collection)) == 1

    def test_pipeline_of_processes(self, tmp_path):
        """Its `num_workers` pickles the embedding into processes: spawned by `run`, as Python likes by `arun`."""
        pickled = tmp_path / "embedding.pickle"
        pickled.write_bytes(pickle.dumps(self.make()))
        finished = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "pipeline_of_processes.py"), str(pickled), json.dumps(TEXTS)],
            capture_output=True,
            text=True,
            timeout=self.process_timeout_s,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        runs = json.loads(finished.stdout)
        assert len(runs) == 3
        for vectors in runs:
            self.check_all(vectors)

    @pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
    def test_index_finds_the_nearest(self, use_async):
        index = VectorStoreIndex.from_documents(
            [Document(text=text) for text in TEXTS], embed_model=self.make(embed_batch_size=4), use_async=use_async
        )
        retriever = index.as_retriever(similarity_top_k=2)
        found = asyncio.run(retriever.aretrieve(QUESTION)) if use_async else retriever.retrieve(QUESTION)
        assert found[0].text == TEXTS[0]
        assert found[0].score > found[1].score
        index.insert(Document(text="A bee dances to show the way."))
        assert "bee" in index.as_retriever().retrieve("Does a bee dance to show the way?")[0].text


def _run(door: Callable[..., Any], pipeline: IngestionPipeline) -> Sequence[Any]:
    nodes = [TextNode(text=text) for text in TEXTS]
    if door is awaited:
        return asyncio.run(pipeline.arun(nodes=nodes))
    found: Sequence[Any] = door(pipeline, "run", nodes=nodes)
    return found
