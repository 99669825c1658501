"""Which vectors an embedder gives: its prompts, its fingerprint, its namespace; settled before the first text."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from typing import TYPE_CHECKING

from vllm_embed import _prompts
from vllm_embed._engine_args import deciding
from vllm_embed.errors import ConfigurationError, FingerprintMismatchError
from vllm_embed.fingerprint import CANARIES, Fingerprint

if TYPE_CHECKING:
    from vllm_embed._core import Core
    from vllm_embed.settings import Kind, Settings

__all__ = ["Identity"]

_log = logging.getLogger("vllm_embed")

_DECIDE = ("dimensions", "normalize", "long_text", "blank_text", "unicode", "extra_body")
"""Settings, beside model and prompts, that decide a vector."""


class Identity:
    """One embedder's; siblings have their own.

    Args:
        core: what embeds.
        settings: prompts and `expect`.
    """

    def __init__(self, core: Core, settings: Settings) -> None:
        self._core = core
        self._settings = settings
        self._lock = threading.Lock()
        self._prompts: _prompts.Prompts | None = None
        self.settled = False
        if "auto" not in (settings.query_prompt, settings.document_prompt):
            self._prompts = _prompts.Prompts(settings.query_prompt or "", settings.document_prompt or "")
            self.settled = settings.expect is None

    def settle(self) -> None:
        """Look up what "auto" prompts are and check `expect`, once; blocks, and may ask the server.

        Raises:
            ConfigurationError: the model has no prompts, or there is no fingerprint at the path.
            FingerprintMismatchError: other vectors than expected.
        """
        with self._lock:
            if not self.settled:
                self.prompts()
                if self._settings.expect is not None:
                    self._check(self._settings.expect)
                self.settled = True

    def prompts(self) -> _prompts.Prompts:
        """The prompts that go before queries and documents."""
        if self._prompts is None:
            given = (self._settings.query_prompt, self._settings.document_prompt)
            names = self._core.backend.model(), self._settings.model
            try:
                own = _prompts.find(*names)
            except ConfigurationError:  # asking for the root starts an engine in process, or needs a server that is up
                own = _prompts.find(*names, self._core.backend.about().root)
            pairs = zip(given, own, strict=True)
            query, document = (theirs if ours == "auto" else ours or "" for ours, theirs in pairs)
            self._prompts = _prompts.Prompts(query, document)
        return self._prompts

    def prompt(self, kind: Kind, given: str | None) -> str:
        """What goes before this call's texts."""
        return given if given is not None else getattr(self.prompts(), kind)

    def fingerprint(self) -> Fingerprint:
        """Made anew from the canaries' vectors."""
        prompts, about = self.prompts(), self._core.backend.about()
        job = self._core.job(CANARIES, self._settings, "document", "", on_rows=None)
        self._core.dispatcher.run(job)
        return Fingerprint.of(
            self._core.seen(job.future.result(), len(CANARIES)),
            query_prompt=prompts.query,
            document_prompt=prompts.document,
            unicode=self._settings.unicode,
            long_text=self._settings.long_text,
            model=self._core.backend.model(),
            root=about.root,
            version=about.version,
        )

    def namespace(self) -> str:
        """See `Embedder.namespace`."""
        model, prompts = self._core.backend.model(), self.prompts()
        decides = {name: getattr(self._settings, name) for name in _DECIDE}
        decides["engine_args"] = deciding(self._settings.engine_args)
        text = json.dumps([model, *prompts, decides], sort_keys=True, default=repr)
        slug = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-")[-40:]
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _check(self, expect: Fingerprint | str) -> None:
        expected = expect if isinstance(expect, Fingerprint) else Fingerprint.load(expect)
        found = expected.compare(self.fingerprint())
        if not found.same:
            raise FingerprintMismatchError(
                "these are not the vectors that expect= describes, so they must not be mixed with that index's:\n"
                f"{found}\nServe the same model in the same way, set the same prompts, or index anew",
                model=self._core.backend.model(),
            )
        _log.info("expect: %s", found)
