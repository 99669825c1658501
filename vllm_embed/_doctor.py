"""Look at a server, and say whether anything about it gives wrong vectors."""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import numpy as np

from vllm_embed import _doctor_reference, errors
from vllm_embed._address import without
from vllm_embed._doctor_checks import CHECKS, SAME
from vllm_embed._doctor_patient import LEVELS, Finding, Patient
from vllm_embed._shape import unit
from vllm_embed.fingerprint import CANARIES

if TYPE_CHECKING:
    from vllm_embed._doctor_reference import Reference
    from vllm_embed.errors import VLLMEmbedError
    from vllm_embed.settings import Settings

__all__ = ["Report", "examine", "misuse"]

_BLOCKED: Final[tuple[tuple[type[VLLMEmbedError], str, str], ...]] = (
    (errors.ServerTimeoutError, "too-slow", "See what keeps the server busy, or give it longer with --timeout."),
    (errors.ServerUnreachableError, "unreachable", "Start the server, or give its address with --base-url."),
    (errors.AuthenticationError, "key", "Give the server's key with --api-key or in VLLM_API_KEY."),
    (
        errors.ModelNotFoundError,
        "model",
        "Start an embedding model with --runner pooling, or name the one that is served with --model.",
    ),
    (errors.ConfigurationError, "options", "Give the option that is named another value."),
    (errors.BadReplyError, "not-vllm", "Give vLLM's own address with --base-url; something else answers at this one."),
    (errors.VLLMEmbedError, "refused", "See the server's own log for why it refuses."),
)
"""What keeps the doctor from looking, the finding's id and its fix; the first that fits."""
_TLS_S = 2.0


@dataclass(frozen=True)
class Report:
    """What was found."""

    verdict: str
    """"same vectors", "re-index needed" or "broken" beside a reference; else "sound", "wrong vectors", "broken" or
    "could not look"."""
    findings: tuple[Finding, ...]
    """Ranked."""

    @property
    def status(self) -> int:
        """Exit status: 0 sound, 1 vectors are wrong, 2 could not look."""
        levels = {finding.level for finding in self.findings}
        return 1 if "wrong" in levels else 2 if "blocked" in levels else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": self.verdict, "findings": [asdict(finding) for finding in self.findings]}


def examine(settings: Settings, reference: str | None = None) -> Report:
    """Look at every replica, at the first that answers with all checks, and compare it with the reference.

    Args:
        settings: as the application has them.
        reference: a sentence-transformers model or folder, or a saved fingerprint's .json.
    """
    findings: list[Finding] = []
    verdict, known, first = "", None, None
    if reference is not None:
        try:
            known = _doctor_reference.load(reference)
        except errors.ConfigurationError as exc:
            told = Finding(
                "reference", "blocked", str(exc), "Name a model, a folder or a fingerprint that can be read."
            )
            return _report("", [told])
    urls = [settings.base_url] if isinstance(settings.base_url, str) else settings.base_url
    for url in urls:
        one = settings.model_copy(update={"base_url": url})
        try:
            with Patient(one) as patient:
                if first is None:
                    verdict = _look(patient, known, findings)
                    first = patient.embedder.embed(CANARIES, prompt="")
                else:
                    findings += _replica(patient, first)
        except errors.VLLMEmbedError as exc:
            findings.append(_stopped(exc, one))
    secret = settings.api_key.get_secret_value() if settings.api_key else ""
    return _report(verdict, [_shown(finding, secret) for finding in findings])


def misuse(exc: errors.ConfigurationError) -> Report:
    """What is told of options with which nothing can be looked at."""
    name, fix = next((name, fix) for kind, name, fix in _BLOCKED if isinstance(exc, kind))
    return _report("", [Finding(name, "blocked", str(exc), fix)])


def _look(patient: Patient, reference: Reference | None, findings: list[Finding]) -> str:
    """Run every check; findings are kept when a later check ends it all."""
    for check in CHECKS:
        try:
            findings += check(patient)
        except (errors.ServerTimeoutError, errors.ServerUnreachableError):
            raise
        except errors.VLLMEmbedError as exc:
            if isinstance(exc, errors.BadReplyError) and exc.indexes:
                raise
            name = check.__name__.replace("_", "-")
            findings.append(Finding(name, "warning", f"cannot be checked: {exc}", "See the server's log for why."))
    if reference is None:
        return _look_at_own(patient, findings)
    verdict, found = _doctor_reference.compare(patient, reference)
    findings += found
    return verdict


def _look_at_own(patient: Patient, findings: list[Finding]) -> str:
    """Beside the model's own files, where they are here: a server's --pooler-config shows in nothing else."""
    folder = _doctor_reference.own_folder(patient)
    if folder is None:
        return ""
    try:
        verdict, found = _doctor_reference.compare(patient, _doctor_reference.load(str(folder)))
    except errors.ConfigurationError as exc:
        findings.append(Finding("reference", "info", f"the model's own files cannot be compared with: {exc}"))
        return ""
    findings += [
        replace(one, text=f"reference: the model's own files, by sentence-transformers; {one.text}") for one in found
    ]
    return "" if verdict == "same vectors" else verdict


def _replica(patient: Patient, first: Any) -> list[Finding]:
    """A further replica gives the first one's vectors."""
    vectors = patient.embedder.embed(CANARIES, prompt="")
    same_width = vectors.shape == first.shape
    least = float(np.sum(unit(vectors) * unit(first), axis=1).min()) if same_width else None
    url = patient.address.url
    if least is not None and least >= SAME:
        return [Finding("replica", "info", f"{url}: the first replica's vectors, least cosine {least:.6f}")]
    told = f"least cosine {least:.4f}" if least is not None else f"{vectors.shape[1]} dimensions"
    fix = "Start all replicas with the same model and the same flags."
    return [Finding("replica", "wrong", f"{url}: not the first replica's vectors, {told}", fix)]


def _stopped(exc: VLLMEmbedError, settings: Settings) -> Finding:
    url = str(settings.base_url)
    if isinstance(exc, errors.BadReplyError) and exc.indexes:
        fix = "Start vLLM with --dtype float32 or bfloat16; float16 overflows in some models."
        return Finding("broken", "wrong", f"the vectors are broken: {exc}", fix)
    if url.startswith("http://") and not isinstance(exc, errors.AuthenticationError) and _speaks_tls(url):
        plain = exc.endpoint or "the server"
        return Finding("tls", "blocked", f"{plain}: this port speaks TLS", "Write https:// in --base-url.")
    name, fix = next((name, fix) for kind, name, fix in _BLOCKED if isinstance(exc, kind))
    text = str(exc)
    if exc.endpoint and exc.endpoint not in text:
        text = f"{exc.endpoint}: {text}"
    return Finding(name, "blocked", text, fix)


def _speaks_tls(url: str) -> bool:
    parts = urlsplit(url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError):
        address = parts.hostname or "", parts.port or 80
        with socket.create_connection(address, _TLS_S) as raw, context.wrap_socket(raw):
            return True
    return False


def _shown(finding: Finding, secret: str) -> Finding:
    hidden = (secret,) if secret else ()
    return Finding(finding.id, finding.level, without(finding.text, hidden), finding.fix)


def _report(verdict: str, findings: list[Finding]) -> Report:
    ranked = tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))
    levels = {finding.level for finding in ranked}
    if any(finding.id == "broken" for finding in ranked):
        verdict = "broken"
    elif not verdict:
        verdict = "wrong vectors" if "wrong" in levels else "could not look" if "blocked" in levels else "sound"
    return Report(verdict, ranked)
