"""Requests as frozen structs, and the decoding that turns bad input into a 400 naming the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from message_queue.api.errors import ApiError
from message_queue.core.operations import (
    MAX_BATCH,
    MAX_DELAY_MS,
    MAX_LIFETIME_MS,
    MAX_VISIBILITY_MS,
    MAX_WAIT_MS,
)

MAX_JSON_DEPTH = 64
Name = Annotated[str, Meta(min_length=1, max_length=256)]

T = TypeVar("T")
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<field>[^`]*)`")
# 19 digits can exceed 64 bits; most bodies have no such run and are never walked.
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_LONG_NUMBER = re.compile(rb"\d{19}")
_DIGITS = b"0123456789"


Visibility = Annotated[int, Meta(ge=0, le=MAX_VISIBILITY_MS)]
Delay = Annotated[int, Meta(ge=0, le=MAX_DELAY_MS)]
Lifetime = Annotated[int, Meta(ge=1, le=MAX_LIFETIME_MS)]
Priority = Annotated[int, Meta(ge=0, le=9)]
Most = Annotated[int, Meta(ge=1, le=MAX_BATCH)]
Receipt = Annotated[str, Meta(max_length=64)]
"""Opaque to clients: one that was never given is refused like one that is overtaken (409)."""
MessageId = Annotated[str, Meta(min_length=1, max_length=256)]


Headers = dict[str, str | int | float | bool | None]
Forms = Sequence[Mapping[str, object]]
"""JSON schemas, exactly one of which a body has to fit."""


class MessageBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message in `messages`."""

    body: msgspec.Raw
    headers: Headers | None = None
    delay_ms: Delay = 0
    priority: Priority = 0
    ttl_ms: Lifetime | None = None
    dedupe_id: Name | None = None
    group_id: Name | None = None


class ProduceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /produce: `body` (one message) or `messages` (a batch)."""

    queue: Name
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    headers: Headers | None = None
    delay_ms: Delay = 0
    priority: Priority = 0
    ttl_ms: Lifetime | None = None
    dedupe_id: Name | None = None
    group_id: Name | None = None
    messages: (
        Annotated[list[MessageBody], Meta(min_length=1, max_length=MAX_BATCH)] | msgspec.UnsetType
    ) = msgspec.UNSET


ONE_OR_MANY: Forms = [
    {"required": ["body"], "not": {"required": ["messages"]}},
    {
        "required": ["messages"],
        "not": {"required": ["body"]},
        "properties": {  # they belong into each message
            "headers": {"enum": [None, {}]},
            "delay_ms": {"const": 0},
            "priority": {"const": 0},
            "ttl_ms": {"type": "null"},
            "dedupe_id": {"type": "null"},
            "group_id": {"type": "null"},
        },
    },
]
"""Of ProduceBody, as a JSON schema says it."""


class ConsumeQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /consume."""

    queue: Name
    max: Most | None = None
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    visibility_ms: Visibility | None = None
    forward: bool = True


class NextBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to fetch after an ack."""

    queue: Name
    max: Most | None = None
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    visibility_ms: Visibility | None = None


class AckBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /ack: `message_id` or `message_ids`."""

    message_id: MessageId | None = None
    message_ids: Annotated[list[MessageId], Meta(min_length=1, max_length=MAX_BATCH)] | None = None
    receipt: Receipt | None = None
    next: NextBody | None = None


ONE_ID_OR_MANY: Forms = [
    {
        "required": ["message_id"],
        "properties": {"message_id": {"type": "string"}, "message_ids": {"type": "null"}},
    },
    {
        "required": ["message_ids"],
        "properties": {
            "message_ids": {"type": "array"},
            "message_id": {"type": "null"},
            "receipt": {"type": "null"},
        },
    },
]
"""Of AckBody, as a JSON schema says it."""


class NackBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /nack."""

    message_id: MessageId
    receipt: Receipt | None = None
    delay_ms: Delay = 0


class ExtendBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /extend."""

    message_id: MessageId
    visibility_ms: Visibility
    receipt: Receipt | None = None


class SettingsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PUT /queues/{q}: what is left out stays as it is."""

    visibility_ms: Visibility | msgspec.UnsetType = msgspec.UNSET
    max_deliveries: Annotated[int, Meta(ge=1, le=1000000)] | msgspec.UnsetType | None = (
        msgspec.UNSET
    )
    dead_letter: Name | msgspec.UnsetType | None = msgspec.UNSET
    retention_ms: Lifetime | msgspec.UnsetType | None = msgspec.UNSET
    max_length: Annotated[int, Meta(ge=1, le=1000000000)] | msgspec.UnsetType | None = msgspec.UNSET


class RouteQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether another node may be asked."""

    forward: bool = True


class PeekQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /queues/{q}/peek."""

    max: Most = 1
    forward: bool = True


class RedriveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same in the body, which may be left out."""

    max: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None


class RedriveQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /queues/{q}/redrive: `q` is the source, or the dead letter queue itself. Without `max`:
    all that are there."""

    max: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None
    forward: bool = True


class RingQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /ring."""

    queue: Name | None = None


class RingBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/join and /admin/leave: a node's `host:port`, as its `--addr` names it."""

    addr: Annotated[str, msgspec.Meta(min_length=3, max_length=300)]


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameter is known here."""


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type, whatever the Content-Type says.

    Raises ApiError 400, or aiohttp's 413.
    """
    return decode_json(await request.read(), decoder)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A JSON text as the decoder's type. Raises ApiError 400."""
    try:
        if not body.isascii():
            body.decode()  # msgspec.Raw takes its bytes as they are
        value = decoder.decode(body)
        if may_be_deep(body) or may_hold_long_number(body):
            check_extremes(msgspec.json.decode(body))
    except msgspec.ValidationError as e:
        raise _bad_field_unless_no_json(body, e) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ApiError(400, "Invalid JSON") from None
    except RecursionError:
        raise ApiError(400, "JSON nested too deeply") from None
    return value


def _bad_field_unless_no_json(body: bytes, e: msgspec.ValidationError) -> ApiError:
    """The typed decoder stops at the first bad field, even if what follows is no JSON at all."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ApiError(400, "Invalid JSON")
    except RecursionError:
        return ApiError(400, "JSON nested too deeply")
    return bad_field(e)


def read_query(request: web.Request, struct: type[T]) -> T:
    """The query string as `struct` (numbers are read from text); raises ApiError 400."""
    try:
        return msgspec.convert(dict(request.query), struct, strict=False)
    except msgspec.ValidationError as e:
        raise bad_field(e) from None


def bad_field(e: msgspec.ValidationError) -> ApiError:
    """msgspec's sentence as ours: the field by its path (`locks[0].name`), and what is wrong."""
    match = _PATH.match(str(e))
    what, path = (match["what"], match["path"] or "") if match else (str(e), "")
    if named := _NAMED.match(what):
        field = f"{path}.{named['field']}" if path else named["field"]
        sentence = "Missing field" if "missing" in what else "Unknown field"
        return ApiError(400, sentence, field=field)
    if not path:
        return ApiError(400, "Invalid JSON", detail=what)
    return ApiError(400, "Invalid field", field=path, detail=what)


def may_be_deep(text: bytes) -> bool:
    """Whether values lie in more than MAX_JSON_DEPTH others (in one more at least). `text`: valid
    JSON. A batch of a thousand small objects has more brackets than that and is not deep: they are
    left alone and taken away from within, a level by each of a few calls."""
    if text.count(b"[") + text.count(b"{") <= MAX_JSON_DEPTH:
        return False
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Without escaped quotes, every other piece between quotes is a string's content.
    brackets = b"".join(text.split(b'"')[::2]).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def may_hold_long_number(text: bytes) -> bool:
    """Whether a number in it may be beyond 64 bits. To count digits costs a tenth of looking for
    19 in a row."""
    digits = len(text) - len(text.translate(None, _DIGITS))
    return digits >= 19 and _LONG_NUMBER.search(text) is not None


def check_name(value: str, field: str) -> str:
    """Names are at most 256 *bytes* (msgspec counts characters) and hold no NUL."""
    if len(value) > 64 and len(value.encode()) > 256:
        raise ApiError(400, "Invalid field", field=field, detail="Expected at most 256 bytes")
    if "\x00" in value:
        raise ApiError(400, "Invalid field", field=field, detail="Expected no NUL")
    return value


def check_extremes(value: Any) -> None:
    """Refuse deep nesting, and integers beyond 64 bits (msgpack cannot carry them)."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
                raise ApiError(400, "Invalid JSON", detail="Integer beyond 64 bits")
        if not deeper:
            return
        level = deeper
    raise ApiError(400, "JSON nested too deeply")
