"""Prompts of the model's own, fingerprints, expectations, namespaces."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_embed import Embedder, Fingerprint, errors
from vllm_embed._shape import unit
from vllm_embed.fingerprint import CANARIES
from vllm_embed.testing import FakeVLLMServer, Fault

Embed = Callable[..., np.ndarray]


@pytest.fixture(params=["sync", "async", "stream"])
def embed(request: pytest.FixtureRequest) -> Embed:
    return {
        "sync": lambda embedder, *args, **kwargs: embedder.embed(*args, **kwargs),
        "async": lambda embedder, *args, **kwargs: asyncio.run(embedder.aembed(*args, **kwargs)),
        "stream": lambda embedder, *args, **kwargs: next(embedder.stream(*args, **kwargs)).vectors,
    }[request.param]


def folder(path: Path, config: object) -> str:
    path.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config_sentence_transformers.json").write_text(text)
    return str(path)


E5 = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None}


@pytest.mark.parametrize(
    ("config", "query", "document"),
    [
        pytest.param(E5, "query: ", "passage: ", id="query and passage"),
        pytest.param({"prompts": {"query": "Q:", "document": ""}}, "Q:", "", id="none for documents"),
        pytest.param({"prompts": {"query": "Q:"}}, "Q:", "", id="documents have no entry"),
        pytest.param({"prompts": {"x": "X:"}, "default_prompt_name": "x"}, "X:", "X:", id="a default for both"),
    ],
)
def test_auto_is_the_models_own_prompts_from_its_root(
    embed: Embed, tmp_path: Path, config: dict, query: str, document: str
) -> None:
    with FakeVLLMServer(dimension=16, root=folder(tmp_path / "model", config)) as server:
        with Embedder(base_url=server.base_url, query_prompt="auto", document_prompt="auto") as embedder:
            embed(embedder, ["a"], kind="query")
            embed(embedder, ["a"])
            assert embedder.preview("b", kind="query") == f"{query}b"
            assert embedder.preview("b") == f"{document}b"
        assert [body["input"] for body in server.bodies] == [[f"{query}a"], [f"{document}a"]]


def test_auto_for_one_kind_leaves_the_others_prompt(tmp_path: Path) -> None:
    with FakeVLLMServer(dimension=16, root=folder(tmp_path, E5)) as server:
        with Embedder(base_url=server.base_url, query_prompt="auto", document_prompt="d: ") as embedder:
            assert (embedder.preview("x", kind="query"), embedder.preview("x")) == ("query: x", "d: x")


def test_auto_asks_no_server_where_the_named_model_lies_here(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", E5)
    with Embedder(base_url="http://127.0.0.1:9", model=model, query_prompt="auto", max_retries=0) as embedder:
        assert embedder.prompts() == ("query: ", "")
        assert embedder.preview("x", kind="query") == "query: x"


def test_auto_looks_into_the_hubs_cache(
    server: FakeVLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    folder(cache / "snapshots" / "old", {"prompts": {"query": "old: "}})
    folder(cache / "snapshots" / "new", {"prompts": {"query": "new: "}})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("new\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with Embedder(base_url=server.base_url, model="org/name", query_prompt="auto") as embedder:
        assert embedder.preview("x", kind="query") == "new: x"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with Embedder(base_url=server.base_url, model="org/name", query_prompt="auto") as embedder:
        with pytest.raises(errors.ConfigurationError, match="looked at .*models--org--name"):
            embedder.preview("x", kind="query")


@pytest.mark.parametrize(
    ("config", "said"),
    [("{}", "no prompts were found; looked at .*config_sentence_transformers.json"), ("[", "cannot be read")],
    ids=["a config without prompts", "a broken config"],
)
def test_auto_without_prompts_says_where_it_looked(embed: Embed, tmp_path: Path, config: str, said: str) -> None:
    with FakeVLLMServer(dimension=16, root=folder(tmp_path, config)) as server:
        with Embedder(base_url=server.base_url, document_prompt="auto") as embedder:
            with pytest.raises(errors.ConfigurationError, match=said):
                embed(embedder, ["a"])
        assert server.requests == 0


def test_preview_shows_what_is_sent_and_what_is_refused() -> None:
    embedder = Embedder(base_url="http://127.0.0.1:9", query_prompt="q: ", blank_text="error")
    assert embedder.preview("\ufeffa\0b", kind="query") == "q: ab"
    assert embedder.preview("a", prompt="<{text}>") == "<a>"
    with pytest.raises(errors.InvalidInputError, match="blank_text"):
        embedder.preview(" ")


def test_a_fingerprint_is_saved_loaded_and_accepted(embed: Embed, server: FakeVLLMServer, tmp_path: Path) -> None:
    path = tmp_path / "index.fingerprint.json"
    with Embedder(base_url=server.base_url, api_key="key-1234", query_prompt="q: ") as embedder:
        made = embedder.fingerprint()
        made.save(path)
    assert (made.dimension, made.normalized, made.query_prompt, made.model) == (16, True, "q: ", "fake-model")
    assert made.vectors.shape == (len(CANARIES), 16)
    loaded = Fingerprint.load(path)
    assert loaded == made
    assert loaded.compare(made).same
    assert "key-1234" not in path.read_text()
    assert server.base_url not in path.read_text()
    for expect in (made, path, str(path)):
        with Embedder(base_url=server.base_url, query_prompt="q: ", expect=expect) as embedder:
            embed(embedder, ["a"])
            asked = server.requests
            embed(embedder, ["b"])
            assert server.requests == asked + 1  # checked once


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"document_prompt": "d: "}, "document_prompt +'' +'d: '"),
        ({"unicode": "nfkc"}, "unicode +'nfc' +'nfkc'"),
        ({"long_text": "truncate"}, "long_text +'error' +'truncate'"),
        ({"dimensions": 8, "dimensions_fallback": "client"}, "dimension +16 +8"),
        ({"normalize": False}, "normalized +True +False"),
    ],
)
def test_other_vectors_than_expected_are_refused_with_a_table(
    embed: Embed, server: FakeVLLMServer, options: dict, said: str
) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    with Embedder(base_url=server.base_url, expect=made, **options) as embedder:
        for _ in range(2):
            with pytest.raises(errors.FingerprintMismatchError, match=said):
                embed(embedder, ["mine"])
    assert not any("mine" in text for body in server.bodies for text in body["input"])


def test_another_model_is_told_by_its_vectors_and_another_name_alone_is_not(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    with FakeVLLMServer(dimension=16, model="same-model-other-name") as twin:
        with Embedder(base_url=twin.base_url, expect=made) as embedder:
            embedder.embed(["a"])
            assert ("model", "'fake-model'", "'same-model-other-name'") in made.compare(embedder.fingerprint()).notes
    rng = np.random.default_rng(0)
    other = Fingerprint.of(
        rng.normal(size=(len(CANARIES), 16)).astype(np.float32),
        **{name: getattr(made, name) for name in ("query_prompt", "document_prompt", "unicode", "long_text", "model")},
    )
    found = made.compare(other)
    assert not found.same
    assert "canaries' cosine" in str(found)


def test_another_precision_passes_with_its_difference_told(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    noise = np.random.default_rng(0).normal(scale=7e-4, size=made.vectors.shape).astype(np.float32)
    half = Fingerprint.of(
        unit(made.vectors + noise),
        **{name: getattr(made, name) for name in ("query_prompt", "document_prompt", "unicode", "long_text", "model")},
    )
    found = made.compare(half)
    assert found.same
    assert "another precision: least cosine 0.99999" in str(found)


@pytest.mark.parametrize(("scale", "near"), [(2e-2, True), (0.2, False)], ids=["deep in bfloat16", "other vectors"])
def test_a_refusal_that_is_nearly_none_points_at_the_precision(
    server: FakeVLLMServer, scale: float, near: bool
) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    noise = np.random.default_rng(0).normal(scale=scale / 4, size=made.vectors.shape).astype(np.float32)
    with Embedder(base_url=server.base_url, expect=replace(made, vectors=unit(made.vectors + noise))) as embedder:
        with pytest.raises(errors.FingerprintMismatchError, match="canaries' cosine") as caught:
            embedder.embed(["a"])
    assert ("likely another precision: compare --dtype" in str(caught.value)) == near


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"no fingerprint at .*save\(path\) makes one"),
        ("{}", "is no fingerprint"),
        ("[]", "is no fingerprint"),
        ("\x00", "is no fingerprint"),
    ],
)
def test_a_file_that_is_no_fingerprint_is_told(
    server: FakeVLLMServer, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "f.json"
    if content is not None:
        path.write_text(content)
    with Embedder(base_url=server.base_url, expect=path) as embedder:
        with pytest.raises(errors.ConfigurationError, match=said):
            embedder.embed(["a"])


def test_a_fingerprint_of_other_canaries_is_not_compared(server: FakeVLLMServer, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with Embedder(base_url=server.base_url) as embedder:
        embedder.fingerprint().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "canaries": "0"}))
    with pytest.raises(errors.ConfigurationError, match="other texts"):
        Fingerprint.load(path)


def test_a_failed_check_is_made_again(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    with Embedder(base_url=server.base_url, expect=made, max_retries=0) as embedder:
        server.order(Fault.status(500))
        with pytest.raises(errors.ServerStatusError):
            embedder.embed(["a"])
        assert embedder.embed(["a"]).shape == (1, 16)


def test_a_sibling_with_other_prompts_expects_nothing(server: FakeVLLMServer) -> None:
    with Embedder(base_url=server.base_url) as embedder:
        made = embedder.fingerprint()
    with Embedder(base_url=server.base_url, expect=made) as embedder:
        assert embedder.with_prompts(query="other: ").embed(["a"]).shape == (1, 16)


def test_the_namespace_is_of_what_decides_a_vector_and_of_nothing_else(server: FakeVLLMServer) -> None:
    def namespace(**options: object) -> str:
        with Embedder(**{"base_url": server.base_url, **options}) as embedder:
            return embedder.namespace

    plain = namespace()
    assert plain.startswith("fake-model-")
    assert len(plain) < 60
    for transport in ({"api_key": "k1"}, {"timeout": 3.0}, {"batch_size": 3}, {"base_url": server.base_url + "/"}):
        assert namespace(**transport) == plain
    others = [
        namespace(**decides)
        for decides in (
            {"model": "other"},
            {"query_prompt": "q: "},
            {"document_prompt": "q: "},
            {"dimensions": 8},
            {"normalize": False},
            {"unicode": None},
            {"long_text": "truncate"},
            {"extra_body": {"priority": 1}},
        )
    ]
    assert len({plain, *others}) == 9
