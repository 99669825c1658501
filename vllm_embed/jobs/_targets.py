"""Which sink an output stands for, and where its ledger and fingerprint lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_embed._extras import needs
from vllm_embed.errors import ConfigurationError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from vllm_embed.jobs._inputs import Source
    from vllm_embed.jobs._sink import Sink

__all__ = ["Target", "file_target", "refuse_own"]


class Target(NamedTuple):
    """An output."""

    name: str
    """As it is told."""
    path: Path
    """Beside it lie the ledger's folder and the rejects."""
    make: Callable[[], Sink]
    exists: Callable[[], bool]
    clear: Callable[[], None]
    """Remove all that is there."""
    how_to_open: dict[str, str]

    @property
    def folder(self) -> Path:
        """Holds the ledger and the fingerprint."""
        return self.path.with_name(f"{self.path.name}.job")

    @property
    def rejects(self) -> Path:
        """Unless another file is named."""
        return self.path.with_suffix(".rejects.jsonl")

    @property
    def fingerprint(self) -> Path:
        """For `expect=`."""
        return self.folder / "fingerprint.json"


def file_target(output: str | os.PathLike[str]) -> Target:
    """The sink of a file or, for Parquet, a folder; by its ending.

    Raises:
        ConfigurationError: another ending.
    """
    path = Path(output).expanduser()
    form = path.suffix.lower()
    if form not in _OPENING:
        raise ConfigurationError(
            f"{str(output)!r}: its ending chooses the format: .parquet (a folder of files), .jsonl or .npy"
        )
    files = [path, *([path.with_suffix(".ids.jsonl")] if form == ".npy" else [])]

    def make() -> Sink:
        if form == ".parquet":
            with needs("jobs"):
                from vllm_embed.jobs._parquet import ParquetSink  # noqa: PLC0415 - extra

            return ParquetSink(path)
        from vllm_embed.jobs._lines import JSONLinesSink, NumpySink  # noqa: PLC0415 - beside the other

        return JSONLinesSink(path) if form == ".jsonl" else NumpySink(path)

    def exists() -> bool:
        return any(file.is_file() or (file.is_dir() and any(file.iterdir())) for file in files)

    return Target(str(output), path, make, exists, lambda: remove(*files), {"Python": _OPENING[form].format(path)})


def refuse_own(sources: Sequence[Source], target: Target, rejects: str | os.PathLike[str] | None) -> None:
    """Look that no input is a file of the output, as one that a glob matched may be.

    Raises:
        ConfigurationError: one is.
    """
    files = [target.path, target.folder, Path(rejects or target.rejects)]
    if target.path.suffix.lower() == ".npy":
        files.append(target.path.with_suffix(".ids.jsonl"))
    own = {file.resolve() for file in files}
    for name, path in ((source.name, source.path.resolve()) for source in sources if source.path):
        if not own.isdisjoint([path, *path.parents]):
            raise ConfigurationError(f"{name} is an input and belongs to the output {target.name}: choose another")


def remove(*paths: Path) -> None:
    """Files and folders, whether there or not."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


_OPENING = {
    ".parquet": 'import pandas\n\nrows = pandas.read_parquet("{}")',
    ".jsonl": 'import pandas\n\nrows = pandas.read_json("{}", lines=True)',
    ".npy": 'import numpy\n\nvectors = numpy.load("{}")',
}
