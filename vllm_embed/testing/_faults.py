"""What can go wrong between a client and vLLM, as data: each fault says what to answer and how to deliver it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Literal, TypeAlias

import numpy as np

from vllm_embed.testing._http import AS_USUAL, Delivery, Reply
from vllm_embed.testing._replies import html, json_reply, plain_error
from vllm_embed.testing._vectors import Vector

Rows: TypeAlias = list[tuple[int, Vector]]  # index and vector of each entry of a reply's `data`, before it is encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong with one embedding request; order it with `FakeVLLMServer.order`.

    The class methods name the usual ones. Two combine with `dataclasses.replace`, for example a late error:
    `replace(Fault.status(503), delay_s=0.5)`.

    Attributes:
        name: for messages.
        delay_s: seconds to wait before anything else.
        reply: answered instead of the embeddings, without looking at the request.
        rows: changes the rows of a good reply.
        encoding: used whatever the request asks for.
        usage: whether a good reply has its `usage`.
        body: changes the bytes of the body; the content-length is that of the changed ones.
        delivery: how the reply travels.
    """

    name: str
    delay_s: float = 0.0
    reply: Reply | None = None
    rows: Callable[[Rows], Rows] | None = None
    encoding: Literal["float"] | None = None
    usage: bool = True
    body: Callable[[bytes], bytes] | None = None
    delivery: Delivery = AS_USUAL

    @classmethod
    def status(
        cls, status: int, *, headers: Mapping[str, str] | None = None, body: object = None, html_page: bool = False
    ) -> "Fault":
        """Another status.

        Args:
            status: HTTP status code.
            headers: added to the reply, for example `{"Retry-After": "1"}`.
            body: bytes or str as they are, anything else as JSON. None: vLLM's error body with the status's name.
            html_page: True: nginx's page instead of vLLM's JSON.
        """
        if isinstance(body, bytes | str):
            reply = Reply(status, body.encode() if isinstance(body, str) else body)
        elif body is not None:
            reply = json_reply(body, status)
        else:
            reply = html(status) if html_page else plain_error(status)
        return cls(name=f"status {status}", reply=replace(reply, headers=reply.headers | dict(headers or {})))

    @classmethod
    def html(cls) -> "Fault":
        """A 200 that is nginx's welcome page: the URL leads to something that is not vLLM."""
        return cls(name="html", reply=html(title="Welcome to nginx!"))

    @classmethod
    def redirect(cls, url: str, *, status: int = HTTPStatus.TEMPORARY_REDIRECT) -> "Fault":
        """A redirect to `url`."""
        return cls(name="redirect", reply=Reply(status, content_type=None, headers={"location": url}))

    @classmethod
    def delay(cls, seconds: float) -> "Fault":
        """The right reply, late."""
        return cls(name="delay", delay_s=seconds)

    @classmethod
    def reset(cls) -> "Fault":
        """RST before the first byte of a reply."""
        return cls(name="reset", reply=Reply(200), delivery=Delivery(sends="nothing", then="reset"))

    @classmethod
    def reset_mid_body(cls) -> "Fault":
        """RST after half the body."""
        return cls(name="reset_mid_body", delivery=Delivery(sends="half the body", then="reset"))

    @classmethod
    def close(cls) -> "Fault":
        """FIN without a reply, as a server that was just stopped, or closed an idle connection at that moment."""
        return cls(name="close", reply=Reply(200), delivery=Delivery(sends="nothing", then="close"))

    @classmethod
    def close_mid_body(cls) -> "Fault":
        """FIN after half the body."""
        return cls(name="close_mid_body", delivery=Delivery(sends="half the body", then="close"))

    @classmethod
    def trickle(cls, bytes_per_s: float) -> "Fault":
        """The right reply, its body a few bytes at a time."""
        return cls(name="trickle", delivery=Delivery(body_bytes_per_s=bytes_per_s))

    @classmethod
    def trickle_headers(cls, bytes_per_s: float) -> "Fault":
        """The right reply, its headers a few bytes at a time."""
        return cls(name="trickle_headers", delivery=Delivery(head_bytes_per_s=bytes_per_s))

    @classmethod
    def truncated_json(cls) -> "Fault":
        """Half the JSON, and a content-length that agrees with it."""
        return cls(name="truncated_json", body=_first_half)

    @classmethod
    def shuffled(cls) -> "Fault":
        """A right reply in another order: the rows reversed, each with its own index."""
        return cls(name="shuffled", rows=_reverse)

    @classmethod
    def short(cls) -> "Fault":
        """The last row missing."""
        return cls(name="short", rows=_drop_last)

    @classmethod
    def long(cls) -> "Fault":
        """One row too many, with the next index."""
        return cls(name="long", rows=_add_one)

    @classmethod
    def duplicate_index(cls) -> "Fault":
        """The last row with the index of the first; of a single text, two rows of index 0."""
        return cls(name="duplicate_index", rows=_repeat_first_index)

    @classmethod
    def nan(cls, *, row: int = 0) -> "Fault":
        """One NaN in the vector of text `row`: in base64 it arrives as NaN, in a list of floats as null."""
        return cls(name="nan", rows=partial(_change, row=row, change=_with_nan))

    @classmethod
    def null(cls, *, row: int = 0) -> "Fault":
        """One null in the vector of text `row`, in a list of floats whatever was asked for."""
        return cls(name="null", rows=partial(_change, row=row, change=_with_nan), encoding="float")

    @classmethod
    def wrong_width(cls, *, row: int = 0) -> "Fault":
        """The vector of text `row` one number short."""
        return cls(name="wrong_width", rows=partial(_change, row=row, change=_without_last))

    @classmethod
    def narrower(cls) -> "Fault":
        """All vectors one number short: another model than before."""
        return cls(name="narrower", rows=_all_without_last)

    @classmethod
    def float_reply(cls) -> "Fault":
        """A right reply with lists of floats, whatever was asked for."""
        return cls(name="float_reply", encoding="float")

    @classmethod
    def no_usage(cls) -> "Fault":
        """A right reply without `usage`."""
        return cls(name="no_usage", usage=False)

    def deliver(self, reply: Reply) -> Reply:
        """`reply` as this fault sends it."""
        body = self.body(reply.body) if self.body else reply.body
        return replace(reply, body=body, delivery=self.delivery)


def _first_half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _reverse(rows: Rows) -> Rows:
    return rows[::-1]


def _drop_last(rows: Rows) -> Rows:
    return rows[:-1]


def _add_one(rows: Rows) -> Rows:
    return [*rows, (len(rows), rows[-1][1])]


def _repeat_first_index(rows: Rows) -> Rows:
    kept = rows[:-1] or rows
    return [*kept, (rows[0][0], rows[-1][1])]


def _change(rows: Rows, row: int, change: Callable[[Vector], Vector]) -> Rows:
    return [(index, change(vector) if index == row else vector) for index, vector in rows]


def _with_nan(vector: Vector) -> Vector:
    changed = vector.copy()
    changed[len(changed) // 2] = np.nan
    return changed


def _without_last(vector: Vector) -> Vector:
    return vector[:-1]


def _all_without_last(rows: Rows) -> Rows:
    return [(index, _without_last(vector)) for index, vector in rows]
