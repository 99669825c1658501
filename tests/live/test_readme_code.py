"""Every Python block of the README runs, in order, against real vLLM."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf8"), re.MULTILINE | re.DOTALL)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # one block loads vLLM into this process, and it warns
def test_the_readmes_code_runs(
    live_server, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", live_server.api_key)
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__main__"}
    for block in BLOCKS:
        code = block.replace('"http://localhost:8000/v1"', repr(live_server.base_url))
        code = code.replace('"BAAI/bge-m3"', repr(live_server.model)).replace(
            '"token-abc123"', repr(live_server.api_key)
        )
        code = code.replace('"BAAI/bge-large-en-v1.5"', repr(live_server.folder))
        exec(compile(code, "README.md", "exec"), space)
    shown = capsys.readouterr().out
    assert shown.startswith("Saturn has rings.\nSaturn has rings.\n")
    assert "(1,) {1: '" in shown
