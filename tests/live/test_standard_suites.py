"""LangChain's standard suite and our conformance suite for LlamaIndex, on real vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from llama_index_conformance import LlamaIndexEmbeddingConformance

from langchain_vllm_embed import VLLMEmbeddings
from llama_index_vllm_embed import VLLMEmbedding

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

pytestmark = pytest.mark.live


class TestLangChain(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _server(self, live_server):
        self.server = live_server

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        return self.server.options


class TestLlamaIndex(LlamaIndexEmbeddingConformance):
    @pytest.fixture(autouse=True)
    def _server(self, live_server, encode):
        self.server = live_server
        self.reference = encode
        self.secrets = (self.server.api_key,) if len(self.server.api_key) > 7 else ()

    def make(self, **options):
        return VLLMEmbedding(**self.server.options, **options)

    def transport(self):
        return {"base_url": self.server.base_url, "api_key": self.server.api_key}
