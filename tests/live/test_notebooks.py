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


def test_there_are_two_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["01_langchain_rag.ipynb", "02_llamaindex_rag.ipynb"]


@each
def test_a_notebook_is_short_and_stored_with_the_output_of_every_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert 8 <= len(notebook.cells) <= 12
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert all(cell.outputs for cell in code(notebook))
    assert "vllm serve" in notebook.cells[0].source
    assert not A_PATH.search(printed(notebook))


@pytest.mark.live
@each
def test_a_notebook_runs_and_finds_what_it_is_stored_with(path, live_server, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_BASE_URL", live_server.base_url)
    monkeypatch.setenv("VLLM_API_KEY", live_server.api_key or "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    NotebookClient(run, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    sources, scores = answers(run)
    assert len(sources) == 6
    assert sources == answers(stored)[0]
    assert scores == pytest.approx(answers(stored)[1], abs=0.005)
    assert "the cosine of their vectors is 1.000000" in printed(run)
    assert "at fault: (1,)" in printed(run)
