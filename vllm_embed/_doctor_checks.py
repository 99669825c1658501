"""The doctor's checks of one server: each looks at one thing and yields what it found."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vllm_embed import _prompts, _wire
from vllm_embed._doctor_patient import Finding
from vllm_embed._doctor_text import text_intact
from vllm_embed._shape import is_unit, unit
from vllm_embed.commands import _foreign_ids
from vllm_embed.errors import (
    ConfigurationError,
    InputTooLongError,
    ServerTimeoutError,
    ServerUnreachableError,
    VLLMEmbedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_embed._doctor_patient import Patient

__all__ = ["CHECKS", "SAME"]

SAME: Final = 0.9999
"""Least cosine of vectors that may stand beside each other, as in `Fingerprint`."""

_POOLINGS = {"pooling_mode_cls_token": "CLS", "pooling_mode_mean_tokens": "MEAN", "pooling_mode_lasttoken": "LAST"}
_SHORT = "Document {} says that the train to the coast leaves at {} past nine."
_QUERIES, _MOST_TEXTS, _PATIENCE_S = 10, 512, 20.0


def served(patient: Patient) -> Iterator[Finding]:
    """Which model, from where, which vLLM; whether the key matters."""
    info = patient.info
    yield Finding(
        "server",
        "info",
        f"{patient.address.url}: vLLM {info.version or '(version hidden)'} serves {info.model!r}"
        f"{f' from {info.root}' if info.root and info.root != info.model else ''}, {info.dimension} dimensions",
    )
    unasked = "no key was sent, and the server asked for none"
    yield Finding("key", "info", "the key is accepted" if patient.settings.api_key else unasked)


def vectors_differ(patient: Patient) -> Iterator[Finding]:
    """Different texts have different vectors, and none is zero."""
    units = unit(patient.vectors)
    zero = int((np.linalg.norm(patient.vectors, axis=1) == 0).sum())
    cosines = (units @ units.T)[np.triu_indices(len(units), 1)]
    if zero or float(np.median(cosines)) > SAME:
        yield Finding(
            "broken",
            "wrong",
            f"the vectors are broken: {zero} of {len(units)} are zero, the median cosine of different texts is "
            f"{float(np.median(cosines)):.4f}",
            "Start vLLM with --dtype float32, and check that the weights are those of the model.",
        )


def pooling(patient: Patient) -> Iterator[Finding]:
    """Unit length and pooling beside what the model's own config says."""
    modules = patient.model_json("modules.json")
    kinds = _kinds(modules)
    lengths = np.linalg.norm(patient.vectors, axis=1)
    seen = "of unit length" if is_unit(patient.vectors) else f"of length {lengths.min():.3g} to {lengths.max():.3g}"
    says = "Normalize" in kinds if kinds else None
    if patient.settings.normalize is None and says is not None and says != is_unit(patient.vectors):
        other = "has a Normalize module" if says else "has no Normalize module, so sentence-transformers gives raw ones"
        yield Finding(
            "normalize",
            "wrong" if says else "warning",
            f"vectors are {seen}, but the model's modules.json {other}; cosine search does not care, dot product does",
            f"Set normalize={says}, or start vLLM with --pooler-config '{{\"use_activation\": {str(says).lower()}}}'.",
        )
    elif is_unit(patient.vectors):
        yield Finding("normalize", "info", f"vectors are {seen}{', as the model says' if says else ''}")
    else:
        yield Finding(
            "normalize",
            "info" if says is False else "warning",
            f"vectors are {seen}{', as the model says' if says is False else ''}",
            "Set normalize=True where the store compares by dot product or Euclidean distance.",
        )
    yield from _pooling_says(patient, kinds)


def _kinds(modules: Any) -> dict[str, str]:
    """Short names of a model's modules and their folders."""
    try:
        return {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules or ()}
    except (KeyError, TypeError):
        return {}


