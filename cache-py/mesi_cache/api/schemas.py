"""Requests as frozen structs, and the decoding that turns bad input into a 400 naming the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from mesi_cache.api.errors import ApiError
from mesi_cache.core import records

MAX_KEY_BYTES = 256
MAX_JSON_DEPTH = 64
MAX_BATCH = 1000
IDEMPOTENCY_KEY = "Idempotency-Key"
NAME: dict[str, object] = {
    "name": IDEMPOTENCY_KEY, "in": "header", "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[!-~ ]+$"},
    "description": "The same key again, at any node, within an hour: the same answer, one effect",
}  # fmt: skip
MAX_TTL_MS = 10 * 365 * 86_400_000
Key = Annotated[str, Meta(min_length=1, max_length=MAX_KEY_BYTES)]
Version = Annotated[int, Meta(ge=0, le=1 << 62)]

Asked = tuple[str, records.Operation]  # a key, and what to do with it
T = TypeVar("T")
_encoder = msgspec.json.Encoder()
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<field>[^`]*)`")
# 19 digits can exceed 64 bits; most bodies have no such run and are never walked.
_VISIBLE = re.compile(r"[!-~](?:[ -~]{0,254}[!-~])?")
_LONG_NUMBER = re.compile(rb"\d{19}")


class Write(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /write, and one item of POST /mwrite."""

    key: Key
    value: msgspec.Raw
    ttl_ms: Annotated[int, Meta(ge=1, le=MAX_TTL_MS)] | None = None


class Cas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /cas: write if the version is still `expected_version` (0: if the key is absent)."""

    key: Key
    expected_version: Version
    value: msgspec.Raw


class Delete(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /delete."""

    key: Key


class Incr(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /incr: add `by` to an integer; an absent key counts as 0."""

    key: Key
    by: Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)] = 1


class ReadMany(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /mread."""

    keys: Annotated[list[Key], Meta(max_length=MAX_BATCH)]


class WriteMany(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /mwrite."""

    items: Annotated[list[Write], Meta(max_length=MAX_BATCH)]


class KeyQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /read and GET /directory."""

    key: Key


class MetricsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /metrics."""

    format: Literal["json", "prometheus"] | None = None


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type, whatever the Content-Type says.

    Raises ApiError 400, or aiohttp's 413.
    """
    return decode_json(await request.read(), decoder)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """`body` as the decoder's type. Raises ApiError 400."""
    try:
        value = decoder.decode(body)
        if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH or _LONG_NUMBER.search(body):
            _check_extremes(msgspec.json.decode(body))
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


def compact(value: msgspec.Raw, field: str = "value") -> bytes:
    """A client's value as it is kept and given back: the same JSON without spaces. Raises ApiError
    400 for what is no JSON value after all (a lone surrogate, a number beyond a double)."""
    try:
        return _encoder.encode(msgspec.json.decode(value))
    except (msgspec.MsgspecError, UnicodeError, OverflowError) as e:
        raise ApiError(400, "Invalid field", field=field, detail=str(e)) from None
    except RecursionError:
        raise ApiError(400, "JSON nested too deeply", field=field) from None


_write = msgspec.json.Decoder(Write)
_cas = msgspec.json.Decoder(Cas)
_delete = msgspec.json.Decoder(Delete)
_incr = msgspec.json.Decoder(Incr)


def decode_write(body: bytes) -> Asked:
    write = decode_json(body, _write)
    return check_key(write.key), records.Write(compact(write.value), write.ttl_ms or 0)


def decode_cas(body: bytes) -> Asked:
    cas = decode_json(body, _cas)
    return check_key(cas.key), records.Cas(cas.expected_version, compact(cas.value))


def decode_delete(body: bytes) -> Asked:
    return check_key(decode_json(body, _delete).key), records.Delete()


def decode_incr(body: bytes) -> Asked:
    incr = decode_json(body, _incr)
    return check_key(incr.key), records.Incr(incr.by)


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


def idempotency_key(request: web.Request) -> str:
    """The header's text: 1 to 256 visible ASCII characters, once. Raises ApiError 400."""
    values = request.headers.getall(IDEMPOTENCY_KEY)
    if len(values) != 1 or not _VISIBLE.fullmatch(values[0]):
        detail = "Expected one, of 1 to 256 visible ASCII characters"
        raise ApiError(400, "Invalid field", field=IDEMPOTENCY_KEY, detail=detail)
    return values[0]


def check_key(value: str, field: str = "key") -> str:
    """Keys are at most 256 *bytes* (msgspec counts characters) and hold no NUL."""
    if len(value) > 64 and len(value.encode()) > MAX_KEY_BYTES:
        raise ApiError(400, "Invalid field", field=field, detail="Expected at most 256 bytes")
    if "\x00" in value:
        raise ApiError(400, "Invalid field", field=field, detail="Expected no NUL")
    return value


def _check_extremes(value: Any) -> None:
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
