"""The notebooks run on real vLLM from the first cell to the last, and are stored with their outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parents[2].joinpath("notebooks").glob("*.ipynb"))
A_PATH = re.compile(r"(?:^|[\s'\"(=])/\w+/|[A-Za-z]:\\|site-packages", re.MULTILINE)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What all the cells print, in order; any other output is a failure, such as an error or a warning on stderr."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert all(output.output_type == "stream" and output.name == "stdout" for output in outputs), outputs
    return "".join(output.text for output in outputs)


def answers(notebook):
    """Sources and scores of the passages found, in order."""
    found = re.findall(r"^  (\d\.\d{3})  (\S+): ", printed(notebook), re.MULTILINE)
    return [source for _, source in found], [float(score) for score, _ in found]


def test_there_are_three_notebooks():
    names = ["01_langchain_rag.ipynb", "02_llamaindex_rag.ipynb", "03_indexing_a_corpus.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names


@each
def test_a_notebook_is_short_and_stored_with_the_output_of_every_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert 8 <= len(notebook.cells) <= 18
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert all(cell.outputs for cell in code(notebook))
    assert "vllm serve" in notebook.cells[0].source
    assert not A_PATH.search(printed(notebook))


@pytest.fixture
def executed(live_server, monkeypatch, tmp_path):
    """Runs a notebook; what it is now, and what it is stored as."""

    def execute(path):
        monkeypatch.setenv("VLLM_BASE_URL", live_server.base_url)
        monkeypatch.setenv("VLLM_API_KEY", live_server.api_key or "")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        run = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(run, timeout=120, kernel_name="python3", resources=resources).execute()
        return run, nbformat.read(path, as_version=4)

    return execute


@pytest.mark.live
@pytest.mark.parametrize("path", NOTEBOOKS[:2], ids=lambda path: path.stem)
def test_a_notebook_runs_and_finds_what_it_is_stored_with(path, executed):
    run, stored = executed(path)
    sources, scores = answers(run)
    assert len(sources) == 6
    assert sources == answers(stored)[0]
    assert scores == pytest.approx(answers(stored)[1], abs=0.005)
    assert "the cosine of their vectors is 1.000000" in printed(run)
    assert "at fault: (1,)" in printed(run)


@pytest.mark.live
def test_the_notebook_on_jobs_runs_and_prints_what_it_is_stored_with(executed):
    run, stored = executed(NOTEBOOKS[2])
    near = re.compile(r"^0\.\d{3}", re.MULTILINE)
    assert near.sub("score", printed(run)) == near.sub("score", printed(stored))
    assert "2000 were there, 3000 are there now" in printed(run)
