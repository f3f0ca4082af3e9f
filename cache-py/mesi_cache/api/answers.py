"""What a client is told about one key: the body of a success, or the ApiError that words it."""

from __future__ import annotations

from typing import assert_never

import msgspec

from mesi_cache.api.errors import ApiError
from mesi_cache.core.records import Cas, Claim, Delete, Incr, Operation, Write
from mesi_cache.core.step import Answer, Changed, Found, Missing, Unavailable


class Shown(msgspec.Struct, frozen=True):
    """The answer of GET /read."""

    key: str
    value: msgspec.Raw
    state: str
    hit: bool
    source: str
    version: int


class Written(msgspec.Struct, frozen=True):
    """The answer of POST /write, /cas and /incr."""

    status: str
    key: str
    value: msgspec.Raw
    state: str
    version: int


class Deleted(msgspec.Struct, frozen=True):
    """The answer of POST /delete. `deleted`: there was something to delete."""

    status: str
    key: str
    deleted: bool


Body = Shown | Written | Deleted


def shown(key: str, found: Found) -> Shown:
    """A value, as a read shows it."""
    source = "cache" if found.hit else "memory"
    value = msgspec.Raw(found.value)
    return Shown(key, value, found.state, found.hit, source, found.version)


def answer_of(key: str, operation: Operation | None, answer: Answer) -> Body:
    """The answer to a read (`operation` None) or change of `key`. Raises ApiError."""
    match answer:
        case Found():
            return shown(key, answer)
        case Changed():
            if operation is None:
                raise TypeError("a read was answered as a change")
            return _changed(key, operation, answer)
        case Missing():
            raise ApiError(404, "Key not found")
        case Unavailable():
            raise unavailable(answer, key)
        case _:
            assert_never(answer)


def _changed(key: str, operation: Operation, answer: Changed) -> Body:
    outcome = answer.outcome
    if outcome.status == "mismatch":
        raise ApiError(409, "Version mismatch", key=key, version=outcome.version)
    if outcome.status == "reused":
        raise ApiError(422, "Idempotency-Key was used for another request", key=key)
    match operation:
        case Delete():
            return Deleted("ok", key, outcome.status == "done")
        case Write(value) | Cas(_, value):
            return Written("ok", key, msgspec.Raw(value), "M", outcome.version)
        case Incr() | Claim():
            if outcome.status == "not_integer" or outcome.value is None:
                error = "Value is not an integer in range"
                raise ApiError(409, error, key=key, version=outcome.version)
            return Written("ok", key, msgspec.Raw(outcome.value), "M", outcome.version)
        case _:
            assert_never(operation)


def unavailable(answer: Unavailable, key: str) -> ApiError:
    """503, rather than an old value."""
    return ApiError(
        503, "Unavailable", headers={"Retry-After": "1"},
        definite=answer.definite, reason=answer.reason, key=key,
    )  # fmt: skip


def one_of_many(key: str, operation: Operation | None, answer: Answer) -> Body | dict[str, object]:
    """One key's result in a batch: its errors stay its own."""
    try:
        return answer_of(key, operation, answer)
    except ApiError as e:
        return {"key": key, "error": e.error, **e.details}
