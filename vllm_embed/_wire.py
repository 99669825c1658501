"""vLLM's wire format, both ways: pure functions of bytes. No socket, no clock.

Source of the facts: vLLM 0.32 seen running, and the release notes of the versions named.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import pybase64

from vllm_embed._address import without
from vllm_embed.errors import (
    AuthenticationError,
    BadReplyError,
    InputTooLongError,
    InvalidInputError,
    ModelNotFoundError,
    ServerStatusError,
    VLLMEmbedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Reply", "blames_text", "read_error", "read_reply", "refuses_dimensions", "request_body"]


class Reply(NamedTuple):
    """What one request brought."""

    vectors: NDArray[np.float32]
    """Shape (n, d), in the order of the texts that are not refused."""
    prompt_tokens: int
    """As the server counted them, special tokens included; 0 when it did not say."""
    refused: Mapping[int, VLLMEmbedError] = MappingProxyType({})
    """Texts without a vector, by position, where they could be told apart. A server refuses the whole request."""


def request_body(model: str, texts: Sequence[str], fields: Mapping[str, Any]) -> bytes:
    """Body of `POST /v1/embeddings`: text as text, vectors back as base64 of little-endian float32.

    `endianness` is known from vLLM 0.11.2 on; earlier servers ignore it. Not `bytes`: it streams one chunk a vector.
    """
    return orjson.dumps({"model": model, "input": texts, "encoding_format": "base64", "endianness": "little", **fields})


def read_reply(content: bytes, count: int) -> Reply:
    """The vectors of a reply with status 200, in the order of the texts.

    Args:
        content: the body; its vectors may be base64 or JSON floats, and in any order.
        count: texts that were sent.

    Raises:
        BadReplyError: unless there is exactly one finite vector for each text, all of one width. When only single
            vectors are not finite, `indexes` names them and `vectors` holds all.
    """
    try:
        reply = orjson.loads(content)
        data = reply["data"]
        order = [item["index"] for item in data]
        encoded = [item["embedding"] for item in data]
    except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
        raise BadReplyError(f"no embedding reply but {_described(content)}") from exc
    if order != list(range(count)):
        if sorted(map(repr, order)) != sorted(map(repr, range(count))):
            raise BadReplyError(f"{count} texts were sent, the reply has {len(order)}, numbered {_short(order)}")
        encoded = [vector for _, vector in sorted(zip(order, encoded, strict=True), key=lambda pair: pair[0])]
    vectors = _stack(encoded)
    usage = reply.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    finite = np.isfinite(vectors)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1)).tolist()
        raise BadReplyError("a vector that is not finite (NaN or infinity)", indexes=bad, vectors=vectors)
    return Reply(vectors, tokens if isinstance(tokens, int) else 0)


def _stack(encoded: list[Any]) -> NDArray[np.float32]:
    try:
        if all(type(vector) is str for vector in encoded):
            raw = [pybase64.b64decode(vector, validate=True) for vector in encoded]
            widths = {len(part) for part in raw}
            if len(widths) == 1 and (width := widths.pop()) > 0 and not width % 4:
                stacked = np.frombuffer(b"".join(raw), dtype="<f4").reshape(len(raw), width // 4)
                return stacked.astype(np.float32, copy=False)
            told = sorted({len(part) / 4 for part in raw})
        else:
            rows = [np.asarray(vector, dtype=np.float32) for vector in encoded]
            told = sorted({float(row.size) for row in rows})
            if len(told) == 1 and told[0] and all(row.ndim == 1 for row in rows):
                return np.stack(rows)
    except (ValueError, TypeError) as exc:
        raise BadReplyError("a vector in the reply is neither base64 nor a list of numbers") from exc
    raise BadReplyError(f"the vectors are of widths {', '.join(f'{width:g}' for width in told)} where one is needed")


def _short(order: list[Any]) -> str:
    text = ", ".join(map(str, order[:6]))
    return f"[{text}, ...]" if len(order) > 6 else f"[{text}]"


def _described(content: bytes) -> str:
    start = content[:200].lstrip()
    if start.startswith(b"<"):
        return "an HTML page"
    if not start:
        return "empty"
    if start.startswith(b"{"):
        return "JSON without vectors, or cut off"
    return "something else"


_TOO_LONG = re.compile(r"maximum context length|maximum model length|max_embed_len|longer than the max", re.IGNORECASE)
_TEXT = re.compile(r"TextEncodeInput|prompt cannot be empty|cannot be empty|out of vocabulary", re.IGNORECASE)
_REQUEST = re.compile(r"matryoshka|dimensions", re.IGNORECASE)
_NUMBERS = re.compile(r"context length is (\d+) tokens.*?(?:contains|requested) (at least )?(\d+)", re.DOTALL)
_CHARACTERS = re.compile(r"context length is (\d+) tokens.*?contains (\d+) characters \(more than (\d+)", re.DOTALL)
"""VLLM 0.32 counts no tokens of a text with more characters than the limit times its longest token, blanks included."""
_NO_EMBEDDINGS = "does not support Embeddings API"
"""A chat model's vLLM said so with a 400 or 501 while the route was always there; 0.32 has none: a bare 404."""
_LONGEST = 300


