"""What answers look like, for /openapi.json: each 200's body as a struct, and what else may come.

The handlers of the hot path put their bytes together themselves; the schemathesis test holds every
answer of a running pair against these (tests/cluster/test_openapi.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from secure_store.api.keys import Listing as Listing
from secure_store.api.keys import VersionInfo
from secure_store.core.messages import Mode, Role
from secure_store.core.policy import Rule, Verb

Count = Annotated[int, Meta(ge=0)]
Ok = Literal["ok"]


class _Exact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Has these fields and no others."""


class Refusal(msgspec.Struct, frozen=True):
    """Every answer but a good one: a stable sentence, and details that differ."""

    error: str


class Problem(msgspec.Struct, frozen=True):
    """The same as RFC 9457 has it, for `Accept: application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


class Value(_Exact, frozen=True):
    """GET /get."""

    key: str
    value: msgspec.Raw


class Stored(_Exact, frozen=True):
    """POST /set."""

    status: Ok
    key: str
    value: msgspec.Raw


class Changed(_Exact, frozen=True):
    """POST /delete, /undelete, /destroy."""

    status: Ok
    key: str


class Transacted(_Exact, frozen=True):
    """POST /txn: the version of each operation's key."""

    status: Ok
    versions: tuple[Count, ...]


class History(_Exact, frozen=True):
    """GET /history: oldest first."""

    key: str
    versions: tuple[VersionInfo, ...]


class AuditPage(_Exact, frozen=True):
    """GET /audit: lines as they stand in the file."""

    entries: tuple[dict[str, str | int], ...]


class TokenInfo(_Exact, frozen=True):
    """A token without its secret. Times are UTC milliseconds, null: never."""

    accessor: str
    name: str
    roles: tuple[str, ...]
    created_ms: Count
    expires_ms: Count | None
    uses_left: Count | None  # null: no limit
    parent: str | None


class Tokens(_Exact, frozen=True):
    """GET /tokens."""

    tokens: tuple[TokenInfo, ...]


class TokenMade(_Exact, frozen=True):
    """POST /tokens: the only time that `token` is shown."""

    status: Ok
    token: str
    accessor: str
    expires_ms: Count | None


class TokenRevoked(_Exact, frozen=True):
    """DELETE /tokens."""

    status: Ok
    accessor: str


class Policies(_Exact, frozen=True):
    """GET /policies."""

    roles: dict[str, tuple[Rule, ...]]


class Policy(_Exact, frozen=True):
    """GET /policies/{role}."""

    role: str
    rules: tuple[Rule, ...]


class PolicyPut(_Exact, frozen=True):
    """PUT /policies/{role}."""

    status: Ok
    role: str


class PolicyVerdict(_Exact, frozen=True):
    """GET /policies/{role}/check: `rule` null: no rule speaks of it."""

    role: str
    verb: Verb
    key: str
    allowed: bool
    rule: Rule | None


class Promoted(_Exact, frozen=True):
    """POST /admin/promote."""

    status: Ok
    epoch: Count
    seq: Count
    forced: bool


class Rotated(_Exact, frozen=True):
    """POST /admin/rotate."""

    status: Ok
    data_key: Count
    node: str
    master: bool


class Peer(_Exact, frozen=True):
    """The other node, as far as it is known."""

    id: str
    url: str


class Replication(_Exact, frozen=True, kw_only=True):
    """GET /replication. `replica_lag` (records; null: unknown) only at a primary with a link."""

    role: Role
    cluster_id: str
    epoch: Count
    mode: Mode
    in_step: bool
    degraded: bool
    last_seq: Count
    durable_seq: Count
    shown_seq: Count
    link: str
    last_contact_ms_ago: Count | None
    peer: Peer
    refused: str | None
    sealed: bool
    replica_lag: int | msgspec.UnsetType | None = msgspec.UNSET


class AuditState(_Exact, frozen=True):
    """Of this node's audit log, and the other node's heads that are kept here."""

    seq: Count
    failure: str | None
    peer_anchor_seq: Count | None


class Status(Replication, frozen=True, kw_only=True):
    """GET /status."""

    id: str
    url: str
    audit: AuditState
    data_key: Count
    data_keys: Annotated[tuple[Count, ...], Meta(min_length=1)]
    resealing: bool
    demo_tokens: bool


class Alive(_Exact, frozen=True):
    """GET /healthz."""

    status: Literal["alive"]


class Ready(_Exact, frozen=True):
    """GET /readyz."""

    status: Literal["ready"]


class Counters(msgspec.Struct, frozen=True):
    """GET /metrics: counters and gauges by name, and recent latencies (ms)."""

    requests: Count
    latency_ms: dict[str, dict[str, float]]
