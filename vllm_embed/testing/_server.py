import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Thread
from types import TracebackType
from typing import Any, Self

from vllm_embed.testing import _replies
from vllm_embed.testing._embeddings import Prompts, Served, count_prompts, read_prompts
from vllm_embed.testing._faults import Fault
from vllm_embed.testing._http import Connection, Reply, Request, Send
from vllm_embed.testing._replies import RefusedError, refused
from vllm_embed.testing._routes import EMBEDDINGS, answer, decode, turn_away
from vllm_embed.testing._text import cut
from vllm_embed.testing._traffic import Traffic
from vllm_embed.testing._vectors import Encoded, FakeModel, Form, Vector, encode

HOST = "127.0.0.1"
_TURNS = 5  # of the event loop
BACKLOG = 1_024
NO_FAULT = Fault(name="none")


class FakeVLLMServer(Traffic):
    """A vLLM server that embeds, without a model: real HTTP on 127.0.0.1 from one daemon thread.

    Use it as a context manager, or `start` and `stop` it. Its attributes may be set at any time.

    Attributes:
        delay_s: what every embedding request takes, beside the others.
        documents_per_s: speed of the one GPU that all requests share, one after the other. None: no time at all.
        idle_timeout_s: when an idle connection is closed, 5 s in vLLM. None: never.
        refuse: given a text, the reason to refuse it, or None. A refused text fails its whole request with a 400.
        max_texts, max_body_bytes: a request with more gets a 413 from nginx.
        max_queued_texts: a request with more gets vLLM's 503, as with `--max-num-queued-reqs`.
    """

    def __init__(
        self,
        *,
        model: str | Sequence[str] = "fake-model",
        dimension: int = 384,
        max_model_len: int = 256,
        api_key: str | None = None,
        port: int = 0,
        version: str = "0.32.0",
        root: str | None = None,
        matryoshka: bool = False,
        normalize: bool = True,
    ) -> None:
        """Describe a server; nothing listens before `start`.

        Args:
            model: the served name, or several.
            dimension: width of the vectors.
            max_model_len: most tokens of a prompt, as `count_tokens` counts. A text of more than 18 characters for each
                of them is refused before its tokens are counted, as vLLM 0.32 does.
            api_key: asked for under /v1. None: no key is needed.
            port: 0 takes a free one at the first start and keeps it.
            version: told by /version. The answers are those of 0.32.
            root: what /v1/models names as the model's origin. None: the name.
            matryoshka: whether `dimensions` is allowed.
            normalize: False: a model without a Normalize module, its vectors are not of unit length.
        """
        super().__init__()
        names = (model,) if isinstance(model, str) else tuple(model)
        self._served = Served(names, dimension, max_model_len, matryoshka)
        self._model = FakeModel(dimension, normalize=normalize)
        self._api_key = api_key
        self._version = version
        self._root = root
        self._thread: Thread | None = None
        self._stopping: asyncio.Event
        self._gpu_free_at = 0.0
        self.port = port
        self.delay_s = 0.0
        self.documents_per_s: float | None = None
        self.idle_timeout_s: float | None = 5.0
        self.refuse: Callable[[str], str | None] | None = None
        self.max_texts: int | None = None
        self.max_body_bytes: int | None = None
        self.max_queued_texts: int | None = None

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT/v1`. The port is known after the first start."""
        return f"http://{HOST}:{self.port}/v1"

    def vector(self, text: str, dimensions: int | None = None, *, use_activation: bool = True) -> Vector:
        """What the server answers for exactly this text, float32, shape (d,). No limit is applied, nothing is cut."""
        return self._model.vector(text, Form(dimensions=dimensions, use_activation=use_activation))

    def truncated(self, text: str) -> str:
        """What is left of `text` under `truncate_prompt_tokens: -1`."""
        return cut(text, self._served.max_model_len)

    def start(self) -> Self:
        """Listen and serve; nothing happens when it does already.

        Raises:
            OSError: the port is taken.
        """
        if self._thread is None:
            listener = socket.create_server((HOST, self.port), backlog=BACKLOG)
            self.port = listener.getsockname()[1]
            loop = asyncio.SelectorEventLoop()
            self._stopping = asyncio.Event()
            self._loop = loop
            self._thread = Thread(target=self._run, args=(loop, listener), name="fake-vllm", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Drop all connections and stop listening; `start` serves again, on the same port."""
        if self._thread is not None and self._loop is not None:
            with self._changed:
                self._loop.call_soon_threadsafe(self._stopping.set)
                self._loop = None
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        try:
            loop.run_until_complete(self._serve(listener))
        finally:
            loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, _context: None)  # it would log, and logging may print
        connections: set[Connection] = set()
        self._gpu_free_at = loop.time()

        def connect() -> Connection:
            self._count_connection()
            return Connection(self._handle, lambda: self.idle_timeout_s, connections)

        server = await loop.create_server(connect, sock=listener, backlog=BACKLOG)
        await self._stopping.wait()
        loop.remove_reader(listener)  # accept no more; closed with one half accepted, asyncio 3.11 forgets its socket
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        server.close()
        for _ in range(_TURNS):  # one that was just accepted becomes a connection, one that is aborted is closed
            await asyncio.sleep(0)
            for connection in list(connections):
                connection.abort()
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await asyncio.sleep(0)

    async def _handle(self, request: Request, send: Send) -> None:
        self._count_path(f"{request.method} {request.path}")
        try:
            if request.path == EMBEDDINGS and request.method == "POST":
                await self._embed(request, send)
            else:
                refusal = turn_away(request, self._api_key)
                await send(refusal or answer(request, self._served, self._version, self._root))
        except RefusedError as exc:
            await send(exc.reply)

    async def _embed(self, request: Request, send: Send) -> None:
        """Answer one embedding request; it counts, whatever is wrong with it."""
        refusal = turn_away(request, self._api_key)
        body: dict[str, Any] = {}
        try:
            body = decode(request)
        except RefusedError as exc:
            refusal = refusal or exc.reply
        fault = self._arrive(body, count_prompts(body), request.headers) or NO_FAULT
        with ExitStack() as in_flight:
            in_flight.callback(self._leave)
            await self._pass_gate()
            await _sleep(self.delay_s + fault.delay_s)
            reply = fault.reply or refusal or await self._reply(body, len(request.body), fault)
            await send(fault.deliver(reply), in_flight.close)

    async def _reply(self, body: dict[str, Any], size: int, fault: Fault) -> Reply:
        texts = count_prompts(body)
        if _over(self.max_body_bytes, size) or _over(self.max_texts, texts):
            return _replies.html(413)
        try:
            prompts = read_prompts(body, self._served)
            self._refuse(prompts)
        except RefusedError as exc:
            return exc.reply
        if _over(self.max_queued_texts, texts):
            return _replies.queue_full()
        if self.documents_per_s is not None:
            now = asyncio.get_running_loop().time()
            self._gpu_free_at = max(now, self._gpu_free_at) + texts / self.documents_per_s
            await _sleep(self._gpu_free_at - now)
        rows = self._rows(prompts, fault)
        model, request_id = self._served.names[0], body.get("request_id")
        return _replies.embeddings(rows, model, prompts.tokens, request_id, usage=fault.usage)

    def _refuse(self, prompts: Prompts) -> None:
        if self.refuse is not None:
            for text in prompts.texts:
                reason = self.refuse(text)
                if reason is not None:
                    raise refused(reason)

    def _rows(self, prompts: Prompts, fault: Fault) -> list[tuple[int, Encoded]]:
        form = prompts.form._replace(encoding=fault.encoding or prompts.form.encoding)
        if fault.rows is None:
            return [(index, self._model.encoded(text, form)) for index, text in enumerate(prompts.texts)]
        rows = [(index, self._model.vector(text, form)) for index, text in enumerate(prompts.texts)]
        return [(index, encode(vector, form)) for index, vector in fault.rows(rows)]


async def _sleep(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


def _over(limit: int | None, value: int) -> bool:
    return limit is not None and value > limit