def read_error(status: int, content: bytes, *, texts: Sequence[str], secrets: Sequence[str] = ()) -> VLLMEmbedError:
    """The typed error of a reply that says no. What it quotes of the server holds no key and no whole text.

    A refused text gives InvalidInputError, one over the model's limit InputTooLongError. `status` is set on all; the
    other attributes are the caller's to fill in. An InvalidInputError that is only suspected, since the message is not
    one of vLLM's known ones, is told apart by `blames_text`.
    """
    said, param = _said(content)
    for text in texts:
        if len(text) >= 12 and text in said:
            said = said.replace(text, "<text>")
    said = without(said, secrets)
    quoted = " ".join(said.split())
    quoted = f"{quoted[:_LONGEST]}..." if len(quoted) > _LONGEST else quoted
    if status in (401, 403):
        return AuthenticationError(
            f"the server refuses the key ({status} {quoted}); give the one it was started with as api_key or in "
            "VLLM_API_KEY",
            status=status,
        )
    if status == 404 or _NO_EMBEDDINGS in said:
        hint = "GET /v1/models lists what it serves"
        if "does not exist" not in said:
            hint = "it may serve no embedding model (start it with --runner pooling), or base_url may name another path"
        return ModelNotFoundError(f"{status} {quoted.removesuffix('.')}: {hint}", status=status)
    if status == 413:
        told = f"413, the request is larger than the server or its proxy takes: {quoted}"
        return InputTooLongError(told, status=status)
    if status in (400, 422):
        return _refusal(status, said, quoted, param)
    if 300 <= status < 400:
        return ServerStatusError(f"{status}: a redirect that is not followed", status=status)
    return ServerStatusError(f"the server answered {status}: {quoted or 'no reason given'}", status=status)


def _refusal(status: int, said: str, quoted: str, param: str) -> VLLMEmbedError:
    if (numbers := _CHARACTERS.search(said)) is not None:
        told = (
            f"{numbers[2]} characters, more than the {numbers[3]} that vLLM takes for its limit of {numbers[1]} tokens"
        )
        return InputTooLongError(told, status=status)
    if param == "input_tokens" or _TOO_LONG.search(said):
        numbers = _NUMBERS.search(said)
        told = f"{numbers[2] or ''}{numbers[3]} tokens, the limit is {numbers[1]}" if numbers else quoted
        return InputTooLongError(told.removesuffix("."), status=status)
    if _TEXT.search(said):
        hint = '; blank_text="zero" or "error" handles blank texts here' if "empty" in said else ""
        return InvalidInputError(f"{quoted}{hint}", status=status)
    if _REQUEST.search(said):
        return ServerStatusError(
            f"{status} {quoted} Leave dimensions out for the model's own width; if the model is Matryoshka, start vLLM "
            'with --hf-overrides \'{"is_matryoshka": true}\', or set dimensions_fallback="client"',
            status=status,
        )
    if param.startswith("body."):
        return ServerStatusError(f"the server refuses the request, see extra_body: {status} {quoted}", status=status)
    return InvalidInputError(quoted, status=status)


def blames_text(error: VLLMEmbedError) -> bool:
    """Whether the message is one of vLLM's that is known to be about a text rather than about the request."""
    return isinstance(error, InputTooLongError) or bool(_TEXT.search(str(error)))


def refuses_dimensions(error: VLLMEmbedError) -> bool:
    """Whether the model was asked for a width that it is not allowed to give."""
    return isinstance(error, ServerStatusError) and error.status == 400 and bool(_REQUEST.search(str(error)))


def _said(content: bytes) -> tuple[str, str]:
    """Message and `param` of an error body: nested from vLLM 0.10.2 on, flat before; a str for 401."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return _described(content) if content.lstrip()[:1] in (b"<", b"") else content.decode(errors="replace"), ""
    if not isinstance(body, dict):
        return str(body), ""
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error), ""
    message = error.get("message", error.get("detail", error))
    return str(message), str(error.get("param") or "")
