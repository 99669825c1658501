"""The server's vectors beside those of sentence-transformers or of a saved fingerprint: one verdict, and the cause."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vllm_embed._doctor_checks import SAME
from vllm_embed._doctor_patient import Finding
from vllm_embed._shape import is_unit, unit
from vllm_embed.embedder import Embedder
from vllm_embed.errors import ConfigurationError
from vllm_embed.fingerprint import CANARIES, Fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from vllm_embed._doctor_patient import Patient

__all__ = ["Reference", "Verdict", "compare", "load", "own_folder"]

Verdict = Literal["same vectors", "re-index needed", "broken"]
Reference = Any
"""A `Fingerprint`, or a `SentenceTransformer`."""

_EXACT = 1 - 1e-6
"""Cosines of float32 on both sides are above."""
_NEAR = 0.99
"""Mean cosine from which another precision is tried as the cause: deep models in bfloat16 gave 0.999."""
_BROKEN = 0.3
"""Mean cosine below which nothing of the reference is left; vectors of tiktoken's ids gave 0.02 to 0.16."""
_TOP = 10
_OWN_BYTES = 1_500_000_000
"""Largest weights that are loaded unasked: 48 short texts through such a model take seconds on a CPU."""
_ANOTHER = "Serve the model and revision that the reference is of, or embed the index anew with this server."


class _Likeness(NamedTuple):
    least: float
    mean: float
    worst: str
    overlap: float

    def __str__(self) -> str:
        return (
            f"cosine least {self.least:.7f}, mean {self.mean:.7f}, worst text {self.worst[:40]!r}; "
            f"nearest neighbours shared {self.overlap:.0%}"
        )


def load(reference: str) -> Reference:
    """The fingerprint in a .json file, or the sentence-transformers model of that name or folder, on the CPU.

    Raises:
        ConfigurationError: it cannot be loaded, or sentence-transformers is not installed.
    """
    if reference.endswith(".json") and not Path(reference).is_dir():
        return Fingerprint.load(reference)
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError as exc:
        raise ConfigurationError(
            f"--reference {reference} needs sentence-transformers: pip install sentence-transformers"
        ) from exc
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet, warnings.catch_warnings():  # progress bars only where somebody looks
            warnings.simplefilter("ignore")
            return library.SentenceTransformer(str(Path(reference).expanduser()), device="cpu")
    except Exception as exc:  # whatever transformers, the hub or torch raise
        first = (str(exc) or type(exc).__name__).strip().splitlines()[0]
        raise ConfigurationError(f"--reference {reference}: sentence-transformers cannot load it: {first}") from exc


def own_folder(patient: Patient) -> Path | None:
    """The served model's folder, where it is on this machine, small enough and sentence-transformers can read it."""
    modules = patient.model_path("modules.json")
    if modules is None or importlib.util.find_spec("sentence_transformers") is None:
        return None
    weights = [file for ending in ("safetensors", "bin") for file in modules.parent.glob(f"*.{ending}")]
    return modules.parent if 0 < sum(file.stat().st_size for file in weights) <= _OWN_BYTES else None