def _pooling_says(patient: Patient, kinds: dict[str, str]) -> Iterator[Finding]:
    config = patient.model_json(f"{kinds['Pooling']}/config.json") if kinds.get("Pooling") else None
    if not isinstance(config, dict):
        yield Finding(
            "pooling",
            "info",
            f"the pooling cannot be judged: no 1_Pooling/config.json of {patient.info.root or patient.info.model} here",
            "Compare with --reference MODEL.",
        )
        return
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if isinstance(config.get("pooling_mode"), str):  # as sentence-transformers 6 writes it
        modes = [
            {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}.get(
                config["pooling_mode"], f"pooling_mode_{config['pooling_mode']}"
            )
        ]
    told = " and ".join(_POOLINGS.get(mode, mode.removeprefix("pooling_mode_")) for mode in modes) or "none"
    width = config.get("word_embedding_dimension", config.get("embedding_dimension"))
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        yield Finding(
            "pooling",
            "warning",
            f"the model pools by {told}; vLLM 0.32 knows {', '.join(_POOLINGS.values())} only",
            "Compare with --reference MODEL before you trust the vectors.",
        )
    elif isinstance(width, int) and "Dense" not in kinds and width != patient.info.dimension:
        yield Finding(
            "pooling",
            "wrong",
            f"the model's own config gives {width} dimensions, the server {patient.info.dimension}",
            "Start vLLM without a --pooler-config and --hf-overrides that change the width, on the same model.",
        )
    else:
        chain = " > ".join(kinds)
        yield Finding(
            "pooling",
            "info",
            f"the model's own config says {told} pooling ({chain}); a reference shows whether it is so",
        )


def limit(patient: Patient) -> Iterator[Finding]:
    """The longest text, and what happens past it."""
    most = patient.info.max_model_len
    if most is None:
        yield Finding("limit", "info", "the server does not tell its longest text")
        return
    own = patient.model_json("sentence_bert_config.json")
    cut = own.get("max_seq_length") if isinstance(own, dict) else None
    more = f"; sentence-transformers cuts this model's texts at {cut}" if cut and cut != most else ""
    try:
        patient.embedder.embed(["a " * (most + 8)], prompt="")
    except InputTooLongError:
        fix = 'long_text="truncate" or "chunk" embeds longer texts.'
        yield Finding("limit", "info", f"{most} tokens a text; a longer one is refused by name{more}", fix)
        return
    yield Finding(
        "limit",
        "wrong",
        f"{most} tokens a text, but a longer one gets a vector without a word: it was cut, or the limit is another",
        "Take the truncation out of the gateway or server, and choose long_text= yourself.",
    )


