"""Which vector store a spec such as `chroma:index` stands for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote, urlsplit

from vllm_embed.errors import ConfigurationError
from vllm_embed.jobs._store import Place
from vllm_embed.jobs._targets import Target

if TYPE_CHECKING:
    from vllm_embed.jobs._store import Store

__all__ = ["DEFAULT_COLLECTION", "store_at", "store_target"]

DEFAULT_COLLECTION: Final = "documents"
_QDRANT_PORT: Final = 6333


class _Kind(NamedTuple):
    where: str
    sink: str
    """Its class, in the module `_stores_<kind>`."""
    needs: tuple[str, ...]


_KINDS: Final = {
    "chroma": _Kind("PATH", "ChromaStore", ("chromadb", "langchain_chroma")),
    "qdrant": _Kind("PATH-OR-URL", "QdrantStore", ("qdrant_client", "langchain_qdrant")),
    "lancedb": _Kind("PATH", "LanceDBStore", ("lancedb", "langchain_community")),
    "faiss": _Kind("PATH", "FAISSStore", ("faiss", "langchain_community", "pyarrow")),
}
_ALLOWED: Final = ", ".join(f"{name}:{kind.where}" for name, kind in _KINDS.items())


def store_target(spec: str, collection: str = DEFAULT_COLLECTION) -> Target:
    """The sink of a vector store.

    The ledger and the fingerprint lie in `PATH.job`, for another collection than "documents" in
    `PATH-<collection>.job`; for a Qdrant server in the current folder, named by host, port and collection. A server's
    key is the environment's QDRANT_API_KEY; it is stored nowhere.

    Args:
        spec: `chroma:PATH`, `qdrant:PATH-OR-URL`, `lancedb:PATH` or `faiss:PATH`.
        collection: name of the collection or table. FAISS has none: it becomes a part of the ledger's name only.

    Raises:
        ConfigurationError: no such kind, no path, or a package is missing.
    """
    store, path = _placed(spec, collection)

    def exists() -> bool:
        with contextlib.closing(store_at(spec, collection)) as found, found.reported():
            return found.exists()

    def clear() -> None:
        with contextlib.closing(store_at(spec, collection)) as found, found.reported():
            if found.exists():
                found.clear()

    target = Target(store.place.name, path, lambda: store_at(spec, collection), exists, clear, {})
    return target._replace(how_to_open=store.how_to_open(target.fingerprint.as_posix()))


def store_at(spec: str, collection: str = DEFAULT_COLLECTION) -> Store:
    """A store that nothing was opened of yet."""
    return _placed(spec, collection)[0]


def _placed(spec: str, collection: str) -> tuple[Store, Path]:
    """A store, and the path beside which its ledger lies."""
    name, _, address = spec.partition(":")
    kind = _KINDS.get(name)
    if kind is None:
        raise ConfigurationError(f"{spec!r}: a store is one of {_ALLOWED}")
    if not address:
        raise ConfigurationError(f"{spec!r} names no place: {name}:{kind.where}")
    if not collection:
        raise ConfigurationError('a collection has a name, such as "documents"')
    for package in kind.needs:
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(f'{name} needs the package {package}: pip install "vllm-embed[{name}]"')
    if name == "qdrant" and re.match(r"https?://", address):
        path, place = _server(address, collection), None
    elif "://" in address:
        raise ConfigurationError(f"{name}:{kind.where}: {address.partition('://')[0]!r} is no place that it can be")
    else:
        path = place = Path(address).expanduser()
        address = str(path)
        if collection != DEFAULT_COLLECTION:
            path = path.with_name(f"{path.name}-{_plain(collection)}")
    folder = path.with_name(f"{path.name}.job")
    module = importlib.import_module(f"vllm_embed.jobs._stores_{name}")
    store: Store = getattr(module, kind.sink)(Place(name, address, place, collection, folder))
    return store, path


def _server(url: str, collection: str) -> Path:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ConfigurationError("a Qdrant URL holds no user or password: QDRANT_API_KEY takes the key")
    if not parts.hostname:
        raise ConfigurationError('a Qdrant URL looks like "http://localhost:6333"')
    return Path(f"{_plain(parts.hostname)}-{parts.port or _QDRANT_PORT}-{_plain(collection)}")


def _plain(name: str) -> str:
    """For a file name; two names never become one."""
    return quote(name, safe="").replace(".", "%2E")
