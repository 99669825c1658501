"""Run by the conformance suite in a process of its own: `IngestionPipeline` over two processes, sync and async.

Arguments: file of a pickled embedding, JSON list of texts. Prints the vectors of each run as JSON.
"""

import asyncio
import json
import pickle
import sys
from pathlib import Path

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode


def main() -> None:
    embedding = pickle.loads(Path(sys.argv[1]).read_bytes())
    texts = json.loads(sys.argv[2])

    def vectors(nodes):
        by_text = {node.text: node.embedding for node in nodes}
        return [by_text[text] for text in texts]

    def nodes():
        return [TextNode(text=text) for text in texts]

    pipeline = IngestionPipeline(transformations=[embedding], disable_cache=True)
    spawned = vectors(pipeline.run(nodes=nodes(), num_workers=2))
    here = vectors(pipeline.run(nodes=nodes()))  # the embedding has connections and threads now
    forked = vectors(asyncio.run(pipeline.arun(nodes=nodes(), num_workers=2)))
    sys.stdout.write(json.dumps([spawned, here, forked]))


if __name__ == "__main__":
    main()
