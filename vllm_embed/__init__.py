"""vLLM as an embedding backend: text in, the right vectors out.

`Embedder` is the one object behind `langchain_vllm_embed.VLLMEmbeddings` and `llama_index_vllm_embed.VLLMEmbedding`.
Importing this package loads neither framework, opens no socket and starts no thread.
"""

import logging

from vllm_embed import errors
from vllm_embed._column import EmbedColumn
from vllm_embed._version import __version__
from vllm_embed.embedder import Embedder
from vllm_embed.fingerprint import Fingerprint
from vllm_embed.info import Block, EndpointInfo, ServerInfo, Stats
from vllm_embed.settings import Settings

__all__ = [
    "Block",
    "EmbedColumn",
    "Embedder",
    "EndpointInfo",
    "Fingerprint",
    "ServerInfo",
    "Settings",
    "Stats",
    "__version__",
    "errors",
]

logging.getLogger("vllm_embed").addHandler(logging.NullHandler())  # the library itself prints nothing
