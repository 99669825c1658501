"""vLLM's replies, word for word (0.32.0), and a proxy's."""

import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from uuid import uuid4

import orjson

from vllm_embed.testing._http import Reply
from vllm_embed.testing._vectors import Encoded


class RefusedError(Exception):
    """Carries the reply that refuses a request."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


def json_reply(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply with this content as JSON."""
    return Reply(status, orjson.dumps(content), headers=dict(headers or {}))


def error(status: int, message: str, kind: str, param: str | None = None) -> Reply:
    """The error body of vLLM since 0.10.2."""
    return json_reply({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


def refused(message: str, param: str | None = None) -> RefusedError:
    """A 400 for an input that vLLM does not take."""
    return RefusedError(error(400, message, "BadRequestError", param))


def invalid(kind: str, location: str, message: str) -> RefusedError:
    """A 400 for a body of another shape. vLLM lists one line for each shape that it tried; this is one of them."""
    text = f"1 validation error:\n  {{'type': {kind!r}, 'loc': {location!r}, 'msg': {message!r}}}"
    return RefusedError(error(400, text, "Bad Request", location))


def plain_error(status: int) -> Reply:
    """The body of vLLM for a failure of its own."""
    phrase = HTTPStatus(status).phrase
    return error(status, phrase, phrase.replace(" ", ""))


def html(status: int = 200, title: str | None = None) -> Reply:
    """A page as nginx writes it, connection closed where nginx closes it."""
    title = title or f"{status} {HTTPStatus(status).phrase}"
    page = (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
        "<hr><center>nginx/1.27.4</center>\r\n</body>\r\n</html>\r\n"
    )
    headers = {"server": "nginx/1.27.4"}
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        headers["connection"] = "close"
    return Reply(status, page.encode(), "text/html", headers)


def not_found() -> Reply:
    """An unknown route."""
    return json_reply({"detail": "Not Found"}, 404)


def method_not_allowed(allowed: str) -> Reply:
    """A known route, asked with another method."""
    return json_reply({"detail": "Method Not Allowed"}, 405, {"allow": allowed})


def unauthorized() -> Reply:
    """No key, or not the right one. The error is a string here, and an object everywhere else."""
    return json_reply({"error": "Unauthorized"}, 401)


def model_not_found(model: object) -> RefusedError:
    """The 404 of /v1/embeddings."""
    return RefusedError(error(404, f"The model `{model}` does not exist.", "NotFoundError"))


def model_not_found_by_tokenizer(model: object, known: Sequence[str]) -> RefusedError:
    """The 404 of /tokenize and /detokenize, which says more."""
    aliases = ", ".join(known)
    message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
    return RefusedError(error(404, message, "NotFoundError", "model"))


def too_long(limit: int, tokens: int, *, at_least: bool) -> RefusedError:
    """A prompt over the model's length. Of a text vLLM counts no further than one token over: `at_least`."""
    return refused(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{'at least ' if at_least else ''}{tokens} input tokens, which exceeds this limit even without any output "
        f"tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value={tokens})",
        "input_tokens",
    )


def too_many_characters(limit: int, characters: int, most: int) -> RefusedError:
    """A text of more characters than the model's length could hold: its tokens are not counted."""
    return refused(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {characters} characters "
        f"(more than {most} characters, which is the upper bound for {limit} input tokens). Please reduce the length "
        f"of the input prompt. (parameter=input_text, value={characters})",
        "input_text",
    )


def queue_full() -> Reply:
    """More than --max-num-queued-reqs."""
    message = (
        "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance."
    )
    return error(503, message, "Service Unavailable")


def models(names: Sequence[str], root: str | None, max_model_len: int) -> Reply:
    """GET /v1/models."""
    now = int(time.time())
    permission = {
        "id": f"modelperm-{uuid4().hex[:16]}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    cards = [
        {
            "id": name,
            "object": "model",
            "created": now,
            "owned_by": "vllm",
            "root": root or names[0],
            "parent": None,
            "max_model_len": max_model_len,
            "permission": [permission],
        }
        for name in names
    ]
    return json_reply({"object": "list", "data": cards})


def embeddings(
    rows: Sequence[tuple[int, Encoded]], model: str, tokens: int, request_id: object, *, usage: bool = True
) -> Reply:
    """The 200 of POST /v1/embeddings."""
    content: dict[str, object] = {
        "id": f"embd-{request_id or uuid4().hex[:16]}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "embedding", "embedding": embedding} for index, embedding in rows],
    }
    if usage:
        content["usage"] = {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
    return json_reply(content)
