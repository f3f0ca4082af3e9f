"""Requests as frozen structs, and the decoding that turns bad input into a 400 naming the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from lock_manager.api.errors import ApiError
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Keepalive,
    LockType,
    Release,
    fingerprint,
)

MAX_JSON_DEPTH = 64
MAX_LOCKS = 64  # in one request
MAX_NAME_BYTES = 256
MAX_WAIT_MS = 86_400_000
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES)]
Permits = Annotated[int, Meta(ge=1, le=1 << 31)]
Token = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Ttl = Annotated[int, Meta(ge=1, le=1 << 40)]

T = TypeVar("T")
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<field>[^`]*)`")
# 19 digits can exceed 64 bits; most bodies have no such run and are never walked.
_LONG_NUMBER = re.compile(rb"\d{19}")


class LockAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One lock of `POST /acquire`."""

    lock_name: Name
    lock_type: LockType = LockType.EXCLUSIVE
    permits: Permits | None = None
    limit: Permits | None = None


class AcquireBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /acquire: one lock by `lock_name`, or several, all or nothing, by `locks`."""

    client_id: Name
    lock_name: Name | None = None
    lock_type: LockType = LockType.EXCLUSIVE
    permits: Permits | None = None
    limit: Permits | None = None
    locks: Annotated[list[LockAsk], Meta(min_length=1, max_length=MAX_LOCKS)] | None = None
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 10_000
    ttl_ms: Ttl | None = None
    request_id: Name | None = None


class ReleaseBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /release."""

    lock_name: Name
    client_id: Name
    fencing_token: Token | None = None
    request_id: Name | None = None


class ReleaseAllBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /release_all."""

    client_id: Name


class KeepaliveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /keepalive."""

    client_id: Name
    ttl_ms: Ttl | None = None


class ForceReleaseBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/force_release: from one client, or from every holder."""

    lock_name: Name
    reason: Name
    client_id: Name | None = None


class TransferBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/transfer: to the named node, or to the one that is furthest."""

    target: Name | None = None


class MembersBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/members. The addresses are needed to add a node."""

    action: Literal["add", "remove"]
    id: Name
    raft_addr: Name | None = None
    http_addr: Name | None = None


class ConsistencyQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stale`: what this node knows, without asking anybody."""

    consistency: Literal["linearizable", "stale"] = "linearizable"


class LocksQuery(ConsistencyQuery, frozen=True, forbid_unknown_fields=True):
    """GET /locks."""

    most: Annotated[int, Meta(ge=1, le=100_000)] = 10_000


class ValidateQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /validate."""

    lock_name: Name
    fencing_token: Token


def acquire_command(body: AcquireBody) -> Acquire:
    """Raises ApiError 400 for fields that contradict each other."""
    check_name(body.client_id, "client_id")
    if body.locks is None:
        if body.lock_name is None:
            raise ApiError(400, "Missing field", field="lock_name")
        asks: tuple[Ask, ...] = (
            _ask(body.lock_name, body.lock_type, body.permits, body.limit, ""),
        )
    else:
        if body.lock_name is not None:
            raise ApiError(400, "Invalid field", field="locks", detail="Not beside lock_name")
        if body.permits is not None or body.limit is not None:
            field = "limit" if body.permits is None else "permits"
            raise ApiError(400, "Invalid field", field=field, detail="Belongs into locks")
        asks = tuple(
            [
                _ask(one.lock_name, one.lock_type, one.permits, one.limit, f"locks[{i}].")
                for i, one in enumerate(body.locks)
            ]
        )
        if len({ask.lock_name for ask in asks}) < len(asks):
            raise ApiError(400, "Invalid field", field="locks", detail="Names a lock twice")
    request_id = check_name(body.request_id or "", "request_id")
    command = Acquire(body.client_id, asks, body.wait_ms, body.ttl_ms or 0, request_id)
    if not request_id:
        return command
    return msgspec.structs.replace(command, fingerprint=fingerprint(command))


def _ask(name: str, lock_type: LockType, permits: int | None, limit: int | None, at: str) -> Ask:
    check_name(name, f"{at}lock_name")
    if lock_type is not LockType.SEMAPHORE:
        if permits is not None or limit is not None:
            field = "limit" if permits is None else "permits"
            raise ApiError(400, "Invalid field", field=at + field, detail="Only for a semaphore")
        return Ask(name, lock_type)
    if limit is None:
        raise ApiError(400, "Missing field", field=f"{at}limit")
    if (permits or 1) > limit:
        raise ApiError(400, "Invalid field", field=f"{at}permits", detail="Expected at most limit")
    return Ask(name, lock_type, permits or 1, limit)


def release_command(body: ReleaseBody) -> Release:
    check_name(body.lock_name, "lock_name")
    check_name(body.client_id, "client_id")
    request_id = check_name(body.request_id or "", "request_id")
    command = Release(body.client_id, body.lock_name, body.fencing_token or 0, request_id)
    if not request_id:
        return command
    return msgspec.structs.replace(command, fingerprint=fingerprint(command))


def keepalive_command(body: KeepaliveBody) -> Keepalive:
    return Keepalive(check_name(body.client_id, "client_id"), body.ttl_ms or 0)


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type, whatever the Content-Type says.

    Raises ApiError 400, or aiohttp's 413.
    """
    return decode_json(await request.read(), decoder)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Raises ApiError 400."""
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


def check_name(value: str, field: str) -> str:
    """Names are at most 256 *bytes* (msgspec counts characters) and hold no NUL."""
    if len(value) > 64 and len(value.encode()) > MAX_NAME_BYTES:
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
