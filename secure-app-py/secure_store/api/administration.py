"""Tokens, policies, the audit log, promotion, keys."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial

import msgspec
from aiohttp import web

from secure_store.api import access
from secure_store.api.errors import ApiError, json_response
from secure_store.api.keys import (
    AUDITED_KEY,
    CONFIG,
    PRINCIPAL,
    SERVICE,
    RotationRefused,
    Service,
)
from secure_store.api.operations import write
from secure_store.api.schemas import (
    AuditQuery,
    CheckQuery,
    PolicyBody,
    PromoteBody,
    RevokeBody,
    RotateBody,
    TokenBody,
    checked_key,
    read_json,
    read_query,
)
from secure_store.core.changes import PutPolicy, PutToken
from secure_store.core.plan import AddOp, OpFailed, RevokeOp
from secure_store.core.policy import (
    Effect,
    PolicyError,
    check_role_name,
    check_rules,
    decide,
    deciding,
)
from secure_store.core.tokens import Principal

_token = msgspec.json.Decoder(TokenBody)
_revoke = msgspec.json.Decoder(RevokeBody)
_policy = msgspec.json.Decoder(PolicyBody)
_promote = msgspec.json.Decoder(PromoteBody)
_rotate = msgspec.json.Decoder(RotateBody)
_encode = msgspec.json.Encoder().encode
MAX_CEILINGS = 8  # how many different sets of roles may bound one token


async def list_tokens(request: web.Request) -> web.Response:
    access.require(request, "admin", "tokens")
    rows = [
        {
            "accessor": t.accessor,
            "name": t.name,
            "roles": t.roles,
            "created_ms": t.created_ms,
            "expires_ms": t.expires_ms or None,
            "uses_left": None if t.uses_left < 0 else t.uses_left,
            "parent": t.parent or None,
        }
        for t in request.app[SERVICE].tokens()
    ]
    return json_response({"tokens": rows})


async def create_token(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _token)
    for role in body.roles:
        _checked(partial(check_role_name, role), "roles")
    if not body.name.isprintable():
        raise ApiError(400, "Invalid field", field="name", detail="must be printable")
    access.require(request, "admin", "tokens")
    service, principal = request.app[SERVICE], request[PRINCIPAL]
    ceilings = _ceilings(service, principal, body.roles)
    access.require_primary(service)
    token = "sst_" + secrets.token_urlsafe(32)
    accessor = secrets.token_hex(8)
    request[AUDITED_KEY] = f"token {accessor}"
    now_ms = time.time_ns() // 1_000_000
    expires_ms = _expiry(now_ms, body.ttl_ms, principal.expires_ms)
    change = PutToken(
        accessor,
        service.new_token_hash(token),
        body.roles,
        body.name,
        now_ms,
        expires_ms,
        body.uses if body.uses is not None else -1,
        principal.accessor or principal.name,
        ceilings,
    )
    answer = _encode({"status": "ok", "token": token, "accessor": accessor,
                      "expires_ms": expires_ms or None})  # fmt: skip
    # No Idempotency-Key here: a remembered answer would store the token itself.
    try:
        return await write(request, (AddOp(change),), lambda _: answer, remember=False)
    except OpFailed:  # the token that asks for this one has been revoked meanwhile
        raise access.invalid_token() from None


def _ceilings(
    service: Service, principal: Principal, roles: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """What bounds a token that `principal` makes: its own roles, and what bounds it. Raises
    ApiError 403 if it may not make one with these roles."""
    if principal.uses_left >= 0:
        raise access.forbidden("a token with a use limit makes no others")
    if service.outranks(principal, roles):
        raise access.forbidden("the roles may do more than the token that asks for them")
    ceilings = tuple(dict.fromkeys((*principal.ceilings, principal.roles)))
    if len(ceilings) > MAX_CEILINGS:
        raise access.forbidden("made with too many tokens in a row")
    return ceilings


def _expiry(now_ms: int, ttl_ms: int | None, parent_ms: int) -> int:
    """A child does not outlive its parent; 0: never."""
    wanted_ms = now_ms + ttl_ms if ttl_ms else 0
    return min(wanted_ms or parent_ms, parent_ms or wanted_ms)


async def revoke_token(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _revoke)
    request[AUDITED_KEY] = f"token {body.accessor}" if body.accessor.isprintable() else "token"
    access.require(request, "admin", "tokens")
    answer = _encode({"status": "ok", "accessor": body.accessor})
    try:
        return await write(request, (RevokeOp(body.accessor),), lambda _: answer)
    except OpFailed:
        raise ApiError(404, "Token not found") from None


async def list_policies(request: web.Request) -> web.Response:
    access.require(request, "admin", "policies")
    return json_response({"roles": request.app[SERVICE].policies()})


async def check_policy(request: web.Request) -> web.Response:
    """A dry run: nothing is done, nobody needs to have the role."""
    role = _role(request)
    query = read_query(request, CheckQuery)
    checked_key(query.key)
    access.require(request, "admin", "policies")
    rules = request.app[SERVICE].policies().get(role)
    if rules is None:
        raise ApiError(404, "Role not found")
    rule = deciding(rules, query.verb, query.key)
    allowed = rule is not None and rule.effect is Effect.ALLOW
    return json_response(
        {"role": role, "verb": query.verb, "key": query.key, "allowed": allowed, "rule": rule}
    )


async def get_policy(request: web.Request) -> web.Response:
    role = _role(request)
    access.require(request, "admin", "policies")
    rules = request.app[SERVICE].policies().get(role)
    if rules is None:
        raise ApiError(404, "Role not found")
    return json_response({"role": role, "rules": rules})


async def put_policy(request: web.Request) -> web.StreamResponse:
    role = _role(request)
    body = await read_json(request, _policy)
    _checked(partial(check_rules, body.rules), "rules")
    access.require(request, "admin", "policies")
    service, principal = request.app[SERVICE], request[PRINCIPAL]
    if role in principal.roles:
        policies = {**service.policies(), role: body.rules}
        pooled = [rule for each in principal.roles for rule in policies.get(each, ())]
        if not decide(pooled, "admin", "policies"):
            raise ApiError(409, "This would lock you out of the policies")
    answer = _encode({"status": "ok", "role": role})
    return await write(request, (AddOp(PutPolicy(role, body.rules)),), lambda _: answer)


def _role(request: web.Request) -> str:
    role: str = request.match_info["role"]
    _checked(partial(check_role_name, role), "role")
    request[AUDITED_KEY] = f"policy {role}"
    return role


async def read_audit(request: web.Request) -> web.Response:
    query = read_query(request, AuditQuery)
    access.require(request, "audit", "audit")
    entries = await request.app[SERVICE].audit_entries(query.after, query.limit)
    body = b'{"entries":[' + b",".join(entries) + b"]}"
    return web.Response(body=body, content_type="application/json")


async def read_anchors(request: web.Request) -> web.Response:
    """The other node's signed heads that are kept here, as JSON lines."""
    access.require(request, "audit", "audit")
    path = request.app[SERVICE].anchors_path()
    if path is None:
        raise ApiError(404, "No head of another node is kept here")
    return web.Response(body=path.read_bytes(), content_type="application/jsonl")


async def promote(request: web.Request) -> web.Response:
    body = await read_json(request, _promote, empty=True)
    access.require(request, "admin", "admin")
    request[AUDITED_KEY] = "force" if body.force else ""
    promotion = await request.app[SERVICE].promote(force=body.force)
    return json_response(
        {
            "status": "ok",
            "epoch": promotion.epoch,
            "seq": promotion.last_seq,
            "forced": promotion.forced,
        }
    )


async def rotate(request: web.Request) -> web.Response:
    """A new data key for this node (and master key); every node rotates its own."""
    body = await read_json(request, _rotate, empty=True)
    access.require(request, "admin", "admin")
    request[AUDITED_KEY] = "master" if body.master else ""
    try:
        number = await request.app[SERVICE].rotate(master=body.master)
    except RotationRefused as e:
        raise ApiError(409, "The keys cannot be changed now", detail=str(e)) from None
    return json_response(
        {
            "status": "ok",
            "data_key": number,
            "node": request.app[CONFIG].node_id,
            "master": body.master,
        }
    )


def _checked(check: Callable[[], None], field: str) -> None:
    try:
        check()
    except PolicyError as e:
        raise ApiError(400, "Invalid field", field=field, detail=str(e)) from None
