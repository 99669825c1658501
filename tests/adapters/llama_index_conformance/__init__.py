"""A conformance suite for LlamaIndex embeddings, by inheritance, as langchain-tests is for LangChain's.

    class TestMyEmbedding(LlamaIndexEmbeddingConformance):
        def make(self, **options):
            return MyEmbedding(model_name="my-model", **options)

        def reference(self, text):
            return ...  # the right vector, found without the class under test

The options that it gives to `make` are fields of LlamaIndex's BaseEmbedding. It needs pytest and numpy, and nothing of
ours: take the folder.
"""

from llama_index_conformance.identity import Identity
from llama_index_conformance.methods import Methods
from llama_index_conformance.pipelines import Pipelines
from llama_index_conformance.watching import Watching

__all__ = ["LlamaIndexEmbeddingConformance"]


class LlamaIndexEmbeddingConformance(Methods, Watching, Identity, Pipelines):
    """All of it. A subclass gives `make` and `reference`, see `basis.Basis`."""
