"""Packages that come with an extra."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needs"]


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of an extra: a missing package becomes an error with the `pip install`.

    Raises:
        ConfigurationError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("vllm_embed"):
            raise
        raise ConfigurationError(f'{exc.name} is not installed: pip install "vllm-embed[{extra}]"') from exc
