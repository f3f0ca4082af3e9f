"""The machine's replies as HTTP: status, sentence, fields."""

from __future__ import annotations

from typing import assert_never

from aiohttp import web

from lock_manager.api.errors import ApiError, json_response
from lock_manager.core.locks.replies import (
    Acquired,
    AlreadyWaiting,
    Deadlock,
    Done,
    Granted,
    Held,
    KindMismatch,
    LeaseLost,
    Malformed,
    NotHeld,
    Released,
    ReleasedMany,
    Renewed,
    Reply,
    RequestReused,
    TimedOut,
    TooManyRequests,
)


def respond(reply: Reply) -> web.Response:
    """The response for a reply; raises ApiError for what is not a success."""
    return json_response(body_of(reply))


def body_of(reply: Reply) -> dict[str, object]:
    """The body of a 200, before it is encoded; raises ApiError for what is not a success."""
    match reply:
        case Acquired():
            return _acquired(reply)
        case Released(lock_name, client_id):
            return {"status": "released", "lock_name": lock_name, "client_id": client_id}
        case ReleasedMany(count):
            return {"status": "released", "count": count}
        case Renewed(locks, lost):
            if lost:
                raise ApiError(409, "Lease lost", status="lost", lost=lost, locks=locks)
            return {"status": "renewed", "locks": locks}
        case Held(lock_name, holders):
            raise ApiError(409, "Lock is held", status="held", lock_name=lock_name, holders=holders)
        case TimedOut(lock_name):
            raise ApiError(409, "Timed out waiting for lock", status="timeout", lock_name=lock_name)
        case Deadlock(cycle):
            raise ApiError(409, "Deadlock detected", status="deadlock", cycle=cycle)
        case LeaseLost(lost):
            raise ApiError(409, "Lease lost", status="lost", lost=lost)
        case KindMismatch(lock_name, limit):
            raise ApiError(
                409,
                "Lock is in use as another kind",
                status="kind",
                lock_name=lock_name,
                limit=limit,
            )
        case AlreadyWaiting(lock_name):
            raise ApiError(
                409, "Already waiting for lock in another way", status="waiting",
                lock_name=lock_name,
            )  # fmt: skip
        case NotHeld(lock_name, client_id):
            raise ApiError(409, "Lock not held", lock_name=lock_name, client_id=client_id)
        case RequestReused(request_id):
            raise ApiError(422, "Request id reused with another body", request_id=request_id)
        case Malformed(what):
            raise ApiError(400, "Invalid field", detail=what)
        case TooManyRequests():
            raise ApiError(503, "Too many request ids to remember", headers={"Retry-After": "10"})
        case Done():
            return {"status": "done"}
        case _:
            assert_never(reply)


def _acquired(reply: Acquired) -> dict[str, object]:
    common = {
        "client_id": reply.client_id,
        "fencing_token": reply.fencing_token,
        "expires_in_ms": reply.expires_in_ms,
    }
    if len(reply.locks) == 1:
        return {"status": "acquired", **_granted(reply.locks[0]), **common}
    return {"status": "acquired", "locks": [_granted(one) for one in reply.locks], **common}


def _granted(one: Granted) -> dict[str, object]:
    fields: dict[str, object] = {
        "lock_name": one.lock_name,
        "lock_type": one.lock_type,
        "fencing_token": one.fencing_token,
    }
    if one.limit:
        fields |= {"permits": one.permits, "limit": one.limit}
    return fields
