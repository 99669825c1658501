"""What a user may set: declared once, inherited by `Embedder` and both adapters."""

from __future__ import annotations

import copy
import os
import warnings
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import httpx  # noqa: TC002 - pydantic reads the annotation
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    SecretStr,
    StrictBool,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema  # noqa: TC002 - pydantic reads the annotation

from vllm_embed import _address, _checks, _engine_args, _told
from vllm_embed.errors import ConfigurationError
from vllm_embed.fingerprint import Fingerprint  # noqa: TC001 - pydantic reads the annotation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Kind", "Settings"]

Kind = Literal["query", "document"]

_IGNORED = frozenset({"check_embedding_ctx_length", "embedding_ctx_length", "tiktoken_enabled", "tiktoken_model_name"})
"""OpenAIEmbeddings' tokenizer options: text is sent as text here, so there is nothing for them to steer."""


def _env(name: str, default: str | None = None) -> Callable[[], Any]:
    return lambda: os.environ.get(name) or default


Prompt = Annotated[str | None, AfterValidator(_checks.prompt)]


class Settings(BaseModel):
    """All options, with their defaults. See the table in the README.

    Frozen: `model_copy(update={...})` gives an object with other settings and a life of its own. Keys, header values
    and credentials in URLs appear in no repr, dump or error. A pickle does hold them: treat it as you treat the key.

    Raises:
        ConfigurationError: for an unknown option, naming the nearest known one, and for a value that cannot work.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    aliases: ClassVar[Mapping[str, str]] = {
        "api_base": "base_url",
        "chunk_size": "batch_size",
        "openai_api_base": "base_url",
        "openai_api_key": "api_key",
        "request_timeout": "timeout",
        "show_progress_bar": "show_progress",
    }
    """Other libraries' names for our options."""

    model: Annotated[str | None, AfterValidator(_checks.model)] = None
    """Name the server knows the model by. None: the one model it lists."""

    base_url: Annotated[str | list[str], BeforeValidator(_address.parse)] = Field(
        default_factory=_env("VLLM_BASE_URL", "http://localhost:8000/v1"), validate_default=True
    )
    """Where the server is, or a list of its replicas; with or without `/v1`. Default: env VLLM_BASE_URL."""

    api_key: Annotated[SecretStr | None, BeforeValidator(_checks.key)] = Field(
        default_factory=_env("VLLM_API_KEY"), validate_default=True
    )
    """The server's `--api-key`. Default: env VLLM_API_KEY, else none. OPENAI_API_KEY is never read."""

    in_process: StrictBool = False
    """True: vLLM runs in this process (`vllm.LLM`) and sizes its batches itself; there is nothing to time or retry."""

    engine_args: Annotated[dict[str, Any], AfterValidator(_engine_args.check)] = Field(default_factory=dict)
    """Arguments of `vllm.LLM`, in process: dtype, hf_overrides, pooler_config, gpu_memory_utilization, ..."""

    query_prompt: Prompt = None
    """Put before each query, exactly as written, or a template with `{text}`."""

    document_prompt: Prompt = None
    """The same for documents."""

    dimensions: Annotated[int | None, Field(ge=1)] = None
    """Matryoshka width that the server is asked for. None: the model's own."""

    dimensions_fallback: Literal["client"] | None = None
    """"client": where the server refuses `dimensions`, cut and re-normalize here. Only right for Matryoshka models."""

    normalize: bool | None = None
    """Length of the vectors. None: as the model gives them; True: 1; False: raw, as before its last normalization."""

    long_text: Literal["error", "truncate", "chunk"] = "error"
    """What becomes of a text longer than the model's limit.

    "truncate" cuts it by the server's own tokenizer; "chunk" takes the token-weighted mean of pieces that fit.
    """

    blank_text: Literal["send", "zero", "error"] = "send"
    """What becomes of a text without a visible character; "zero" gives a vector of zeros."""

    unicode: Literal["nfc", "nfkc"] | None = "nfc"
    """Normalization form. None sends texts as they are and refuses what UTF-8 cannot hold."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Most texts in one request."""

    max_batch_chars: Annotated[int, Field(ge=1)] = 200_000
    """Most characters in one request. A longer text travels alone."""

    max_concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    """Most requests in flight to each replica, whatever calls run together."""

    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """Seconds for one whole request; connecting takes at most 10 of them."""

    max_retries: Annotated[int, Field(ge=0)] = 5
    """Most further attempts of one request."""

    retry_deadline: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0
    """Seconds from a request's first failure to giving up."""

    default_headers: Annotated[dict[str, str] | None, BeforeValidator(_address.headers)] = None
    """Sent with every request; they win over our own."""

    extra_body: Annotated[dict[str, Any] | None, AfterValidator(_checks.body)] = None
    """Further vLLM request fields, such as {"priority": 1}."""

    verify: bool | str | None = None
    """TLS: a path of CA certificates, False for none, None for the system's."""

    proxy: Annotated[str | None, AfterValidator(_address.proxy)] = None
    """URL of an HTTP or SOCKS proxy. None: the environment's HTTP_PROXY and NO_PROXY."""

    http_client: SkipJsonSchema[httpx.Client | None] = Field(default=None, exclude=True)
    """A client of your own. Never closed here; it cannot be pickled or used in a forked child."""

    expect: Annotated[SkipJsonSchema[InstanceOf[Fingerprint]] | str | None, BeforeValidator(_checks.expectation)] = (
        Field(default=None, exclude=True)
    )
    """A `Fingerprint`, or the path of a saved one: checked on first use, other vectors are refused."""

    show_progress: bool = False
    """A tqdm bar on stderr, in documents."""

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic makes from the fields

        def __init__(self, /, **options: Any) -> None:
            try:
                super().__init__(**self._placed(self._canonical(options)))
            except ValidationError as exc:
                raise ConfigurationError(_told.told(exc, options)) from None

        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> Self:
            """As pydantic's, with the constructor's errors."""
            with _told.in_our_words():
                return super().model_validate(obj, **options)

        @classmethod
        def model_validate_json(cls, json_data: Any, **options: Any) -> Self:
            """As pydantic's, with the constructor's errors."""
            with _told.in_our_words():
                return super().model_validate_json(json_data, **options)

        def __setattr__(self, name: str, value: Any) -> None:
            if self.aliases.get(name, name) in Settings.model_fields:
                raise ConfigurationError(f"{name} is frozen; model_copy(update={{{name!r}: ...}}) gives a changed copy")
            super().__setattr__(name, value)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.engine_args and not self.in_process:
            raise ValueError("engine_args: only with in_process=True; a server takes them on its command line")
        if self.in_process and self.model is None:
            raise ValueError("model: with in_process=True, name a hub id or a folder")
        return self

    @model_validator(mode="after")
    def _client_alone(self) -> Self:
        if self.http_client is not None and (self.verify is not None or self.proxy is not None):
            raise ValueError("verify and proxy belong to the http_client that was given: set them there")
        return self

    @classmethod
    def _canonical(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options under our own names; unknown ones are refused, tokenizer options dropped with a warning."""
        known: dict[str, Any] = {}
        for name, value in options.items():
            ours = cls.aliases.get(name, name)
            if name in _IGNORED:
                continue
            if ours not in cls.model_fields:
                raise ConfigurationError(_told.unknown(cls.__name__, name, [*cls.model_fields, *cls.aliases]))
            if ours in known and known[ours] != value:
                raise ConfigurationError(f"{ours} is given twice, once as {name}: leave one of them out")
            known[ours] = value
        if ignored := sorted(_IGNORED & options.keys()):
            warnings.warn(
                f"{', '.join(ignored)}: ignored. Texts are sent as text and the server's own tokenizer reads them, so "
                "there is nothing to count or split here; for texts over the model's limit see long_text.",
                UserWarning,
                stacklevel=3,
            )
        return known

    @classmethod
    def _placed(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options with either a server or, in process, none, whatever the environment says."""
        if options.get("in_process") is not True:
            return options
        if given := _engine_args.given(options):
            raise ConfigurationError(
                f"{', '.join(given)}: for a server only; with in_process=True vLLM runs in this process, leave it out"
            )
        return {**options, **_engine_args.NEUTRAL}

    @field_serializer("base_url", "proxy")
    def _hide_credentials(self, value: str | list[str] | None) -> Any:
        return _address.hidden(value)

    @field_serializer("default_headers")
    def _hide_headers(self, value: dict[str, str] | None) -> dict[str, str] | None:
        return None if value is None else dict.fromkeys(value, "***")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            if self.in_process and name in _engine_args.NEUTRAL:
                continue
            if name in {"base_url", "proxy"}:
                yield name, _address.hidden(value)
            elif name == "default_headers":
                yield name, self._hide_headers(value)
            elif name != "http_client":
                yield name, value

    def settings(self) -> dict[str, Any]:
        """Every option and its value, secrets included: what makes an equal object."""
        absent = _engine_args.NEUTRAL if self.in_process else ()
        return {name: getattr(self, name) for name in Settings.model_fields if name not in absent}

    def _arguments(self) -> dict[str, Any]:
        """What the constructor needs to make this object again. An adapter adds its framework's fields."""
        return self.settings()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some settings changed, validated anew, that shares no connection with this one."""
        arguments = self._arguments()
        client = arguments.pop("http_client")  # is shared: connections cannot be copied
        if deep:
            arguments = copy.deepcopy(arguments)
        changes = self._canonical(update or {})
        kept = {**arguments, "http_client": client}
        if changes.get("in_process"):
            kept = {name: value for name, value in kept.items() if name not in _engine_args.SERVERS}
        return type(self)(**{**kept, **changes})

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy(deep=True)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.http_client is not None:
            raise ConfigurationError(
                f"{type(self).__name__} holds an http_client, which cannot be pickled: leave http_client out and set "
                "verify, proxy and default_headers, or make the object in the process that uses it"
            )
        return _restore, (type(self), self._arguments())


def _restore(cls: type[Settings], arguments: dict[str, Any]) -> Settings:
    return cls(**arguments)
