"""May this process start an engine, which starts a process of its own? Known before it is tried."""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
from pathlib import Path

from vllm_embed.errors import EngineError

__all__ = ["check", "spawns"]

_HERE = "or set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, which keeps the engine in this process"


def spawns() -> bool:
    """Whether vLLM runs its core in a process of its own; it does unless it is told not to."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0"


def check() -> None:
    """Refuse where vLLM could not start its core, or would run the caller's script a second time.

    Raises:
        EngineError: saying what to do.
    """
    if not spawns():
        return
    process = multiprocessing.current_process()
    if process.daemon:
        raise EngineError(
            f"{process.name} is a daemonic process, such as a worker of multiprocessing.Pool or of LlamaIndex's "
            "IngestionPipeline(num_workers=...); it may not start the process that vLLM's engine needs, and one engine "
            "for each worker would share no batches. Embed in the main process (num_workers=None; one engine keeps the "
            "hardware busy), let workers use a server (vllm-embed serve), "
            f"{_HERE}"
        )
    if getattr(process, "_inheriting", False):  # a spawned child that is importing the main module
        raise EngineError(_guard("this script"))
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn") == "spawn" and (line := unguarded()) is not None:
        raise EngineError(_guard(line))


def _guard(where: str) -> str:
    return (
        f"vLLM's engine is a spawned process, which imports the main script again; {where} would then run a second "
        'time. Put what the script does under `if __name__ == "__main__":`, ' + _HERE
    )


def unguarded() -> str | None:
    """File and line of the main script that a spawned process would run again; None where it would not.

    That is a top-level statement, running now in any thread, outside an `if`. Nothing is run again for `python -c`,
    a notebook, or `python -m package`.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    if main is None or path is None or (spec is not None and spec.name.rpartition(".")[2] == "__main__"):
        return None
    for frame in sys._current_frames().values():  # noqa: SLF001 - the only way to another thread's stack
        at = frame
        while at.f_back is not None and not (at.f_globals is vars(main) and at.f_code.co_name == "<module>"):
            at = at.f_back
        if at.f_globals is vars(main) and at.f_code.co_name == "<module>":
            return _top_level(path, at.f_lineno)
    return None


def _top_level(path: str, line: int) -> str | None:
    try:
        statements = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for statement in statements:
        if statement.lineno <= line <= (statement.end_lineno or line):
            return None if isinstance(statement, ast.If) else f"{Path(path).name}, line {line},"
    return None
