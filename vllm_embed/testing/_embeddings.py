"""POST /v1/embeddings, from the decoded body to the rows of a reply: no socket, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_embed.testing._replies import invalid, model_not_found, refused, too_long, too_many_characters
from vllm_embed.testing._text import CHARACTERS_OF_A_TOKEN, VOCABULARY_SIZE, count_tokens, cut, is_encodable
from vllm_embed.testing._vectors import Form

_ENDIANNESS = ("native", "big", "little")
_NOT_AN_INTEGER = "Input should be a valid integer, unable to parse string as an integer"
_TOO_SMALL = "Input should be greater than or equal to -1"
_SMALLEST_TRUNCATION = -1  # the model's own limit


@dataclass(frozen=True, slots=True)
class Served:
    """What the server serves."""

    names: Sequence[str]
    dimension: int
    max_model_len: int
    matryoshka: bool


@dataclass(frozen=True, slots=True)
class Prompts:
    """An embedding request that was found good: the texts after truncation, and the form of their vectors."""

    texts: list[str]
    tokens: int
    form: Form


def read_prompts(body: Mapping[str, Any], served: Served) -> Prompts:
    """Check an embedding request in vLLM's order: fields, model, prompts one by one, dimensions.

    Raises:
        RefusedError: with vLLM's reply.
    """
    if "normalize" in body:
        message = "Parameter `normalize` was removed; use `use_activation` instead. (parameter=normalize)"
        raise refused(message, "normalize")
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise invalid("literal_error", "body.encoding_format", "Input should be 'float' or 'base64'")
    endianness = body.get("endianness", "native")
    if endianness not in _ENDIANNESS:
        raise invalid("literal_error", "body.endianness", "Input should be 'native', 'big' or 'little'")
    prompts = _listed(body)
    limit = _whole_number(body, "truncate_prompt_tokens")
    if limit is not None and limit < _SMALLEST_TRUNCATION:
        raise invalid("greater_than_equal", "body.truncate_prompt_tokens", _TOO_SMALL)
    dimensions = _whole_number(body, "dimensions")
    if body.get("model") and body["model"] not in served.names:
        raise model_not_found(body["model"])
    if limit is not None and limit > served.max_model_len:
        raise refused(
            "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size."
        )
    if not prompts:
        raise refused("You must pass at least one prompt")
    fitted = [_fit(prompt, limit, served.max_model_len) for prompt in prompts]
    texts = [prompt if isinstance(prompt, str) else _text_of_ids(prompt) for prompt, _ in fitted]
    _check_dimensions(dimensions, served)
    form = Form(
        dimensions=dimensions,
        use_activation=body.get("use_activation") is not False,
        encoding=encoding,
        **({} if endianness == "native" else {"big_endian": endianness == "big"}),
    )
    return Prompts(texts, sum(tokens for _, tokens in fitted), form)


def count_prompts(body: Mapping[str, Any]) -> int:
    """How many prompts an embedding request seems to hold; none when it has no `input`."""
    given = body.get("input")
    if isinstance(given, list) and not (given and _are_ids(given)):
        return len(given)
    return 0 if given is None else 1


def _listed(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts of `input`, which is a text, a list of texts, a list of ids or a list of lists of ids."""
    if "input" not in body:
        raise invalid("missing", "body.input", "Field required")
    given = body["input"]
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise invalid("list_type", "body.input", "Input should be a valid list")
    if given and _are_ids(given):
        return [given]
    if all(isinstance(prompt, str) for prompt in given) or all(_are_ids(prompt) for prompt in given):
        return given
    raise invalid("int_parsing", "body.input.0", _NOT_AN_INTEGER)


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(isinstance(number, int) for number in prompt)


def _whole_number(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None or isinstance(value, int):
        return value
    raise invalid("int_parsing", f"body.{name}", _NOT_AN_INTEGER)


def _fit(prompt: str | list[int], limit: int | None, max_model_len: int) -> tuple[str | list[int], int]:
    """The prompt and its number of tokens, truncated when the request has a limit."""
    if isinstance(prompt, str) and limit is None and len(prompt) > max_model_len * CHARACTERS_OF_A_TOKEN:
        raise too_many_characters(max_model_len, len(prompt), max_model_len * CHARACTERS_OF_A_TOKEN)
    if isinstance(prompt, str) and not is_encodable(prompt):
        raise refused("TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]")
    tokens = count_tokens(prompt) if isinstance(prompt, str) else len(prompt)
    if limit is None:
        if tokens > max_model_len:
            counted = max_model_len + 1 if isinstance(prompt, str) else tokens
            raise too_long(max_model_len, counted, at_least=isinstance(prompt, str))
    else:
        limit = max_model_len if limit == _SMALLEST_TRUNCATION else limit
        if tokens > limit:
            prompt, tokens = (cut(prompt, limit) if isinstance(prompt, str) else prompt[:limit]), limit
    if tokens == 0:
        raise refused("The decoder prompt cannot be empty")
    return prompt, tokens


def _text_of_ids(ids: list[int]) -> str:
    """Ids are embedded as the text of their digits: a vector, and the wrong one, as a real server's of foreign ids."""
    for number in ids:
        if not 0 <= number < VOCABULARY_SIZE:
            raise refused(f"Token id {number} is out of vocabulary")
    return " ".join(map(str, ids))


def _check_dimensions(dimensions: int | None, served: Served) -> None:
    if dimensions is None:
        return
    name = served.names[0]
    if not served.matryoshka:
        raise refused(
            f"Model {name!r} does not support Matryoshka embeddings; dimensions must be unset "
            f"(received dimensions={dimensions})."
        )
    if not 1 <= dimensions <= served.dimension:
        raise refused(f"Model {name!r} only supports dimensions in range [1, {served.dimension}], got {dimensions}.")
