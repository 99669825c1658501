"""A model's own prompts, from the `config_sentence_transformers.json` that came with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from vllm_embed.errors import ConfigurationError

__all__ = ["Prompts", "find", "model_file"]

_FILE = "config_sentence_transformers.json"
_QUERY = ("query",)
_DOCUMENT = ("document", "passage", "corpus")
"""Names that encode_query and encode_document of sentence-transformers 5 and 6 look for, in this order."""


class Prompts(NamedTuple):
    """What is put before queries and documents; "" is nothing."""

    query: str
    document: str


def find(*names: str | None) -> Prompts:
    """The prompts of the first name that has any.

    Args:
        *names: folders or hub ids: the model's name, its `root` from `/v1/models`.

    Raises:
        ConfigurationError: none of them has prompts; says where it looked.
    """
    looked: list[str] = []
    for name in dict.fromkeys(filter(None, names)):
        path, places = _locate(name, _FILE)
        looked += places
        if path is not None and (prompts := _read(path)) is not None:
            return prompts
    raise ConfigurationError(
        f'query_prompt or document_prompt is "auto", but no prompts were found; looked at {"; ".join(looked)}. '
        'Give the prompt itself, such as query_prompt="query: ", or "" for none'
    )


def model_file(name: str, file: str) -> Path | None:
    """A file of a model that is a folder here or lies in the hub's cache."""
    return _locate(name, file)[0]


def _locate(name: str, file: str) -> tuple[Path | None, list[str]]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        path = folder / file
        return (path, [str(path)]) if path.is_file() else (None, [f"{path} (missing)"])
    cache = _hub_cache() / f"models--{name.replace('/', '--')}"
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        return None, [f"{folder} (no such folder here)"]
    snapshots = cache / "snapshots"
    revisions = [cache / "refs" / "main"]
    newest = [snapshots / revision.read_text().strip() for revision in revisions if revision.is_file()]
    newest += sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = next((snapshot / file for snapshot in newest if (snapshot / file).is_file()), None)
    return found, [str(found or f"{cache} (the hub's cache: nothing)")]


def _hub_cache() -> Path:
    if explicit := os.environ.get("HF_HUB_CACHE"):
        return Path(explicit)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _read(path: Path) -> Prompts | None:
    try:
        config = json.loads(path.read_text("utf8"))
        prompts = {str(name): str(prompt) for name, prompt in (config.get("prompts") or {}).items()}
        default = prompts.get(config.get("default_prompt_name") or "", "")
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        raise ConfigurationError(f"{path} cannot be read as a sentence-transformers config: {exc}") from exc
    if not prompts:
        return None
    return Prompts(_first(prompts, _QUERY, default), _first(prompts, _DOCUMENT, default))


def _first(prompts: dict[str, str], names: tuple[str, ...], default: str) -> str:
    return next((prompts[name] for name in names if name in prompts), default)
