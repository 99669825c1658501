"""Every route but /v1/embeddings, and what stands before them all: no socket, no clock."""

import json
from collections.abc import Mapping
from typing import Any

import orjson

from vllm_embed.testing import _replies
from vllm_embed.testing._embeddings import Served
from vllm_embed.testing._http import Reply, Request
from vllm_embed.testing._replies import RefusedError, invalid, json_reply, model_not_found_by_tokenizer, refused
from vllm_embed.testing._text import VOCABULARY, is_encodable

EMBEDDINGS = "/v1/embeddings"
_METHODS = {
    EMBEDDINGS: "POST",
    "/v1/models": "GET",
    "/version": "GET",
    "/health": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
}
_GUARDED = ("/v1", "/v2", "/inference", "/cohere")  # the prefixes under which vLLM asks for a key


def turn_away(request: Request, api_key: str | None) -> Reply | None:
    """The reply to a request without the right key, to an unknown route or with a wrong method; None for any other."""
    if api_key is not None and request.path.startswith(_GUARDED):
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or key != api_key:
            return _replies.unauthorized()
    method = _METHODS.get(request.path)
    if method == request.method:
        return None
    if method is not None:
        return _replies.method_not_allowed(method)
    if request.path.rstrip("/") in _METHODS:
        location = f"http://{request.headers.get('host', '')}{request.path.rstrip('/')}"
        return Reply(307, content_type=None, headers={"location": location})
    return _replies.not_found()


def decode(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        RefusedError: with vLLM's reply to a body that is something else.
    """
    if "json" not in request.headers.get("content-type", ""):
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise RefusedError(_replies.error(400, message, "Bad Request"))
    try:
        body = _loads(request.body)
    except json.JSONDecodeError as exc:
        raise invalid("json_invalid", f"body.{exc.pos}", "JSON decode error") from exc
    except UnicodeDecodeError as exc:
        raise RefusedError(json_reply({"detail": "There was an error parsing the body"}, 400)) from exc
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", message)
    return body


def answer(request: Request, served: Served, version: str, root: str | None) -> Reply:
    """The reply of any known route but /v1/embeddings.

    Raises:
        RefusedError: with the reply to a body that the route does not take.
    """
    match request.path:
        case "/v1/models":
            return _replies.models(served.names, root, served.max_model_len)
        case "/version":
            return json_reply({"version": version})
        case "/health":
            return Reply(200, content_type=None)
        case "/tokenize":
            return _tokenize(decode(request), served)
        case _:
            return _detokenize(decode(request), served)


def _tokenize(body: Mapping[str, Any], served: Served) -> Reply:
    if "prompt" not in body:
        raise invalid("missing", "body.prompt", "Field required")
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        raise invalid("string_type", "body.prompt", "Input should be a valid string")
    _check_model(body, served)
    if not is_encodable(prompt):
        raise refused("TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]")
    ids = VOCABULARY.encode(prompt, special=body.get("add_special_tokens") is not False)
    content = {
        "count": len(ids),
        "max_model_len": served.max_model_len,
        "tokens": ids,
        "token_strs": VOCABULARY.tokens(ids) if body.get("return_token_strs") else None,
    }
    return json_reply(content)


def _detokenize(body: Mapping[str, Any], served: Served) -> Reply:
    if "tokens" not in body:
        raise invalid("missing", "body.tokens", "Field required")
    _check_model(body, served)
    return json_reply({"prompt": VOCABULARY.decode(body["tokens"])})


def _check_model(body: Mapping[str, Any], served: Served) -> None:
    if body.get("model") and body["model"] not in served.names:
        raise model_not_found_by_tokenizer(body["model"], served.names)


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)  # as vLLM 0.32 reads it: takes the escape of a lone surrogate, and names the position
