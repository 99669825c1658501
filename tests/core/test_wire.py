"""vLLM's wire format, without a socket."""

import base64

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from vllm_embed import _wire, errors


def reply(rows: list, *, order: list[int] | None = None, encode: bool = True, **more: object) -> bytes:
    data = [
        {"index": i, "embedding": base64.b64encode(np.asarray(row, "<f4").tobytes()).decode() if encode else row}
        for i, row in zip(order or range(len(rows)), rows, strict=True)
    ]
    return orjson.dumps({"data": data, **more})


vectors = nps.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(vectors, st.data(), st.booleans())
def test_any_order_and_either_encoding_gives_the_same_rows(rows: np.ndarray, data: st.DataObject, encode: bool) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    body = reply([rows[i].tolist() for i in order], order=order, encode=encode)
    got = _wire.read_reply(body, len(rows)).vectors
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, rows)


@given(st.binary(max_size=80), st.integers(1, 3))
def test_no_bytes_but_an_embedding_reply_pass(body: bytes, count: int) -> None:
    with pytest.raises(errors.BadReplyError):
        _wire.read_reply(body, count)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(b"<html><title>nginx</title>", "HTML", id="a page"),
        pytest.param(b"", "empty", id="nothing"),
        pytest.param(reply([[1.0], [2.0]])[:-10], "cut off", id="cut off"),
        pytest.param(b'{"error": "x"}', "without vectors", id="an error with status 200"),
        pytest.param(b"[1, 2]", "something else", id="a list"),
        pytest.param(reply([[1.0]]), "2 texts were sent, the reply has 1", id="short"),
        pytest.param(reply([[1.0]] * 3), "the reply has 3", id="long"),
        pytest.param(reply([[1.0], [2.0]], order=[0, 0]), r"numbered \[0, 0\]", id="an index twice"),
        pytest.param(reply([[1.0], [2.0]], order=[1, 2]), r"numbered \[1, 2\]", id="an index that was not sent"),
        pytest.param(reply([[1.0], [2.0, 3.0]]), "widths 1, 2", id="two widths"),
        pytest.param(reply([[1.0], [2.0, 3.0]], encode=False), "widths 1, 2", id="two widths as floats"),
        pytest.param(reply([[], []]), "widths 0", id="no numbers"),
        pytest.param(reply(["!", "?"], encode=False), "neither base64", id="not base64"),
        pytest.param(reply([{"a": 1}, [1.0]], encode=False), "neither base64", id="an object for a vector"),
        pytest.param(reply([True, False], encode=False), "widths", id="a number for a vector"),
    ],
)
def test_a_bad_reply_says_what_it_is(body: bytes, said: str) -> None:
    with pytest.raises(errors.BadReplyError, match=said):
        _wire.read_reply(body, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_named_and_the_others_kept(bad: float) -> None:
    with pytest.raises(errors.BadReplyError, match="not finite") as caught:
        _wire.read_reply(reply([[1.0, 2.0], [bad, 1.0], [3.0, 4.0]]), 3)
    assert caught.value.indexes == (1,)
    np.testing.assert_array_equal(caught.value.vectors[[0, 2]], [[1.0, 2.0], [3.0, 4.0]])


def test_null_in_a_float_reply_is_not_finite() -> None:
    with pytest.raises(errors.BadReplyError, match="not finite"):
        _wire.read_reply(reply([[1.0, None]], encode=False), 1)


@pytest.mark.parametrize(
    ("usage", "tokens"), [({"prompt_tokens": 7}, 7), ({}, 0), (None, 0), ("x", 0), ({"prompt_tokens": None}, 0)]
)
def test_tokens_are_counted_where_the_server_says_them(usage: object, tokens: int) -> None:
    assert _wire.read_reply(reply([[1.0]], usage=usage), 1).prompt_tokens == tokens


def test_a_request_holds_text_and_asks_for_little_endian_base64() -> None:
    body = orjson.loads(_wire.request_body("m", ["a", "한"], {"priority": 1}))
    assert body == {
        "model": "m",
        "input": ["a", "한"],
        "encoding_format": "base64",
        "endianness": "little",
        "priority": 1,
    }


TOO_LONG = (
    b'{"error":{"message":"This model\'s maximum context length is 256 tokens. However, your prompt contains at least '
    b"257 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
    b'prompt. (parameter=input_tokens, value=257)","type":"BadRequestError","param":"input_tokens","code":400}}'
)
TOO_MANY_CHARACTERS = (
    b'{"error":{"message":"This model\'s maximum context length is 256 tokens. However, your prompt contains 8289 '
    b"characters (more than 4608 characters, which is the upper bound for 256 input tokens). Please reduce the length "
    b'of the input prompt. (parameter=input_text, value=8289)","type":"BadRequestError","param":"input_text",'
    b'"code":400}}'
)
NOT_MATRYOSHKA = (
    b'{"error":{"message":"Model \'m\' does not support Matryoshka embeddings; dimensions must be unset (received '
    b'dimensions=100).","type":"BadRequestError","param":null,"code":400}}'
)


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        pytest.param(401, b'{"error":"Unauthorized"}', errors.AuthenticationError, "VLLM_API_KEY", id="wrong key"),
        pytest.param(403, b"no", errors.AuthenticationError, "403 no", id="forbidden"),
        pytest.param(
            404,
            b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":null,"code":404}}',
            errors.ModelNotFoundError,
            "/v1/models",
            id="unknown model",
        ),
        pytest.param(404, b'{"detail":"Not Found"}', errors.ModelNotFoundError, "--runner pooling", id="no route"),
        pytest.param(
            400,
            b'{"object":"error","message":"The model does not support Embeddings API","code":400}',
            errors.ModelNotFoundError,
            "--runner pooling",
            id="a chat model of 0.10",
        ),
        pytest.param(400, TOO_LONG, errors.InputTooLongError, "at least 257 tokens, the limit is 256", id="too long"),
        pytest.param(
            400,
            TOO_MANY_CHARACTERS,
            errors.InputTooLongError,
            "8289 characters, more than the 4608 that vLLM takes for its limit of 256 tokens",
            id="too many characters for it to count tokens",
        ),
        pytest.param(
            400,
            b'{"object":"error","message":"This model\'s maximum context length is 512 tokens. However, you requested '
            b'600 tokens","type":"BadRequestError","code":400}',
            errors.InputTooLongError,
            "600 tokens, the limit is 512",
            id="too long, before 0.10.2",
        ),
        pytest.param(413, b"<html>413</html>", errors.InputTooLongError, "HTML", id="a proxy's limit"),
        pytest.param(400, NOT_MATRYOSHKA, errors.ServerStatusError, "is_matryoshka", id="dimensions"),
        pytest.param(
            400,
            b'{"error":{"message":"18 validation errors","type":"Bad Request","param":"body.priority","code":400}}',
            errors.ServerStatusError,
            "extra_body",
            id="a field of the wrong type",
        ),
        pytest.param(
            400,
            b'{"error":{"message":"The decoder prompt cannot be empty","code":400}}',
            errors.InvalidInputError,
            "blank_text",
            id="empty",
        ),
        pytest.param(400, b"odd", errors.InvalidInputError, "odd", id="a reason of no known kind"),
        pytest.param(503, b"", errors.ServerStatusError, "503", id="busy"),
        pytest.param(500, b"[1]", errors.ServerStatusError, "500", id="JSON that is no object"),
    ],
)
def test_a_refusal_becomes_its_typed_error(status: int, body: bytes, kind: type, said: str) -> None:
    error = _wire.read_error(status, body, texts=["a"])
    assert type(error) is kind
    assert error.status == status
    assert said in str(error)


def test_an_error_quotes_neither_a_key_nor_a_whole_text() -> None:
    body = orjson.dumps({"error": {"message": "key sk-secret-1 in 'a private sentence of mine' " + "x" * 900}})
    error = _wire.read_error(500, body, texts=["a private sentence of mine"], secrets=["sk-secret-1"])
    assert "sk-secret-1" not in str(error)
    assert "private" not in str(error)
    assert len(str(error)) < 400
