"""What a record's payload says: the changes that both nodes apply, in order, to the same state.

A record carries results, not requests: version numbers, times and expiries are settled by the
primary when it plans the write, so applying is a plain fold that cannot come out differently on
the replica.
"""

from __future__ import annotations

import msgspec

from secure_store.core.policy import Rule


class PutValue(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    key: str
    version: int
    value: bytes  # compact JSON text
    created_ms: int
    expires_ms: int  # 0: never


class MarkDeleted(msgspec.Struct, frozen=True, array_like=True, tag="delete"):
    key: str
    version: int
    deleted_ms: int  # 0: undeleted


class Destroy(msgspec.Struct, frozen=True, array_like=True, tag="destroy"):
    """The value of one version is gone for good (0: the key with all its versions)."""

    key: str
    version: int


class PutToken(msgspec.Struct, frozen=True, array_like=True, tag="token"):
    accessor: str
    token_hash: bytes
    roles: tuple[str, ...]
    name: str
    created_ms: int
    expires_ms: int  # 0: never
    uses_left: int  # -1: unlimited
    parent: str  # accessor of the token it was made with (a static token's name)
    ceilings: tuple[tuple[str, ...], ...] = ()  # it may do nothing that these roles may not


class RevokeToken(msgspec.Struct, frozen=True, array_like=True, tag="revoke"):
    """This token, and every token made with it, and so on down."""

    accessor: str


class UseToken(msgspec.Struct, frozen=True, array_like=True, tag="use"):
    accessor: str
    uses_left: int


class PutPolicy(msgspec.Struct, frozen=True, array_like=True, tag="policy"):
    role: str
    rules: tuple[Rule, ...]


class Remember(msgspec.Struct, frozen=True, array_like=True, tag="remember"):
    """The answer to a request with an Idempotency-Key, for its repetitions."""

    scope_hash: bytes  # who asked, with which key
    request_hash: bytes  # what was asked
    status: int
    body: bytes
    version: int  # 0: none
    expires_ms: int


class Audited(msgspec.Struct, frozen=True, array_like=True, tag="audited"):
    """Whose request the record is: what its line in `node`'s audit log says. In the record, because
    then no write can be committed whose line a crash could lose: a start writes what is missing."""

    node: str
    action: str
    addr: str
    key: str  # as configured: plain or as a keyed hash
    request_id: str
    at_ms: int  # UTC
    who: str


class Genesis(msgspec.Struct, frozen=True, array_like=True, tag="genesis"):
    """The first record of a cluster: the secrets that both nodes must share."""

    token_key: bytes


Change = (
    PutValue
    | MarkDeleted
    | Destroy
    | PutToken
    | RevokeToken
    | UseToken
    | PutPolicy
    | Remember
    | Audited
    | Genesis
)

_decoder = msgspec.msgpack.Decoder(tuple[Change, ...])
encode_changes = msgspec.msgpack.Encoder().encode


def decode_changes(payload: bytes) -> tuple[Change, ...]:
    """The changes of one record; raises msgspec.MsgspecError if it is not one of ours."""
    return _decoder.decode(payload)
