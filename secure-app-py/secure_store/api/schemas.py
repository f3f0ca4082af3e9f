"""Requests as frozen structs, and the decoding that turns bad input into a 400 naming the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from secure_store.api.errors import ApiError
from secure_store.core.policy import PolicyError, Rule, Verb, check_key, check_path

MAX_JSON_DEPTH = 64
MAX_VALUE_BYTES = 1 << 20

T = TypeVar("T")
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<field>[^`]*)`")
# 19 digits can exceed 64 bits; most bodies have no such run and are never walked.
_LONG_NUMBER = re.compile(rb"\d{19}")


# Patterns stand in /openapi.json only (core.policy checks more than they say).
_NO_CONTROLS = {"pattern": r"^[^\u0000-\u001f\u007f]+$", "examples": ["a/b"]}
Key = Annotated[str, Meta(min_length=1, max_length=256, extra_json_schema=_NO_CONTROLS)]
RoleName = Annotated[str, Meta(extra_json_schema={"pattern": r"^[a-z][a-z0-9._-]{0,63}$"})]
VersionNumber = Annotated[int, Meta(ge=1, le=1 << 53)]
ExpectedVersion = Annotated[int, Meta(ge=0, le=1 << 53)]
PositiveMs = Annotated[int, Meta(ge=1, le=10 * 365 * 86_400_000)]


class SetBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /set. `expected_version`: what a read gives now, 0 for nothing."""

    key: Key
    value: msgspec.Raw
    expected_version: ExpectedVersion | None = None
    ttl_ms: PositiveMs | None = None


class DeleteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /delete: soft, the newest version can be undeleted."""

    key: Key
    expected_version: ExpectedVersion | None = None


class VersionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /undelete (default: the newest version) and /destroy (default: the whole key)."""

    key: Key
    version: VersionNumber | None = None


class TxnOp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operation of a transaction; `value` belongs to set, `check` needs expected_version."""

    op: Literal["set", "delete", "check"]
    key: Key
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    expected_version: ExpectedVersion | None = None
    ttl_ms: PositiveMs | None = None


class TxnBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /txn: all or nothing."""

    ops: Annotated[tuple[TxnOp, ...], Meta(min_length=1, max_length=128)]


class TokenBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /tokens."""

    roles: Annotated[tuple[RoleName, ...], Meta(min_length=1, max_length=16)]
    ttl_ms: PositiveMs | None = None
    uses: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    name: Annotated[str, Meta(max_length=64)] = ""


class RevokeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """DELETE /tokens."""

    accessor: Annotated[str, Meta(min_length=1, max_length=64)]


class PolicyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PUT /policies/{role}."""

    rules: tuple[Rule, ...]


class PromoteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/promote. `force`: my word that the old primary is stopped."""

    force: bool = False


class RotateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/rotate. `master`: the master key too, taken from `<master key>.next`."""

    master: bool = False


class GetQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    version: VersionNumber | None = None


class KeyQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key


class ListQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prefix: Annotated[str, Meta(max_length=256)] = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: Annotated[str, Meta(max_length=512)] = ""


class CheckQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    verb: Verb
    key: Key


class WatchQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prefix: Annotated[str, Meta(max_length=256)] = ""


class AuditQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


async def read_json(
    request: web.Request, decoder: msgspec.json.Decoder[T], *, empty: bool = False
) -> T:
    """The body as the decoder's type, whatever the Content-Type says; `empty`: no body is `{}`.

    Raises ApiError 400, or aiohttp's 413.
    """
    body = await request.read() or (b"{}" if empty else b"")
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


def checked_key(key: str, field: str = "key") -> str:
    """A clean key (see core.policy.check_path); raises ApiError 400."""
    try:
        check_key(key)
    except PolicyError as e:
        raise ApiError(400, "Invalid field", field=field, detail=str(e)) from None
    return key


def checked_prefix(prefix: str, field: str) -> str:
    """Empty, or the beginning of a clean key; raises ApiError 400."""
    if prefix:
        try:
            check_path(prefix, field)
        except PolicyError as e:
            raise ApiError(400, "Invalid field", field=field, detail=str(e)) from None
    return prefix


def compact(raw: msgspec.Raw, field: str = "value") -> bytes:
    """A JSON value as compact text, at most MAX_VALUE_BYTES; raises ApiError 400 or 413."""
    try:
        text = msgspec.json.encode(msgspec.json.decode(raw))
    except (msgspec.MsgspecError, UnicodeError, ValueError):
        raise ApiError(400, "Invalid JSON", field=field) from None
    if len(text) > MAX_VALUE_BYTES:
        raise ApiError(413, "Value too large", field=field, max_bytes=MAX_VALUE_BYTES)
    return text


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
