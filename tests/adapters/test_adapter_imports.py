"""What an import may do, each in a fresh interpreter.

Seen with langchain-core 1.7 and llama-index-core 0.14: neither loads tiktoken or transformers. Both load requests,
whose urllib3 tries on import whether a socket can be bound to ::1, and closes it. So our promise of no socket holds to
the letter for `vllm_embed` and, in the adapters, for all that is ours; nobody connects or looks up a name.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

HEAVY = ("vllm", "torch", "openai", "tiktoken", "transformers")
FRAMEWORKS = ("langchain_core", "llama_index")
PACKAGES = {
    "vllm_embed": "vllm_embed",
    "langchain_vllm_embed": "langchain_core.embeddings.embeddings",
    "llama_index_vllm_embed": "llama_index.core",
}
"""Our packages, and what each needs of its framework."""

PREAMBLE = """
import json, sys
events = []
def watch(event, args):
    if event.startswith(("socket.", "_thread.start")):
        events.append([event, str(args[1:])])
sys.addaudithook(watch)
"""

MAKE_ALL = {
    "vllm_embed": "from vllm_embed import Embedder as made",
    "langchain_vllm_embed": "from langchain_vllm_embed import VLLMEmbeddings as made",
    "llama_index_vllm_embed": "from llama_index_vllm_embed import VLLMEmbedding as made",
}


def run(code, *, fails=False):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OPENAI_"))}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert (finished.returncode != 0) == fails, finished.stderr
    return finished.stderr if fails else json.loads(finished.stdout)


@functools.cache
def imported(package):
    """Top-level names in sys.modules, and socket and thread events, of an import with all that it imports."""
    modules = "[name.partition('.')[0] for name in sys.modules]"
    names, events = run(f"{PREAMBLE}\nimport {package}\nprint(json.dumps([{modules}, events]))")
    return set(names), events


@pytest.mark.parametrize("package", PACKAGES)
def test_loads_nothing_heavy_and_no_other_framework(package):
    loaded, _ = imported(package)
    assert not loaded & set(HEAVY)
    own = PACKAGES[package].partition(".")[0]
    assert not loaded & (set(FRAMEWORKS) - {own})


@pytest.mark.parametrize("package", PACKAGES)
def test_opens_no_socket_and_starts_no_thread(package):
    """Nor does making an object, copying, pickling, printing it, or asking LlamaIndex's payload."""
    events = run(f"""{PREAMBLE}
import {PACKAGES[package]}
del events[:]
{MAKE_ALL[package]}
import copy, pickle
one = made()
other = made(model="m", base_url=["http://a.example", "http://b.example"], api_key="k", proxy="http://c.example:1")
for each in (one, other):
    pickle.loads(pickle.dumps(each)), copy.deepcopy(each), copy.copy(each), repr(each)
    each.with_prompts(query="q")
    getattr(each, "to_payload", str)()
getattr(other, "to_dict", str)()
print(json.dumps(events))
""")
    assert events == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_framework_included_nobody_connects_or_looks_up_a_name(package):
    _, events = imported(package)
    probe_of_urllib3 = [["socket.__new__", f"({int(socket.AF_INET6)}, 1, 0)"], ["socket.bind", "(('::1', 0),)"]]
    assert [event for event in events if event not in probe_of_urllib3] == []
    if package == "vllm_embed":
        assert events == []


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_the_core_needs_no_framework():
    blocked = (*FRAMEWORKS, *HEAVY, "langchain_openai", "langchain_tests")
    code = (
        BLOCK.format(blocked=blocked)
        + """
import json
import numpy as np
from vllm_embed import Embedder
from vllm_embed.testing import FakeVLLMServer
import vllm_embed.serving
with FakeVLLMServer() as server, Embedder(base_url=server.base_url) as embedder:
    print(json.dumps(bool((embedder.embed(["a"])[0] == server.vector("a")).all())))
"""
    )
    assert run(code) is True


@pytest.mark.parametrize(
    ("package", "framework", "extra"),
    [
        ("langchain_vllm_embed", "langchain_core", 'pip install "vllm-embed[langchain]"'),
        ("llama_index_vllm_embed", "llama_index", 'pip install "vllm-embed[llama-index]"'),
    ],
)
def test_an_adapter_without_its_framework_says_what_to_install(package, framework, extra):
    stderr = run(BLOCK.format(blocked=(framework,)) + f"import {package}", fails=True)
    assert stderr.strip().endswith(
        f"ImportError: {package} needs {framework.replace('_index', '-index-core').replace('_core', '-core')}: {extra}"
    )


@pytest.mark.parametrize("package", ["langchain_vllm_embed", "llama_index_vllm_embed"])
def test_an_adapter_needs_neither_the_other_framework_nor_openai(package):
    own = PACKAGES[package].partition(".")[0]
    blocked = (*(set(FRAMEWORKS) - {own}), *HEAVY, "langchain_openai")
    assert run(BLOCK.format(blocked=blocked) + f"{MAKE_ALL[package]}\nmade(model='m')\nprint('true')") is True
