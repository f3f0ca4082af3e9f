"""Who is asking: the Authorization header, brute force, and the audit line of every request."""

from __future__ import annotations

import asyncio
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
from secure_store.core.plan import OpFailed, SpendOp, Write
from secure_store.core.policy import Verb
from secure_store.core.tokens import Principal

REALM = 'Bearer realm="secure-store"'
UNAUTHORIZED = "Authorization token required or invalid"
FORBIDDEN = "Insufficient permissions"
MAX_TOKEN_CHARACTERS = 512
_IN_URL = frozenset({"token", "access_token", "authorization"})


async def authenticate(request: web.Request, *, is_plain: bool = False) -> Principal:
    """The principal of a request; raises ApiError 400, 401 or 429 (RFC 6750, sections 2 and 3).
    `is_plain`: nothing in the URL could be a token."""
    if (
        not is_plain
        and request.query_string
        and not _IN_URL.isdisjoint(k.lower() for k in request.query)
    ):
        raise _invalid_request("A token must not stand in the URL")
    headers = request.headers.getall("Authorization", ())
    if len(headers) > 1:
        raise _invalid_request("More than one Authorization header")
    scheme, _, token = headers[0].partition(" ") if headers else ("", "", "")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:  # no token was sent: another scheme is none
        raise ApiError(401, UNAUTHORIZED, headers={"WWW-Authenticate": REALM})
    service = request.app[SERVICE]
    if len(token) <= MAX_TOKEN_CHARACTERS:
        principal = service.authenticate(token)
        if principal is not None and await _spend(service, principal):
            return principal
    _count_invalid(request)
    raise invalid_token()


def invalid_token() -> ApiError:
    challenge = REALM + ', error="invalid_token"'
    return ApiError(401, UNAUTHORIZED, headers={"WWW-Authenticate": challenge})


def _invalid_request(error: str) -> ApiError:
    challenge = REALM + ', error="invalid_request"'
    return ApiError(400, error, headers={"WWW-Authenticate": challenge})


def _count_invalid(request: web.Request) -> None:
    wait_ms = request.app[LIMITER].invalid(request.remote or "", time.monotonic_ns() // 1_000_000)
    if wait_ms:
        request.app[METRICS].throttled += 1
        seconds = str(-(-wait_ms // 1000))
        raise ApiError(429, "Too many invalid tokens", headers={"Retry-After": seconds})


async def _spend(service: Service, principal: Principal) -> bool:
    """A token with a use limit: this use is on both disks before anything else happens. False if
    requests at the same time have taken the last ones. The uses are counted at the primary, so the
    replica takes no such token (ApiError 421)."""
    if principal.uses_left < 0:
        return True
    require_primary(service)
    try:
        await service.write(Write((SpendOp(principal.accessor),), lambda _: b""))
    except OpFailed:
        return False
    return True


def require(request: web.Request, verb: Verb, key: str) -> None:
    """Raise ApiError 403 unless the request's principal may do `verb` on `key`."""
    if not request.app[SERVICE].allows(request[PRINCIPAL], verb, key):
        raise forbidden()


def forbidden(why: str = "") -> ApiError:
    """The body is the same for every denial; `why` stands in the challenge."""
    challenge = REALM + ', error="insufficient_scope"'
    if why:
        challenge += f', error_description="{why}"'
    return ApiError(403, FORBIDDEN, headers={"WWW-Authenticate": challenge})


def require_primary(service: Service) -> None:
    """Raise ApiError 421 on a replica."""
    if not service.is_primary_here():
        raise not_primary(service)


def check_read_from(request: web.Request, service: Service) -> None:
    """Raise ApiError 421 on a replica if the client wants no answer that may be behind."""
    if not service.is_primary_here() and request.headers.get("X-Read-From") == "primary":
        raise not_primary(service)


def not_primary(service: Service) -> ApiError:
    return ApiError(421, "Not the primary", primary=service.primary_url())


def outcome_of(status: int) -> str:
    """allowed, denied (who may not), or failed (what cannot be)."""
    if status < 400:
        return "allowed"
    return "denied" if status in (401, 403, 429) else "failed"


def no_audit() -> ApiError:
    """While no audit sink can be written."""
    return ApiError(503, "Audit log unavailable", headers={"Retry-After": "1"})


def note(request: web.Request, status: int, *, is_write: bool) -> asyncio.Future[None] | None:
    """Write the request's line, unless it has one. Denials and writes get a future that is done
    when it is durable."""
    if AUDITED in request:
        return None
    request[AUDITED] = True
    service = request.app[SERVICE]
    if status == 503 and service.audit.unavailable() is not None:
        service.audit.refuse()
        return None
    principal = request.get(PRINCIPAL)
    outcome = outcome_of(status)
    return service.audit.note(
        request[ACTION],
        addr=request.remote or "",
        outcome=outcome,
        request_id=request[REQUEST_ID],
        status=status,
        who=principal.name if principal is not None else "",
        key=service.audit_key(request.get(AUDITED_KEY, "")),
        urgent=is_write or outcome == "denied",
    )


async def until_durable(request: web.Request, durable: asyncio.Future[None], status: int) -> None:
    """Raises ApiError 503 if the line cannot be made durable (then the outcome of a write is not
    denied, only not confirmed)."""
    try:
        await durable  # it fails by itself if the disk does, or hangs
    except Exception as e:
        request.app[METRICS].audit_refusals += 1
        refusal = no_audit()
        if outcome_of(status) == "allowed":
            refusal.details["definite"] = False
        raise refusal from e


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
