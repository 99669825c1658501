"""`index` and `search` below the command line: four stores, against the fake server."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vllm_embed import Embedder
from vllm_embed.errors import ConfigurationError, FingerprintMismatchError, OutputError
from vllm_embed.jobs import embed
from vllm_embed.jobs._search import search
from vllm_embed.jobs._stores import store_at, store_target
from vllm_embed.testing import FakeVLLMServer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*langchain-community.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:table_names:DeprecationWarning"),  # LlamaIndex asks LanceDB so
]

KINDS = ["chroma", "qdrant", "lancedb", "faiss"]
ROWS = [{"id": f"d{i}", "text": f"text number {i}", "n": i} for i in range(40)]


@pytest.fixture(params=KINDS)
def spec(request, tmp_path):
    return f"{request.param}:{tmp_path / 'index'}"


def fill(spec, rows, server, **options):
    return embed(rows, store_target(spec), id_column="id", base_url=server.base_url, **options)


def texts(spec, server, count=100):
    """Text by id of all that a search finds."""
    hits = search("x", spec, k=count, base_url=server.base_url)
    assert len({hit.id for hit in hits}) == len(hits)
    return {hit.id: hit.text for hit in hits}


def opened(spec, framework, server, monkeypatch):
    """What the lines that a job tells give."""
    monkeypatch.setenv("VLLM_BASE_URL", server.base_url)
    names = {}
    exec(store_target(spec).how_to_open[framework], names)
    return names


def closed(names):
    """Let go of what was opened, where that holds a lock."""
    store = names["store"]
    client = getattr(store, "_client", None) or getattr(store, "client", None)
    if hasattr(client, "close"):
        client.close()


def test_what_was_filled_is_found_with_its_cosine_text_and_metadata(spec, server):
    summary = fill(spec, ROWS, server)
    assert (summary.embedded, summary.rows, summary.status) == (40, 40, 0)

    with Embedder(base_url=server.base_url) as embedder:
        query = embedder.embed(["text number 7"], kind="query")[0]
        rows = embedder.embed([row["text"] for row in ROWS])
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    hits = search("text number 7", spec, base_url=server.base_url)

    assert [hit.id for hit in hits] == [f"d{i}" for i in np.argsort(-cosines)[:5]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:5], atol=1e-5)
    assert hits[0] == ("d7", hits[0].score, "text number 7", {"n": 7})


def test_a_rerun_makes_no_request_and_writes_nothing(spec, server, tmp_path):
    fill(spec, ROWS, server)
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.faiss")}
    summary = fill(spec, ROWS, server)
    assert (summary.embedded, summary.skipped, summary.requests) == (0, 40, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.faiss")} == built
    assert len(texts(spec, server)) == 40


def test_a_changed_text_replaces_its_row_and_a_removed_one_goes_with_prune(spec, server):
    fill(spec, ROWS, server)
    changed = [*ROWS[:10], {"id": "d10", "text": "another text", "n": 10}, *ROWS[11:30]]
    summary = fill(spec, changed, server)
    assert (summary.replaced, summary.removed, summary.rows) == (1, 10, 40)
    assert texts(spec, server)["d10"] == "another text"

    summary = fill(spec, changed, server, prune=True)
    assert (summary.embedded, summary.pruned, summary.rows) == (0, 10, 30)
    assert texts(spec, server) == {row["id"]: row["text"] for row in changed}
    assert fill(spec, changed, server, prune=True).removed == 0


def test_everything_pruned_and_filled_again(spec, server):
    fill(spec, ROWS, server)
    fill(spec, [{"id": "new", "text": "alone"}], server, prune=True)
    assert texts(spec, server) == {"new": "alone"}


def test_a_kill_between_the_write_and_its_commit_leaves_no_row_twice(spec, server, tmp_path):
    fill(spec, ROWS[:20], server)
    job = tmp_path / "index.job"
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        if (job / name).exists():
            shutil.copy(job / name, tmp_path / name)
    fill(spec, ROWS, server)
    for path in job.glob("ledger.sqlite*"):
        path.unlink()
    for path in tmp_path.glob("ledger.sqlite*"):
        shutil.move(path, job / path.name)

    summary = fill(spec, ROWS, server)
    assert (summary.embedded, summary.skipped, summary.rows) == (20, 20, 40)
    assert texts(spec, server) == {row["id"]: row["text"] for row in ROWS}


def test_values_that_a_store_cannot_hold_are_kept_as_text(spec, server):
    values = {
        "none": None,
        "list": [1, "two"],
        "nested": {"a": {"b": 1}},
        "day": dt.date(2024, 2, 29),
        "large": 2**70,
        "flag": True,
        "ratio": 0.5,
        "a.b": "dotted",
        "relationships": "read by LlamaIndex",
    }
    fill(spec, [{"id": "a", "text": "one", **values}, {"id": "b", "text": "two", "none": 1}], server)
    (found,) = (hit.metadata for hit in search("one", spec, k=2, base_url=server.base_url) if hit.id == "a")

    def plain(value):
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value

    assert plain(found["none"]) is None
    assert plain(found["list"]) in ([1, "two"], {"0": 1, "1": "two"})
    assert plain(found["nested"]) == {"a": {"b": 1}}
    assert str(found["day"]) == "2024-02-29"
    assert int(found["large"]) == 2**70
    assert (found["flag"], found["ratio"], found["a.b"]) == (True, 0.5, "dotted")
    assert found["relationships_"] == "read by LlamaIndex"


def test_later_rows_may_have_other_columns_and_types(spec, server):
    fill(spec, [{"id": "a", "text": "one", "n": 1, "m": 1, "old": "x"}], server)
    later = {"id": "b", "text": "two", "n": "many", "m": 1.5, "new": [1]}
    fill(spec, [{"id": "a", "text": "one", "n": 1, "m": 1, "old": "x"}, later], server)
    found = {hit.id: hit.metadata for hit in search("one", spec, k=5, base_url=server.base_url)}
    assert found["b"]["n"] == "many"
    assert found["b"]["m"] == 1.5
    assert found["b"]["new"] in ([1], "[1]")
    assert str(found["a"]["n"]) == "1"
    assert found["a"]["m"] == 1
    assert found["a"]["old"] == "x"


def test_the_source_of_rows_from_files_is_kept(spec, server, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    embed(path, store_target(spec), base_url=server.base_url)
    hits = search("one", spec, base_url=server.base_url)
    assert {hit.id for hit in hits} == {f"{path}:1", f"{path}:2"}
    assert hits[0].metadata == {"source": str(path)}


def test_langchain_opens_what_was_filled_with_the_lines_that_are_told(spec, server, monkeypatch):
    fill(spec, ROWS, server)
    names = opened(spec, "LangChain", server, monkeypatch)
    with contextlib.ExitStack() as stack:
        stack.callback(closed, names)
        found = names["store"].similarity_search("text number 3", k=4)
    assert [doc.metadata["id"] for doc in found] == [
        hit.id for hit in search("text number 3", spec, k=4, base_url=server.base_url)
    ]
    assert found[0].page_content == "text number 3"
    assert found[0].metadata["n"] == 3


def test_llama_index_opens_what_was_filled_with_the_lines_that_are_told(spec, server, monkeypatch):
    fill(spec, ROWS, server)
    names = opened(spec, "LlamaIndex", server, monkeypatch)
    with contextlib.ExitStack() as stack:
        stack.callback(closed, names)
        found = names["index"].as_retriever(similarity_top_k=4).retrieve("text number 3")
    assert [each.metadata["id"] for each in found] == [
        hit.id for hit in search("text number 3", spec, k=4, base_url=server.base_url)
    ]
    assert found[0].text == "text number 3"
    assert found[0].metadata["n"] == 3
    assert set(found[0].metadata) == {"id", "n"}
    assert found[0].score > found[3].score


def test_a_new_model_width_is_told_before_anything_is_written(spec, server):
    fill(spec, ROWS, server)
    with FakeVLLMServer(dimension=8, model="other") as other:
        with pytest.raises(OutputError, match="overwrite"):
            fill(spec, ROWS[:1], other)
        fill(spec, ROWS, other, overwrite=True)
        assert len(texts(spec, other)) == 40


def test_overwrite_leaves_another_collection_alone(spec, server):
    if spec.startswith("faiss"):
        pytest.skip("a FAISS folder is one collection")
    embed(ROWS[:3], store_target(spec, "others"), id_column="id", base_url=server.base_url)
    fill(spec, ROWS, server)
    fill(spec, ROWS[:5], server, overwrite=True)
    assert len(texts(spec, server)) == 5
    assert len(search("x", spec, collection="others", k=9, base_url=server.base_url)) == 3


def test_a_collection_that_the_job_did_not_make_is_left_alone(spec, server, tmp_path):
    fill(spec, ROWS, server)
    shutil.rmtree(tmp_path / "index.job")
    with pytest.raises(OutputError, match="exists, and .* does not"):
        fill(spec, ROWS, server)


def test_another_kind_of_store_in_the_same_path_is_refused(spec, server, tmp_path):
    fill(spec, ROWS[:2], server)
    other = "lancedb" if spec.startswith("chroma") else "chroma"
    with pytest.raises(OutputError, match="another output"):
        fill(f"{other}:{tmp_path / 'index'}", ROWS[:2], server)


def test_a_store_that_is_gone_is_told_or_built_anew(spec, server, tmp_path):
    fill(spec, ROWS, server)
    shutil.rmtree(tmp_path / "index")
    if spec.startswith("faiss"):
        fill(spec, ROWS, server)
        assert len(texts(spec, server)) == 40
        return
    with pytest.raises(OutputError, match="is gone"):
        fill(spec, ROWS, server)


def test_a_place_that_cannot_be_written_is_told(spec, server, tmp_path):
    kind = spec.partition(":")[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        fill(f"{kind}:{tmp_path}/file/index", ROWS, server)
    with pytest.raises(OutputError, match="file"):
        fill(f"{kind}:{tmp_path}/file", ROWS, server)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Qdrant leaves its lock file open
def test_a_qdrant_folder_that_another_process_has_open_is_told(server, tmp_path):
    spec = f"qdrant:{tmp_path / 'index'}"
    fill(spec, ROWS, server)
    code = (
        "import sys, qdrant_client\n"
        f"client = qdrant_client.QdrantClient(path={str(tmp_path / 'index')!r})\n"
        "print('open', flush=True)\nsys.stdin.read()\nclient.close()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(OutputError, match="open in another process"):
            fill(spec, ROWS, server)
        with pytest.raises(OutputError, match="open in another process"):
            search("x", spec, base_url=server.base_url)
    finally:
        process.communicate()
    assert fill(spec, ROWS, server).skipped == 40


def test_a_faiss_folder_with_other_files_is_left_alone(server, tmp_path):
    spec = f"faiss:{tmp_path / 'index'}"
    fill(spec, ROWS, server)
    (tmp_path / "index" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="notes.txt"):
        fill(spec, ROWS[:5], server)


def test_a_faiss_index_that_was_not_put_in_place_is_put_back(server, tmp_path):
    spec = f"faiss:{tmp_path / 'index'}"
    fill(spec, ROWS, server)
    (tmp_path / "index").rename(tmp_path / ".index.old")
    (tmp_path / ".index.new").mkdir()
    fill(spec, ROWS, server)
    assert len(texts(spec, server)) == 40
    assert not list(tmp_path.glob(".index*"))


def test_search_refuses_what_was_not_filled_or_filled_otherwise(spec, server, tmp_path):
    with pytest.raises(ConfigurationError, match="no collection"):
        search("x", spec, base_url=server.base_url)
    assert not (tmp_path / "index").exists()
    fill(spec, ROWS, server)
    with pytest.raises(ConfigurationError, match="no collection 'others'|no fingerprint"):  # FAISS has no collections
        search("x", spec, collection="others", base_url=server.base_url)
    with pytest.raises(FingerprintMismatchError):
        search("x", spec, base_url=server.base_url, query_prompt="query: ")
    with Embedder(base_url=server.base_url, query_prompt="query: ") as embedder:
        with pytest.raises(FingerprintMismatchError):
            search("x", spec, embedder=embedder)
    with Embedder(base_url=server.base_url) as embedder:
        assert search("text number 1", spec, k=1, embedder=embedder)[0].id == "d1"
        with pytest.raises(ConfigurationError, match="model"):
            search("x", spec, embedder=embedder, model="m")
    with pytest.raises(ConfigurationError, match="at least 1"):
        search("x", spec, k=0, base_url=server.base_url)
    shutil.rmtree(tmp_path / "index.job")
    with pytest.raises(ConfigurationError, match="no fingerprint"):
        search("x", spec, base_url=server.base_url)


@pytest.mark.parametrize(
    ("spec", "collection", "told"),
    [
        ("pinecone:x", "documents", "chroma:PATH, qdrant:PATH-OR-URL, lancedb:PATH, faiss:PATH"),
        ("index", "documents", "chroma:PATH"),
        ("chroma:", "documents", "chroma:PATH"),
        ("chroma:http://host", "documents", "no place"),
        ("qdrant:http://user:secret@host:6333", "documents", "QDRANT_API_KEY"),
        ("chroma:x", "", "has a name"),
    ],
)
def test_a_spec_that_is_none_is_told_with_what_is_allowed(spec, collection, told):
    with pytest.raises(ConfigurationError, match=told) as caught:
        store_target(spec, collection)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("chroma", "langchain_chroma", "chroma"),
        ("qdrant", "qdrant_client", "qdrant"),
        ("lancedb", "lancedb", "lancedb"),
        ("faiss", "faiss", "faiss"),
        ("faiss", "pyarrow", "faiss"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, kind, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError) as caught:
        store_target(f"{kind}:x")
    assert f'pip install "vllm-embed[{extra}]"' in str(caught.value)


def test_ledgers_of_servers_and_collections_have_names_of_their_own(monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "a-secret-key")
    server = store_target("qdrant:https://db.example.org:6334", "a b")
    assert str(server.folder) == "db%2Eexample%2Eorg-6334-a%20b.job"
    assert str(server.rejects) == "db%2Eexample%2Eorg-6334-a%20b.rejects.jsonl"
    assert str(store_target("qdrant:http://host").folder) == "host-6333-documents.job"
    assert "a-secret-key" not in repr(server)
    assert 'os.environ.get("QDRANT_API_KEY")' in server.how_to_open["LangChain"]
    assert str(store_target("chroma:x/index").folder) == "x/index.job"
    assert str(store_target("chroma:x/index", "b").folder) == "x/index-b.job"


def test_a_qdrant_server_that_is_not_there_is_told_before_a_text_is_embedded(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="127.0.0.1:9"):
        fill("qdrant:http://127.0.0.1:9", ROWS, server)


def test_importing_jobs_imports_no_framework():
    code = (
        "import sys, vllm_embed.jobs._search\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(names & {'chromadb', 'faiss', 'lancedb', 'langchain_core', 'llama_index', 'qdrant_client'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_vectors_of_any_length_give_cosines(spec, tmp_path):
    """Straight into the sink: the fake server's vectors all have length 1."""
    from vllm_embed.jobs._row import Row

    vectors = np.array([[10, 0, 0, 0], [0.3, 0.3, 0, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]], np.float32)
    store = store_at(spec)
    store.place.folder.mkdir()
    store.open({})
    with contextlib.closing(store):
        state = store.write([Row(f"r{i}", f"t{i}", {}, "rows", i) for i in range(4)], vectors)
        store.finish()
    assert json.loads(json.dumps(state)) == json.loads(json.dumps(store._state()))
    with contextlib.closing(store_at(spec)) as again:
        hits = again.nearest(np.array([3, 0, 0, 0], np.float32), 2)
    assert [hit.id for hit in hits] == ["r0", "r1"]
    np.testing.assert_allclose([hit.score for hit in hits], [1, 0.5**0.5], atol=1e-5)


def test_every_row_is_still_found_after_all_were_written_again(tmp_path):
    """Chroma's index loses some to an upsert."""
    from vllm_embed.jobs._row import Row

    rows = [Row(f"d{i}", f"text {i}", {}, "rows", i) for i in range(3_000)]
    with FakeVLLMServer(dimension=32) as server, Embedder(base_url=server.base_url) as embedder:
        vectors = embedder.embed([row.text for row in rows])
    spec = f"chroma:{tmp_path / 'index'}"
    state = {}
    store_at(spec).place.folder.mkdir()
    for upto in (1_000, 2_000, 3_000):
        with contextlib.closing(store_at(spec)) as store:
            store.open(state)
            for start in range(0, upto, 1_000):
                state = store.write(rows[start : start + 1_000], vectors[start : start + 1_000])
    with contextlib.closing(store_at(spec)) as store:
        assert len({hit.id for hit in store.nearest(vectors[0], len(rows))}) == len(rows)
