"""Who is asking: the Authorization header, brute force, and the audit line of every request."""

from __future__ import annotations

import time

from aiohttp import web

from secure_store.api.errors import ApiError
from secure_store.api.keys import (
    ACTION,
    AUDITED,
    AUDITED_KEY,
    LIMITER,
    METRICS,
    PRINCIPAL,
    REQUEST_ID,
    SERVICE,
    Service,
)
from secure_store.core.changes import Audited
from secure_store.core.plan import SpendOp, Write
from secure_store.core.policy import Verb
from secure_store.core.tokens import Principal

REALM = 'Bearer realm="secure-store"'
UNAUTHORIZED = "Authorization token required or invalid"
FORBIDDEN = "Insufficient permissions"
_IN_URL = frozenset({"token", "access_token", "authorization"})


async def authenticate(request: web.Request) -> Principal:
    """The principal of a request; raises ApiError 400, 401 or 429."""
    if request.query_string and not _IN_URL.isdisjoint(k.lower() for k in request.query):
        raise ApiError(400, "A token must not stand in the URL")
    headers = request.headers.getall("Authorization", ())
    if len(headers) > 1:
        raise ApiError(400, "More than one Authorization header")
    if not headers:
        raise ApiError(401, UNAUTHORIZED, headers={"WWW-Authenticate": REALM})
    scheme, _, token = headers[0].partition(" ")
    token = token.strip()
    service = request.app[SERVICE]
    if scheme.lower() == "bearer" and 0 < len(token) <= 512:
        principal = service.authenticate(token)
        if principal is not None:
            return await _spend(service, principal)
    _count_invalid(request)
    raise ApiError(
        401, UNAUTHORIZED, headers={"WWW-Authenticate": REALM + ', error="invalid_token"'}
    )


def _count_invalid(request: web.Request) -> None:
    wait_ms = request.app[LIMITER].invalid(request.remote or "", time.monotonic_ns() // 1_000_000)
    if wait_ms:
        request.app[METRICS].throttled += 1
        seconds = str(-(-wait_ms // 1000))
        raise ApiError(429, "Too many invalid tokens", headers={"Retry-After": seconds})


async def _spend(service: Service, principal: Principal) -> Principal:
    """A token with a use limit: this use is on both disks before anything else happens."""
    if principal.uses_left < 0:
        return principal
    require_primary(service)
    await service.write(Write((SpendOp(principal.accessor),), lambda _: b""))
    return principal


def require(request: web.Request, verb: Verb, key: str) -> None:
    """Raise ApiError 403 unless the request's principal may do `verb` on `key`."""
    if not request.app[SERVICE].allows(request[PRINCIPAL], verb, key):
        raise forbidden()


def forbidden() -> ApiError:
    challenge = REALM + ', error="insufficient_scope"'
    return ApiError(403, FORBIDDEN, headers={"WWW-Authenticate": challenge})


def require_primary(service: Service) -> None:
    """Raise ApiError 421 on a replica."""
    if not service.is_primary_here():
        raise not_primary(service)


def not_primary(service: Service) -> ApiError:
    return ApiError(421, "Not the primary", primary=service.primary_url())


def outcome_of(status: int) -> str:
    """allowed, denied (who may not), or failed (what cannot be)."""
    if status < 400:
        return "allowed"
    return "denied" if status in (401, 403, 429) else "failed"


def check_audit(service: Service) -> None:
    """Raise ApiError 503 while no audit sink can be written."""
    if service.audit.unavailable() is not None:
        raise ApiError(503, "Audit log unavailable", headers={"Retry-After": "1"})


async def audit(request: web.Request, action: str, status: int, *, is_write: bool) -> None:
    """Write the request's line. Denials and writes wait until it is durable (ApiError 503 if it
    cannot be made so; then the outcome of a write is not denied, only not confirmed)."""
    if AUDITED in request:
        return
    request[AUDITED] = True
    service = request.app[SERVICE]
    if status == 503 and service.audit.unavailable() is not None:
        service.audit.refuse()
        return
    principal = request.get(PRINCIPAL)
    outcome = outcome_of(status)
    durable = service.audit.note(
        action,
        addr=request.remote or "",
        outcome=outcome,
        request_id=request[REQUEST_ID],
        status=status,
        who=principal.name if principal is not None else "",
        key=service.audit_key(request.get(AUDITED_KEY, "")),
        urgent=is_write or outcome == "denied",
    )
    if durable is None:
        return
    try:
        await durable  # it fails by itself if the disk does, or hangs
    except Exception as e:
        request.app[METRICS].audit_refusals += 1
        definite = {} if outcome != "allowed" else {"definite": False}
        raise ApiError(
            503, "Audit log unavailable", headers={"Retry-After": "1"}, **definite
        ) from e


def audited(request: web.Request) -> Audited:
    """What the audit line of a write will say, for its record to carry."""
    service = request.app[SERVICE]
    return Audited(
        service.node_id,
        request[ACTION],
        request.remote or "",
        service.audit_key(request.get(AUDITED_KEY, "")),
        request[REQUEST_ID],
        time.time_ns() // 1_000_000,
        request[PRINCIPAL].name,
    )


def note_hang_up(request: web.Request, action: str) -> None:
    """The line of a request whose client went away before its answer (status 499, as nginx's)."""
    if AUDITED in request:
        return
    request[AUDITED] = True
    service = request.app[SERVICE]
    principal = request.get(PRINCIPAL)
    service.audit.note(
        action,
        addr=request.remote or "",
        outcome="unknown",
        request_id=request[REQUEST_ID],
        status=499,
        who=principal.name if principal is not None else "",
        key=service.audit_key(request.get(AUDITED_KEY, "")),
    )
