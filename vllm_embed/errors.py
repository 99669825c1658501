"""Every error that vllm-embed raises.

VLLMEmbedError
├── ConfigurationError        bad settings (also a ValueError)
├── ServerUnreachableError    no connection, or it broke
├── ServerTimeoutError        no whole reply within `timeout`
├── AuthenticationError       401, 403
├── ModelNotFoundError        404: no such model, or a server that does not embed
├── ServerStatusError         any other status that says no
├── BadReplyError             a reply that is not n finite vectors of one width
├── InvalidInputError         texts that cannot be embedded; the others' vectors are in `vectors`
│   └── InputTooLongError     longer than the model's limit
├── EngineError               vLLM in this process, or a server started here, failed
├── FingerprintMismatchError  other vectors than those expected
├── OutputError               what a job writes to is full, read-only, in use, or not the job's
└── ClosedError               used after close()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "AuthenticationError",
    "BadReplyError",
    "ClosedError",
    "ConfigurationError",
    "EngineError",
    "FingerprintMismatchError",
    "InputTooLongError",
    "InvalidInputError",
    "ModelNotFoundError",
    "OutputError",
    "ServerStatusError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "VLLMEmbedError",
]


class VLLMEmbedError(Exception):
    """Root of the tree. It pickles, and holds neither a key nor a whole text.

    Attributes:
        endpoint: base URL that answered or failed to, without credentials; None when none was asked.
        model: model that was asked for, None when unknown.
        status: HTTP status, None when there was no reply.
        attempts: requests made for these texts, retries included; 0 when none was.
        indexes: sorted positions in the caller's list that are at fault; empty when no input is to blame.
        reasons: what was wrong with each index at fault.
        vectors: for refused inputs, float32 of shape (n, d): all the other vectors, with NaN rows at `indexes`. None
            otherwise, and when no text of the call could be embedded.
    """

    def __init__(
        self,
        message: str,
        *,
        endpoint: str | None = None,
        model: str | None = None,
        status: int | None = None,
        attempts: int = 0,
        indexes: Iterable[int] = (),
        reasons: Mapping[int, str] | None = None,
        vectors: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.model = model
        self.status = status
        self.attempts = attempts
        self.indexes = tuple(sorted(indexes))
        self.reasons = dict(reasons or {})
        self.vectors = vectors

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)

    def copy(self, message: str | None = None, **changes: Any) -> Self:
        """The same error with another message or attributes, and no traceback yet: one for each caller to raise."""
        args = self.args if message is None else (message,)
        twin: Self = _rebuild(type(self), args, {**self.__dict__, **changes})
        twin.__cause__ = self.__cause__
        return twin


def _rebuild(cls: type[VLLMEmbedError], args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigurationError(VLLMEmbedError, ValueError):
    """Settings that cannot work, found before the first text goes out."""


class ServerUnreachableError(VLLMEmbedError):
    """No connection to the server, or it broke before the reply was whole."""


class ServerTimeoutError(VLLMEmbedError):
    """No whole reply within `timeout` seconds."""


class AuthenticationError(VLLMEmbedError):
    """The server refused the key (401 or 403)."""


class ModelNotFoundError(VLLMEmbedError):
    """The server does not know the model, or does not embed (404)."""


class ServerStatusError(VLLMEmbedError):
    """The server answered with a status that says no, and no text is to blame."""


class BadReplyError(VLLMEmbedError):
    """A reply with status 200 that is not one finite vector of one width for each text."""


class InvalidInputError(VLLMEmbedError):
    """Texts that cannot be embedded: `indexes` names them, `vectors` holds the others."""


class InputTooLongError(InvalidInputError):
    """Texts longer than the model's limit: `indexes` names them, `vectors` holds the others."""


class EngineError(VLLMEmbedError):
    """vLLM in this process, or a server that was started here, failed."""


class FingerprintMismatchError(VLLMEmbedError):
    """The server's vectors are not the ones expected."""


class OutputError(VLLMEmbedError):
    """A job cannot write: a full disk, a read-only folder, a store in use, or an output that is not this job's."""


class ClosedError(VLLMEmbedError):
    """The embedder was closed."""

    def __init__(self, message: str = "this embedder was closed; make a new one", **attributes: Any) -> None:
        super().__init__(message, **attributes)