def matryoshka(patient: Patient) -> Iterator[Finding]:
    """Whether `dimensions` is taken, and whether what comes is the beginning of the whole vector."""
    native, asked = patient.info.dimension, patient.dimensions
    width = asked or max(1, native // 2)
    if width > native:
        fix = f"Ask for at most {native} dimensions."
        yield Finding("matryoshka", "wrong", f"dimensions={width}, but the model has {native}", fix)
        return
    if width == native:
        return
    texts = list(patient.texts[:4])
    try:
        cut, _ = patient.embed_raw(input=texts, encoding_format="float", dimensions=width)
    except (ServerTimeoutError, ServerUnreachableError):
        raise
    except VLLMEmbedError as exc:
        refused = _wire.refuses_dimensions(exc)
        yield Finding(
            "matryoshka",
            "wrong" if asked else "info",
            f"dimensions={width} is refused{', the model is served as not Matryoshka' if refused else f': {exc}'}",
            "If the model is Matryoshka, start vLLM with --hf-overrides '{\"is_matryoshka\": true}', or set "
            'dimensions_fallback="client"; if it is not, leave dimensions out.',
        )
        return
    if cut.shape[1] == width and float(_cosines(cut, patient.vectors[:4, :width]).min()) >= SAME:
        yield Finding("matryoshka", "info", f"dimensions={width} is served, as the beginning of the whole vector")
    else:
        yield Finding(
            "matryoshka",
            "wrong" if asked else "warning",
            f"dimensions={width} is answered by {cut.shape[1]} numbers that are not the beginning of the whole vector",
            "Leave dimensions out, or set it on the server; a gateway may drop the field.",
        )


def _cosines(ours: Any, theirs: Any) -> Any:
    return np.sum(unit(ours) * unit(theirs), axis=1)


def prompts(patient: Patient) -> Iterator[Finding]:
    """Prompts that the model has and this setup does not send."""
    given = patient.settings.query_prompt, patient.settings.document_prompt
    try:
        own = _prompts.find(patient.info.root, patient.info.model)
    except ConfigurationError:
        where = patient.model_path("config_sentence_transformers.json")
        told = f"the model has none in {where}" if where else f"there is no config of {patient.info.root} here"
        if "auto" in given:
            text = f'a prompt is "auto", but {told}'
            yield Finding("prompts", "wrong", text, "Give the prompt itself, or leave it out for none.")
        else:
            yield Finding("prompts", "info", told if where else f"whether the model has any cannot be seen: {told}")
        return
    for kind, ours, theirs in zip(own._fields, given, own, strict=True):
        if ours == "auto" or (ours or "") == theirs:
            continue
        yield Finding(
            f"{kind}-prompt",
            "wrong" if ours is None else "warning",
            f"the model was trained with {theirs!r} before a {kind}, this setup sends {ours or 'nothing'!r}",
            f'Set {kind}_prompt="auto" (--{kind}-prompt auto), here and wherever the index is made.',
        )


def encodings(patient: Patient) -> Iterator[Finding]:
    """Float and base64 replies hold the same vectors."""
    texts = list(patient.texts[:4])
    floats, _ = patient.embed_raw(input=texts, encoding_format="float")
    packed, _ = patient.embed_raw(input=texts, encoding_format="base64", endianness="little")
    if floats.shape == packed.shape and np.allclose(floats, packed, rtol=1e-3, atol=1e-5):
        yield Finding("encodings", "info", "float and base64 replies agree")
        return
    yield Finding(
        "encodings",
        "wrong",
        "float and base64 replies differ: the bytes are in another order or type than little-endian float32",
        "Take out whatever rewrites replies between here and vLLM, or update vLLM.",
    )


def foreign_ids(patient: Patient) -> Iterator[Finding]:
    """What LangChain's OpenAIEmbeddings, as it comes, would have made this model read."""
    text = next(iter(_foreign_ids.RECORDED))
    ids = _foreign_ids.ids_of([text], None)[text]
    read = _foreign_ids.read(patient.post(f"{patient.address.root}/detokenize", tokens=ids))
    answer = patient.post(f"{patient.address.url}/embeddings", input=[ids])
    came = _foreign_ids.outcome(answer, patient.embedder.embed([text], prompt="")[0], patient.http.secrets)
    yield Finding(
        "tiktoken",
        "info",
        f"OpenAIEmbeddings as it comes sends tiktoken's ids: for {text!r} this model would read {read!r}, "
        f"and what comes is {came}",
        "Text is sent as text here; elsewhere set check_embedding_ctx_length=False.",
    )


def speed(patient: Patient) -> Iterator[Finding]:
    """The median of single queries, and many short texts at once; alone and together give the same vectors."""
    taken, alone = [], []
    for text in (texts := patient.texts[:_QUERIES]):
        start = time.perf_counter()
        alone.append(patient.embedder.embed([text], kind="query", prompt="")[0])
        taken.append(time.perf_counter() - start)
    worst = float(_cosines(np.stack(alone), patient.vectors[: len(texts)]).min())
    if not worst >= SAME:
        yield Finding(
            "batches",
            "wrong",
            f"a text alone and the same text among others get different vectors: least cosine {worst:.4f}",
            "Start vLLM with --dtype float32; if that does not mend it, report it to vLLM.",
        )
    median = float(np.median(taken))
    count = int(np.clip(_PATIENCE_S / median, 16, _MOST_TEXTS))
    start = time.perf_counter()
    patient.embedder.embed([_SHORT.format(n, n % 60) for n in range(count)], prompt="")
    rate = count / (time.perf_counter() - start)
    yield Finding(
        "speed",
        "info",
        f"one query {median * 1e3:.1f} ms (median of {len(texts)}); {rate:,.0f} short texts/s (one call of {count})",
    )


CHECKS: Final[tuple[Callable[[Patient], Iterator[Finding]], ...]] = (
    *(served, text_intact, vectors_differ, pooling, limit),
    *(matryoshka, prompts, encodings, foreign_ids, speed),
)
"""In the order in which they run; findings are ranked afterwards."""
