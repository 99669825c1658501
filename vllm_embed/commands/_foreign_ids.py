"""What LangChain's `OpenAIEmbeddings`, as it comes, makes of a text, and what a served model makes of that.

With `check_embedding_ctx_length=True`, its default, it sends ids of tiktoken's cl100k_base for every model name that
tiktoken does not know (langchain-openai 1.7). vLLM takes ids for its own model's. This is the one place that sends ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from vllm_embed import _address, _wire
from vllm_embed._http import Http

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from rich.console import Console

    from langchain_vllm_embed import VLLMEmbeddings
    from vllm_embed._http import HttpReply

__all__ = ["RECORDED", "ids_of", "merges_folder", "outcome", "read", "show"]

# Made with tiktoken 0.14.0, get_encoding("cl100k_base").encode_ordinary(text); a test makes them again, and looks at
# what OpenAIEmbeddings sends. The merges are those that llama-index-core 0.14.25 ships, sha256 as below.
RECORDED: Mapping[str, str] = {
    "Why do we always see the same side of the Moon?": "10445 656 584 2744 1518 279 1890 3185 315 279 17781 30",
    "지구에 계절이 생기는 까닭은 무엇입니까?": (
        "22035 89359 19954 95303 14806 230 13094 48918 21121 16969 8790 117 234 9019 255 34804 5251 91834 13879 229 "
        "44966 84136 84291 234 30"
    ),
}
"""cl100k_base ids of the demo's own questions, for when tiktoken would have to download its merges."""

_MERGES = hashlib.sha1(  # noqa: S324 - tiktoken's name for the file
    b"https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
).hexdigest()
_MERGES_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_ASK_S = 60.0


def ids_of(texts: Sequence[str], merges: Path | None) -> dict[str, list[int]]:
    """The cl100k_base ids of texts.

    Args:
        texts: any.
        merges: what `merges_folder` gives. With None the recorded ids are used: of those texts that were recorded, or
            else of the recorded texts.
    """
    if merges is None or find_spec("tiktoken") is None:
        known = [text for text in texts if text in RECORDED] or RECORDED
        return {text: [int(number) for number in RECORDED[text].split()] for text in known}
    import tiktoken  # noqa: PLC0415 - an extra

    with _environment("TIKTOKEN_CACHE_DIR", str(merges)):
        encoding = tiktoken.get_encoding("cl100k_base")
    return {text: encoding.encode_ordinary(text) for text in texts}


def merges_folder() -> Path | None:
    """A folder with the very file that tiktoken wants; with any other, or none, it would start a download.

    Looked for where tiktoken keeps it, and in llama-index-core, which ships it.
    """
    folders = [os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR")]
    folders.append(str(Path(tempfile.gettempdir(), "data-gym-cache")))
    with contextlib.suppress(ModuleNotFoundError):
        spec = find_spec("llama_index.core")
        if spec is not None and spec.origin is not None:
            folders.append(str(Path(spec.origin).with_name("_static") / "tiktoken_cache"))
    for folder in filter(None, folders):
        with contextlib.suppress(OSError):
            if hashlib.sha256(Path(folder, _MERGES).read_bytes()).hexdigest() == _MERGES_SHA256:
                return Path(folder)
    return None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def show(console: Console, embeddings: VLLMEmbeddings, texts: Sequence[str]) -> None:
    """Print, for each text, the ids, what the model reads in them, and what comes of it."""
    from rich.text import Text  # noqa: PLC0415 - not for --help

    console.print(
        "As it comes (check_embedding_ctx_length=True) it turns text into ids of tiktoken's cl100k_base, and vLLM "
        "takes ids for its own model's."
    )
    merges = merges_folder()
    if merges is None:
        console.print("tiktoken would have to download cl100k_base here, so these are ids that were recorded.")
    info = embeddings.embedder.info()
    url = next((endpoint.url for endpoint in info.endpoints if endpoint.healthy), info.endpoints[0].url)
    address = next(address for address in _address.addresses(embeddings.base_url) if address.url == url)
    with contextlib.closing(Http(embeddings, (address,))) as http:

        def post(url: str, **body: Any) -> HttpReply:
            content = orjson.dumps({"model": info.model, **body})
            return http.exchange("POST", address, url, content, timeout=_ASK_S)

        for text, ids in ids_of(texts, merges).items():
            told = read(post(f"{address.root}/detokenize", tokens=ids))
            answer = post(f"{address.url}/embeddings", input=[ids])
            right = embeddings.embedder.embed([text], prompt="")[0]
            console.print()
            for name, value in (
                ("the text", text),
                ("the ids it sends", " ".join(map(str, ids))),
                ("the model reads", told),
                ("what comes back", outcome(answer, right, http.secrets)),
            ):
                lines = Text(value).wrap(console, console.width - 22)
                console.print(f"  {name:<18}" + f"\n{'':20}".join(line.plain.rstrip() for line in lines))


def read(reply: HttpReply) -> str:
    """The ids as text, by the server's own tokenizer, which leaves out those it does not have (vLLM 0.32)."""
    try:
        return str(orjson.loads(reply.content)["prompt"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"(this server does not tell: /detokenize gave {reply.status})"


def outcome(reply: HttpReply, right: NDArray[np.float32], secrets: Sequence[str]) -> str:
    """What a caller gets for the ids: an error, or a vector beside the right one."""
    if reply.status != HTTPStatus.OK:
        refusal = _wire.read_error(reply.status, reply.content, texts=(), secrets=secrets)
        return f"{reply.status} for all texts of the request: {refusal}"
    wrong = _wire.read_reply(reply.content, 1).vectors[0]
    cosine = wrong @ right / (np.linalg.norm(wrong) * np.linalg.norm(right))
    return f"a vector, without an error; its cosine to the right one is {cosine:.3f}"