def compare(patient: Patient, reference: Reference) -> tuple[Verdict, list[Finding]]:
    """Judge the server's vectors by the reference's."""
    if isinstance(reference, Fingerprint):
        return _with_fingerprint(patient, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _with_model(patient, reference)


def _with_fingerprint(patient: Patient, expected: Fingerprint) -> tuple[Verdict, list[Finding]]:
    """What this setup leaves open (prompts, dimensions) is taken from the fingerprint; what is given is compared."""
    given = patient.settings
    options: dict[str, Any] = {"unicode": expected.unicode, "long_text": expected.long_text}
    if patient.dimensions:
        options["dimensions"] = patient.dimensions
    for kind in ("query", "document"):
        if getattr(given, f"{kind}_prompt") is None:
            options[f"{kind}_prompt"] = getattr(expected, f"{kind}_prompt")
    with Embedder(given.model_copy(update=options)) as embedder:
        found = embedder.fingerprint()
    result = expected.compare(found)
    alike = None
    if expected.dimension == found.dimension:
        alike = _likeness(CANARIES, found.vectors, expected.vectors)
    if result.same:
        return "same vectors", [Finding("reference", "info", f"same vectors as the fingerprint: {alike}")]
    broken = alike is not None and not alike.mean >= _BROKEN
    told = "; ".join(f"{name}: expected {a}, found {b}" for name, a, b in result.differences)
    noted = "".join(f"; {name} was {a}, is {b}" for name, a, b in result.notes)
    fix = "Serve and prompt as the fingerprint says, or embed the index anew."
    finding = Finding("reference", "wrong", f"not the fingerprint's vectors: {told}{noted}", fix)
    return "broken" if broken else "re-index needed", [finding]


def _with_model(patient: Patient, model: Any) -> tuple[Verdict, list[Finding]]:
    texts, ours = patient.texts, patient.vectors
    theirs = _encode(model, texts)
    if ours.shape != theirs.shape:
        told = f"the server gives {ours.shape[1]} dimensions, the reference {theirs.shape[1]}: another model"
        return "re-index needed", [Finding("reference", "wrong", told, _ANOTHER)]
    alike = _likeness(texts, ours, theirs)
    as_asked = patient.settings.normalize is not None  # then a length is no sign of how the model is served
    lengths = is_unit(ours), is_unit(ours) if as_asked else is_unit(theirs)
    if alike.least >= SAME:
        if lengths[0] != lengths[1]:
            return "re-index needed", [_by_length(alike, lengths[0])]
        if alike.least >= _EXACT:
            return "same vectors", [Finding("reference", "info", f"same vectors as the reference: {alike}")]
        precision = _precision(model, texts, ours, least=alike.least)
        told = f"in another precision ({precision} fits best)" if precision else "but for rounding"
        return "same vectors", [Finding("reference", "info", f"same vectors as the reference {told}: {alike}")]
    return _otherwise(model, texts, ours, alike, [] if lengths[0] == lengths[1] else [_by_length(alike, lengths[0])])


def _otherwise(
    model: Any, texts: Sequence[str], ours: NDArray[np.float32], alike: _Likeness, lengths: list[Finding]
) -> tuple[Verdict, list[Finding]]:
    """Vectors that are not the reference's: the cause, where it is found."""
    if (named := _by_pooling(model, texts, ours, alike)) is not None:
        return "re-index needed", [named, *lengths]
    if not lengths and alike.mean >= _NEAR and (precision := _precision(model, texts, ours, least=SAME)):
        canaries = len(CANARIES)
        return "same vectors", [
            _by_precision(precision, alike, _least(ours[:canaries], _encode(model, texts[:canaries])))
        ]
    broken = not alike.mean >= _BROKEN
    told = "nothing of the reference is in these vectors" if broken else "not the reference's vectors"
    tried = "neither another pooling nor another precision explains it, so it is another model or revision"
    verdict: Verdict = "broken" if broken else "re-index needed"
    return verdict, [Finding("reference", "wrong", f"{told}: {alike}; {tried}", _ANOTHER)]


def _by_precision(precision: str, alike: _Likeness, canaries: float) -> Finding:
    """What another precision means for an index, and for `expect=`, which judges by the canaries alone."""
    told = f"another precision: the reference in {precision} gives the server's vectors; {alike}; expect= "
    if canaries >= SAME:
        told += f"accepts it: least cosine of its own texts {canaries:.6f}, its bound {SAME}"
        fix = "One index may hold both. Start vLLM with --dtype float32 where the last digits matter."
    else:
        told += f"refuses it: least cosine of its own texts {canaries:.6f}, its bound {SAME}"
        fix = (
            "Start vLLM in the reference's precision (--dtype float32); or, where that many shared neighbours do, "
            "keep the index and save this server's fingerprint for expect=."
        )
    return Finding("reference", "warning", told, fix)


def _by_length(alike: _Likeness, served_unit: bool) -> Finding:
    says = "the server normalizes and the reference has no Normalize module" if served_unit else (
        "the reference has a Normalize module and the server does not normalize"
    )  # fmt: skip
    return Finding(
        "reference-normalize",
        "wrong",
        f"the lengths are not the reference's: {says}; {alike}",
        f"Set normalize={not served_unit}, or start vLLM with "
        f"--pooler-config '{{\"use_activation\": {str(not served_unit).lower()}}}'.",
    )


def _by_pooling(model: Any, texts: Sequence[str], ours: NDArray[np.float32], alike: _Likeness) -> Finding | None:
    """The finding that names the server's pooling, where one of sentence-transformers' gives its vectors."""
    variants = dict(_pooled(model, texts))
    served = next((name for name, vectors in variants.items() if _least(ours, vectors) >= SAME), None)
    if served is None:
        return None
    reference = _encode(model, texts)
    own = next((name for name, vectors in variants.items() if _least(reference, vectors) >= SAME), "another pooling")
    flag = (
        f'start vLLM with --pooler-config \'{{"pooling_type": "{own}"}}\', ' if own in ("CLS", "MEAN", "LAST") else ""
    )
    return Finding(
        "reference-pooling",
        "wrong",
        f"the server pools by {served}, the reference by {own}: with {served} the reference gives the server's "
        f"vectors; {alike}",
        f"If the reference is right, {flag}or mend the served model's 1_Pooling/config.json; else index anew.",
    )


def _pooled(model: Any, texts: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What the reference would give with each pooling, its later modules included."""
    torch: Any = importlib.import_module("torch")  # came with sentence-transformers

    modules = list(model)
    place = next((at for at, module in enumerate(modules) if "Pooling" in type(module).__name__), None)
    if place is None:
        return
    tokens = model.encode(list(texts), prompt="", output_value="token_embeddings", show_progress_bar=False)
    poolings: dict[str, Callable[[Any], Any]] = {
        "MEAN": lambda rows: rows.mean(dim=0),
        "CLS": lambda rows: rows[0],
        "LAST": lambda rows: rows[-1],
        "MAX": lambda rows: rows.max(dim=0).values,
    }
    for name, pool in poolings.items():
        with torch.no_grad():
            features = {"sentence_embedding": torch.stack([pool(rows) for rows in tokens])}
            try:
                for module in modules[place + 1 :]:
                    features = module(features)
            except (RuntimeError, KeyError):  # a Dense made for several poolings at once
                continue
        yield name, features["sentence_embedding"].float().numpy()


def _precision(model: Any, texts: Sequence[str], ours: NDArray[np.float32], *, least: float) -> str | None:
    """The precision in which the reference is nearest to the server, and nearer than `least`."""
    torch: Any = importlib.import_module("torch")

    found = None
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        try:
            value = _least(ours, _encode(copy.deepcopy(model).to(dtype), texts))
        except RuntimeError:  # an operation that this CPU lacks
            continue
        if value > least:
            found, least = name, value
    return found


def _encode(model: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    vectors = model.encode(list(texts), prompt="", show_progress_bar=False, convert_to_tensor=True)
    encoded: NDArray[np.float32] = vectors.float().cpu().numpy()
    return encoded


def _least(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.sum(unit(ours) * unit(theirs), axis=1).min()) if ours.shape == theirs.shape else -1.0


def _likeness(texts: Sequence[str], ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> _Likeness:
    a, b = unit(ours), unit(theirs)
    cosines = np.sum(a * b, axis=1)
    top = min(_TOP, len(texts) // 4)
    pairs = zip(_nearest(a, top), _nearest(b, top), strict=True)
    overlap = float(np.mean([len(set(mine) & set(yours)) / top for mine, yours in pairs]))
    return _Likeness(float(cosines.min()), float(cosines.mean()), texts[int(np.argmin(cosines))], overlap)


def _nearest(units: NDArray[np.float32], top: int) -> list[list[int]]:
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    order: list[list[int]] = np.argsort(-cosines, axis=1)[:, :top].tolist()
    return order
