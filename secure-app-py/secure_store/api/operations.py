"""Keys: get, set, delete, list, history, txn, watch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import msgspec
from aiohttp import web

from secure_store.api import access
from secure_store.api.errors import SAFE_HEADERS, ApiError, json_response
from secure_store.api.express import PLAIN_GET
from secure_store.api.keys import (
    AUDITED,
    AUDITED_KEY,
    PRINCIPAL,
    REQUEST_ID,
    SERVICE,
    WATCHES,
    Service,
)
from secure_store.api.reply import DEGRADED, Reply
from secure_store.api.schemas import (
    DeleteBody,
    GetQuery,
    KeyQuery,
    ListQuery,
    SetBody,
    TxnBody,
    TxnOp,
    VersionBody,
    WatchQuery,
    checked_key,
    checked_prefix,
    compact,
    read_json,
    read_query,
)
from secure_store.api.watch import LOST, Watcher
from secure_store.core.plan import (
    CheckOp,
    DeleteOp,
    DestroyOp,
    Idempotency,
    Op,
    OpFailed,
    SetOp,
    UndeleteOp,
    Write,
)

IDEMPOTENCY_MS = 24 * 3_600_000
_set = msgspec.json.Decoder(SetBody)
_delete = msgspec.json.Decoder(DeleteBody)
_version = msgspec.json.Decoder(VersionBody)
_txn = msgspec.json.Decoder(TxnBody)
_encode = msgspec.json.Encoder().encode


def _reading(request: web.Request) -> dict[str, str]:
    return {"X-Replication": "degraded"} if request.app[SERVICE].is_degraded() else {}


def not_found() -> ApiError:
    return ApiError(404, "Key not found")


async def get(request: web.Request) -> web.StreamResponse:
    asked = PLAIN_GET.fullmatch(request.raw_path)
    if asked is not None and ".." not in asked[1]:  # the usual case: nothing to decode or refuse
        key, wanted = asked[1], None
    else:
        query = read_query(request, GetQuery)
        key, wanted = checked_key(query.key), query.version
    request[AUDITED_KEY] = key
    service = request.app[SERVICE]
    if not service.allows(request[PRINCIPAL], "read", key):
        raise access.forbidden()
    access.check_read_from(request, service)
    if service.is_unsettled():
        await service.settled(key)
    found = service.read(key, wanted)
    if found is None:
        raise not_found()
    version, text = found
    body = b'{"key":%s,"value":%s}' % (_encode(key), text)
    return Reply(body, version=version, more=DEGRADED if service.is_degraded() else b"")


async def set_value(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _set)
    key = request[AUDITED_KEY] = checked_key(body.key)
    text = compact(body.value)
    access.require(request, "write", key)
    answer = b'{"status":"ok","key":%s,"value":%s}' % (_encode(key), text)
    op = SetOp(key, text, body.expected_version, body.ttl_ms)
    return await write(request, (op,), lambda _: answer)


async def delete(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _delete)
    key = request[AUDITED_KEY] = checked_key(body.key)
    access.require(request, "delete", key)
    op = DeleteOp(key, body.expected_version)
    return await write(request, (op,), lambda _: _encode({"status": "ok", "key": key}))


async def undelete(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _version)
    key = request[AUDITED_KEY] = checked_key(body.key)
    access.require(request, "delete", key)
    op = UndeleteOp(key, body.version)
    return await write(request, (op,), lambda _: _encode({"status": "ok", "key": key}))


async def destroy(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _version)
    key = request[AUDITED_KEY] = checked_key(body.key)
    access.require(request, "delete", key)
    op = DestroyOp(key, body.version)
    return await write(request, (op,), lambda _: _encode({"status": "ok", "key": key}))


async def txn(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _txn)
    ops = tuple(_txn_op(op, i) for i, op in enumerate(body.ops))
    request[AUDITED_KEY] = " ".join(dict.fromkeys(op.key for op in body.ops))
    verbs = {"set": "write", "delete": "delete", "check": "read"}
    allows = request.app[SERVICE].allows
    if not all(allows(request[PRINCIPAL], verbs[op.op], op.key) for op in body.ops):  # type: ignore[arg-type]  # verbs' values
        raise access.forbidden()

    def render(versions: list[int]) -> bytes:
        return _encode({"status": "ok", "versions": versions})

    return await write(request, ops, render, numbered=True)


def _txn_op(op: TxnOp, index: int) -> Op:
    field = f"ops[{index}]"
    key = checked_key(op.key, f"{field}.key")
    if op.op == "set":
        if op.value is msgspec.UNSET:
            raise ApiError(400, "Missing field", field=f"{field}.value")
        return SetOp(key, compact(op.value, f"{field}.value"), op.expected_version, op.ttl_ms)
    if op.value is not msgspec.UNSET or op.ttl_ms is not None:
        raise ApiError(400, "Unknown field", field=f"{field}.value")
    if op.op == "delete":
        return DeleteOp(key, op.expected_version)
    if op.expected_version is None:
        raise ApiError(400, "Missing field", field=f"{field}.expected_version")
    return CheckOp(key, op.expected_version)


async def write(
    request: web.Request,
    ops: tuple[Op, ...],
    render: Callable[[list[int]], bytes],
    *,
    remember: bool = True,
    numbered: bool = False,
) -> web.StreamResponse:
    """Decide a permitted write and answer it; `remember`: under its Idempotency-Key, if it has
    one; `numbered`: a refusal says which operation it is about."""
    service = request.app[SERVICE]
    access.require_primary(service)
    again = await _idempotency(request) if remember else None
    try:
        written = await service.write(Write(ops, render, again, access.audited(request)))
    except OpFailed as e:
        e.numbered = numbered
        raise
    if written.line:
        request[AUDITED] = True
    more = DEGRADED if written.degraded else b""
    if written.replayed:
        more += b"Idempotent-Replay: true\r\n"
    return Reply(written.body, version=written.version, more=more)


async def _idempotency(request: web.Request) -> Idempotency | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not (0 < len(key) <= 128 and key.isascii() and key.isprintable()):
        raise ApiError(400, "Invalid field", field="Idempotency-Key", detail="1 to 128 characters")
    asked = hashlib.sha256(request.path.encode() + b"\0" + await request.read()).digest()
    scope = request.app[SERVICE].scope_hash(request[PRINCIPAL], key)
    return Idempotency(scope, asked, time.time_ns() // 1_000_000 + IDEMPOTENCY_MS)


async def list_keys(request: web.Request) -> web.Response:
    query = read_query(request, ListQuery)
    prefix = request[AUDITED_KEY] = checked_prefix(query.prefix, "prefix")
    after = request.app[SERVICE].cursor_key(query.after)
    if after is None:
        after = checked_prefix(query.after, "after")
    access.check_read_from(request, request.app[SERVICE])
    await request.app[SERVICE].settled(prefix, prefix=True)
    listing = request.app[SERVICE].list_keys(request[PRINCIPAL], prefix, after, query.limit)
    return json_response(listing, headers=_reading(request))


async def history(request: web.Request) -> web.Response:
    query = read_query(request, KeyQuery)
    key = request[AUDITED_KEY] = checked_key(query.key)
    access.require(request, "read", key)
    access.check_read_from(request, request.app[SERVICE])
    await request.app[SERVICE].settled(key)
    versions = request.app[SERVICE].history(key)
    if versions is None:
        raise not_found()
    return json_response({"key": key, "versions": versions}, headers=_reading(request))


async def watch(request: web.Request) -> web.StreamResponse:
    query = read_query(request, WatchQuery)
    prefix = request[AUDITED_KEY] = checked_prefix(query.prefix, "prefix")
    service, hub, principal = request.app[SERVICE], request.app[WATCHES], request[PRINCIPAL]
    if not hub.has_room():
        raise ApiError(503, "Too many watchers", headers={"Retry-After": "5"})
    watcher = Watcher(
        prefix,
        lambda key: service.allows(principal, "read", key),
        lambda: service.is_still_valid(principal),
        principal.expires_ms,
    )
    access.note(request, 200, is_write=False)
    last_id = request.headers.get("Last-Event-ID", "")
    missed = _missed(service, watcher, last_id) if last_id else ()
    return await hub.serve(request, watcher, stream_headers(request), missed)


def _missed(service: Service, watcher: Watcher, last_id: str) -> Iterator[bytes]:
    """What a watcher that comes back has missed. (A generator: it is read when it listens again, so
    that nothing falls in between.)"""
    found = service.changes_after(last_id)
    if found is None:
        yield LOST
        return
    for changes, position in found:
        yield watcher.visible(changes, position)


def stream_headers(request: web.Request) -> dict[str, str]:
    """The headers of every answer, for one that begins before the middleware sees it."""
    return {"X-Request-Id": request[REQUEST_ID], **SAFE_HEADERS}
