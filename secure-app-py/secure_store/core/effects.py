"""What happens to the pair machine (events) and what it wants done (effects).

The node's contract, in this order:

1. `persist`: start these operations on the one writer, in order; when an operation (and so every
   earlier one) is durable, feed `Persisted(its number)` back. Never report before it is.
2. `send`, `close`, `dial`: may go out at once. Whatever must wait for a disk is withheld by the
   machine itself until the matching `Persisted`.
3. `shown`, `admit`, `done`, `unknown`, `reject`, `promotions`: tell the clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from secure_store.core.messages import Message, Mode, Role, SnapshotBegin
from secure_store.core.records import Position, Record


class Durable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node must remember about the pair, written whole and atomically."""

    role: Role = Role.UNJOINED
    cluster_id: str = ""
    epoch: int = 0  # the highest seen
    mode: Mode = Mode.AVAILABLE
    in_step: bool = False  # primary: nothing is acknowledged that the replica lacks
    told_in_step: bool = False  # replica: the primary said so
    sealed: Position | None = None  # replica: the primary left, and this was its end
    shown_limit: int | None = None  # demoted: records beyond it may belong to no history
    peer_url: str = ""
    peer_id: str = ""


# --- persist operations
# -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AppendLog:
    number: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class SaveState:
    number: int
    state: Durable


@dataclass(frozen=True, slots=True)
class StageRows:
    number: int
    rows: tuple[bytes, ...]
    first: bool  # forget what was staged before


@dataclass(frozen=True, slots=True)
class InstallSnapshot:
    """Replace log and data by the staged rows (set aside first if asked to) and save `state`: at
    once."""

    number: int
    begin: SnapshotBegin
    state: Durable


PersistOp = AppendLog | SaveState | StageRows | InstallSnapshot


# --- events
# -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrive:
    """Clients' writes want in. They are planned only when admitted."""

    requests: tuple[int, ...]
    now_ms: int


@dataclass(frozen=True, slots=True)
class Append:
    """Plans of admitted writes, in order: (request, payload)."""

    entries: tuple[tuple[int, bytes], ...]
    now_ms: int


@dataclass(frozen=True, slots=True)
class Persisted:
    number: int
    now_ms: int


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link is up. `dialed`: this node made it, and so speaks first."""

    link: int
    dialed: bool
    now_ms: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    link: int
    now_ms: int


@dataclass(frozen=True, slots=True)
class Received:
    link: int
    message: Message
    now_ms: int


@dataclass(frozen=True, slots=True)
class Tick:
    now_ms: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Answer to `Effects.fetch`: durable records after `after_seq`; None: no longer kept."""

    link: int
    after_seq: int
    records: tuple[Record, ...] | None
    now_ms: int


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Answer to `Effects.look_up`: the position of record `seq`; None: no longer kept."""

    link: int
    seq: int
    position: Position | None
    now_ms: int


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """The node has streamed rows that are the state at `position` (SnapshotBegin … End
    included)."""

    link: int
    position: Position
    now_ms: int


@dataclass(frozen=True, slots=True)
class Promote:
    request: int
    force: bool
    now_ms: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The node is being stopped: seal, if the replica is in step."""

    request: int
    now_ms: int


Event = (
    Arrive
    | Append
    | Persisted
    | LinkUp
    | LinkDown
    | Received
    | Tick
    | Fetched
    | LookedUp
    | SnapshotSent
    | Promote
    | Leave
)


# --- effects
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    link: int
    after_seq: int
    up_to_seq: int


@dataclass(frozen=True, slots=True)
class LookUp:
    link: int
    seq: int


@dataclass(frozen=True, slots=True)
class SendSnapshot:
    """Stream the state to `link`: SnapshotBegin (the position of what is read, and `set_aside`),
    the rows, SnapshotEnd; then feed SnapshotSent."""

    link: int
    set_aside: bool


@dataclass(frozen=True, slots=True)
class Rejected:
    """The write was never begun: a retry is safe. `not_primary` tells 421 from 503."""

    request: int
    reason: str
    not_primary: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """Decided. `degraded`: on this node's disk alone."""

    request: int
    seq: int
    degraded: bool


@dataclass(frozen=True, slots=True)
class Promotion:
    request: int
    ok: bool
    reason: str
    epoch: int
    last_seq: int
    last_contact_ms: int | None  # how long ago
    forced: bool


@dataclass(slots=True)
class Effects:
    persist: list[PersistOp] = field(default_factory=list)
    send: list[tuple[int, Message]] = field(default_factory=list)
    close: list[tuple[int, str]] = field(default_factory=list)
    fetch: list[Fetch] = field(default_factory=list)
    look_up: list[LookUp] = field(default_factory=list)
    snapshot: list[SendSnapshot] = field(default_factory=list)
    shown: int | None = None  # reads may now see everything up to here
    reset: bool = False  # a snapshot replaced the data: forget every cache
    admit: list[int] = field(default_factory=list)
    reject: list[Rejected] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    unknown: list[tuple[int, str]] = field(default_factory=list)  # begun, outcome unknown
    promotions: list[Promotion] = field(default_factory=list)
    left: list[int] = field(default_factory=list)  # Leave requests that may go now
    notes: list[tuple[str, str]] = field(default_factory=list)  # (event, details) for log and audit
