"""From what a client asks to the changes that a record carries. Pure: states are looked up by
callables.

A plan is made when its write is admitted, on top of everything appended before it (decided or
not), so checks such as `expected_version` are exact. Either all operations can be planned, or none
happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from secure_store.core import kv
from secure_store.core.changes import (
    Audited,
    Change,
    PutPolicy,
    PutToken,
    Remember,
    RevokeToken,
    UseToken,
)
from secure_store.core.kv import KeyState
from secure_store.core.tokens import MAX_TOKENS, TokenSet, is_static


@dataclass(frozen=True, slots=True)
class SetOp:
    key: str
    value: bytes
    expected: int | None = None
    ttl_ms: int | None = None


@dataclass(frozen=True, slots=True)
class DeleteOp:
    key: str
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class CheckOp:
    key: str
    expected: int


@dataclass(frozen=True, slots=True)
class UndeleteOp:
    key: str
    version: int | None


@dataclass(frozen=True, slots=True)
class DestroyOp:
    key: str
    version: int | None


@dataclass(frozen=True, slots=True)
class ExpireOp:
    """Destroy a version if its time is over; else nothing happens."""

    key: str
    version: int


@dataclass(frozen=True, slots=True)
class RevokeOp:
    accessor: str


@dataclass(frozen=True, slots=True)
class SpendOp:
    """Count one use of a token with a use limit."""

    accessor: str


@dataclass(frozen=True, slots=True)
class AddOp:
    """A new token or policy, already validated."""

    change: PutToken | PutPolicy


Op = SetOp | DeleteOp | CheckOp | UndeleteOp | DestroyOp | ExpireOp | RevokeOp | SpendOp | AddOp


@dataclass(frozen=True, slots=True)
class Idempotency:
    """Who repeats what: hashes of (principal, Idempotency-Key) and of the request."""

    scope_hash: bytes
    request_hash: bytes
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Write:
    """A client's write. `render(versions)` gives the answer's body from each operation's
    version."""

    ops: tuple[Op, ...]
    render: Callable[[list[int]], bytes]
    idempotency: Idempotency | None = None
    audited: Audited | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What to append, and what to answer once it is decided."""

    changes: tuple[Change, ...]
    body: bytes
    version: int  # of the last operation; 0: none
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """A decided write."""

    body: bytes
    version: int
    degraded: bool
    replayed: bool
    line: int = 0  # the number of its audit line; 0: it has none yet


class Rejected(Exception):
    """The write was not begun: a retry is safe."""

    def __init__(self, reason: str, *, not_primary: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.not_primary = not_primary


class OutcomeUnknown(Exception):
    """The write was begun; whether it will be decided is not known."""


class KeyReused(Exception):
    """The Idempotency-Key was used for another request."""


class Full(Exception):
    """A bound would be passed; the text says which."""


class OpFailed(Exception):
    """Operation number `index` cannot be done; `cause` is kv.Conflict or kv.Missing."""

    def __init__(self, index: int, cause: kv.Conflict | kv.Missing) -> None:
        super().__init__(str(cause))
        self.index = index
        self.cause = cause
        self.numbered = True  # whether its client counts operations


class Stored(Protocol):
    """A remembered answer, as the storage keeps it."""

    @property
    def request_hash(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...
    @property
    def version(self) -> int: ...
    @property
    def expires_ms(self) -> int: ...


class Heads(Protocol):
    """The state after everything appended."""

    def head_state(self, key: str) -> KeyState | None: ...
    def head_remembered(self, scope_hash: bytes) -> Stored | None: ...
    @property
    def head_tokens(self) -> TokenSet: ...


def plan(write: Write, heads: Heads, now_ms: int) -> Planned:
    """Raises OpFailed, KeyReused, Full."""
    again = write.idempotency
    if again is not None:
        stored = heads.head_remembered(again.scope_hash)
        if stored is not None and now_ms < stored.expires_ms:
            if stored.request_hash != again.request_hash:
                raise KeyReused
            return Planned((), stored.body, stored.version, replayed=True)
    own: dict[str, KeyState | None] = {}
    changes: list[Change] = []
    versions: list[int] = []
    for index, op in enumerate(write.ops):
        try:
            change, version = _plan_op(op, own, heads, now_ms)
        except (kv.Conflict, kv.Missing) as e:
            raise OpFailed(index, e) from None
        versions.append(version)
        if change is not None:
            changes.append(change)
    body = write.render(versions)
    version = versions[-1] if versions else 0
    if again is not None and changes:
        changes.append(
            Remember(again.scope_hash, again.request_hash, 200, body, version, again.expires_ms)
        )
    if write.audited is not None and changes:
        changes.append(write.audited)
    return Planned(tuple(changes), body, version)


def _plan_op(
    op: Op, own: dict[str, KeyState | None], heads: Heads, now_ms: int
) -> tuple[Change | None, int]:
    match op:
        case RevokeOp(accessor):
            if accessor not in heads.head_tokens:
                raise kv.Missing
            return RevokeToken(accessor), 0
        case SpendOp(accessor):
            token = heads.head_tokens.by_accessor.get(accessor)
            if token is None or token.uses_left <= 0:
                raise kv.Missing
            return UseToken(accessor, token.uses_left - 1), 0
        case AddOp(PutToken() as token):
            return _plan_token(token, heads.head_tokens), 0
        case AddOp(change):
            return change, 0
        case _:
            pass
    state = own[op.key] if op.key in own else heads.head_state(op.key)
    match op:
        case CheckOp(_, expected):
            kv.check_version(state, expected, now_ms)
            return None, expected
        case SetOp(key, value, expected, ttl_ms):
            put = kv.plan_set(state, key, value, expected=expected, ttl_ms=ttl_ms, now_ms=now_ms)
            own[key] = kv.apply(state, put)
            return put, put.version
        case DeleteOp(key, expected):
            mark = kv.plan_delete(state, key, expected=expected, now_ms=now_ms)
            own[key] = kv.apply(state, mark)
            return mark, mark.version
        case UndeleteOp(key, version):
            mark = kv.plan_undelete(state, key, version)
            own[key] = kv.apply(state, mark)
            return mark, mark.version
        case DestroyOp(key, version):
            gone = kv.plan_destroy(state, key, version)
            own[key] = kv.apply(state, gone)
            return gone, gone.version
        case ExpireOp(key, version):
            return kv.plan_expiry(state, key, version, now_ms), version


def _plan_token(token: PutToken, tokens: TokenSet) -> PutToken:
    """A token made with another one is revoked with it, so that one must still be there when this
    one is appended: a child of a revoked token would live for ever. Nor does it live longer."""
    if len(tokens.by_accessor) >= MAX_TOKENS:
        raise Full(f"There are {MAX_TOKENS} tokens already")
    if is_static(token.parent):
        return token
    parent = tokens.by_accessor.get(token.parent)
    if parent is None:
        raise kv.Missing
    if parent.expires_ms and not 0 < token.expires_ms <= parent.expires_ms:
        return msgspec.structs.replace(token, expires_ms=parent.expires_ms)
    return token
