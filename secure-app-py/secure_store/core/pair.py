"""The state of one node of the pair, and what both roles share.

Theory of operation. One node is primary and appends records to a log; the other, the replica, keeps
the same log. The primary keeps a durable *mark* about its replica:

* **in step**: nothing is acknowledged unless both disks hold it. The primary may then send records
  before its own disk has them (both fsyncs run at once). If it restarts so marked, it serves no
  write before it has reached the replica and taken over what the replica holds beyond its own log.
* **not in step** (stale): the primary acknowledges alone, and sends only what its own disk holds,
so
  that the replica can never be ahead of it.

The mark is durable before anything that depends on it: not-in-step before the first lone
acknowledgement, in-step before the first early send. That alone makes a fork within an epoch
impossible. A new *epoch* begins with a promotion; whoever meets a higher epoch than its own as a
primary becomes a replica, and what it had beyond the common history is quarantined.

`step(state, event)` is the whole machine; primary.py and replica.py hold the two roles' parts. The
invariants are in invariants.py. Time is passed in (`now_ms`, monotonic); there is no chance in
here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from secure_store.core.effects import (
    AppendLog,
    Durable,
    Effects,
    InstallSnapshot,
    PersistOp,
    Rejected,
    SaveState,
    StageRows,
)
from secure_store.core.messages import Message, Mode, Role, SnapshotBegin
from secure_store.core.records import Position, Record

WAIT_MS = 1_000  # how long a write waits for its replica, from its arrival
PING_MS = 250
SILENCE_MS = 1_500  # a link that says nothing for so long is dead
SEAL_MS = 2_000  # a promotion waits so long for the old primary's seal
WINDOW_RECORDS = 4_096  # sent and not yet acknowledged, while catching up
WINDOW_BYTES = 16 << 20
BATCH_RECORDS = 256
BATCH_BYTES = 1 << 20
NEAR_RECORDS = 256  # so close behind, the replica can be taken into step
MAX_WAITING = 10_000  # held or undecided writes


class Phase(Enum):
    """Where a link is. The primary's side first, then the replica's."""

    GREETING = "greeting"  # Hello sent, or (replica) expected
    LOOKING = "looking"  # comparing histories
    TAIL = "tail"  # taking over what the replica has beyond us
    SNAPSHOT = "snapshot"  # streaming the whole state
    CATCHUP = "catchup"  # sending the log from where the replica is
    LIVE = "live"  # in step
    FOLLOWING = "following"  # replica
    INSTALLING = "installing"  # replica, receiving a snapshot
    REFUSED = "refused"


@dataclass(slots=True)
class Session:
    """One link to the other node."""

    link: int
    dialed: bool
    started_ms: int
    heard_ms: int
    sent_ms: int
    phase: Phase = Phase.GREETING
    peer_last: Position = field(default_factory=Position)
    next_seq: int = 0  # primary: the next record to send
    acked_seq: int = 0  # on the replica's disk
    acked_shown_seq: int = 0  # on both, and the replica knows
    unacked: deque[tuple[int, int]] = field(default_factory=deque)  # (last seq, bytes) per batch
    unacked_bytes: int = 0
    progress_ms: int = 0
    fetching: bool = False
    told_sealed: bool = False
    primary_durable_seq: int = 0  # replica: how far the primary's disk is
    rows_staged: int = 0
    staging: SnapshotBegin | None = None  # replica: the snapshot being received


@dataclass(slots=True)
class Waiting:
    """A begun write whose outcome is open."""

    request: int
    seq: int
    arrived_ms: int


@dataclass(slots=True)
class PairState:
    """Everything the machine knows. Invariants (checked by invariants.py):

    durable_seq <= last.seq; shown_seq <= durable_seq; `pending` is in order of seq, all > shown.
    """

    node_id: str
    url: str
    wants_replica: bool  # a --replica flag, or a peer known from before
    may_found: bool  # a fresh node may become a lone primary (no --primary flag)
    mode_wanted: Mode | None  # the flag; None: what the pair runs already
    fresh_cluster_id: str
    genesis: bytes
    durable: Durable
    wished: Durable  # the last one handed to the disk
    last: Position  # the last appended record
    durable_seq: int
    shown_seq: int
    started_ms: int
    confirmed: bool = True  # False: restarted in step, replica not reached yet
    open_seq: int = 0  # restarted in step: where the log ended; what is not shown of it is open
    making_until_ms: int = 0  # a link is being made; writes wait for it
    barrier_seq: int = 0  # records up to here were appended before the mark became in-step
    sealed: bool = False
    leaving: int | None = None
    refused: str = ""  # why this pair cannot work; writes are refused with it
    turned_away: str = ""  # the last reason said to a node that called itself primary
    session: Session | None = None
    last_contact_ms: int | None = None
    numbers: int = 0  # persist operations handed out
    in_flight: deque[PersistOp] = field(default_factory=deque)
    after_persist: list[tuple[int, int, Message | None]] = field(default_factory=list)
    recent: dict[int, Record] = field(default_factory=dict)  # appended, perhaps not yet everywhere
    recent_from: int = 1
    held: deque[tuple[int, int]] = field(default_factory=deque)  # (request, arrived_ms)
    admitted: dict[int, int] = field(
        default_factory=dict
    )  # request -> arrived_ms, not yet appended
    pending: deque[Waiting] = field(default_factory=deque)
    promoting: tuple[int, bool, int] | None = None  # (request, force, deadline_ms)
    promoted_by: tuple[int, bool] | None = None  # waiting for the disk: (request, forced)

    @property
    def is_primary(self) -> bool:
        """Acting as primary: the role is on disk and no other is on its way there."""
        return self.durable.role is Role.PRIMARY and self.wished.role is Role.PRIMARY

    @property
    def in_step(self) -> bool:
        """The durable mark, and no wish to change it."""
        return self.durable.in_step and self.wished.in_step

    @property
    def degraded(self) -> bool:
        """A primary that should have its replica in step and has not."""
        live = self.session is not None and self.session.phase is Phase.LIVE
        return self.is_primary and self.wants_replica and not live

    def ambiguous(self) -> bool:
        """Restarted in step, and the end of the log is not decided anew: it may have been shown
        before the restart, so reads of what it touches must wait, not go back."""
        return self.wished.role is Role.PRIMARY and self.shown_seq < self.open_seq


def persist(state: PairState, fx: Effects, op: PersistOp) -> int:
    state.in_flight.append(op)
    fx.persist.append(op)
    return op.number


def next_number(state: PairState) -> int:
    state.numbers += 1
    return state.numbers


def save(state: PairState, fx: Effects, **changes: object) -> int:
    """Change the durable state; returns the number of the operation that makes it so."""
    state.wished = msgspec.structs.replace(state.wished, **changes)
    return persist(state, fx, SaveState(next_number(state), state.wished))


def append_records(state: PairState, fx: Effects, records: tuple[Record, ...]) -> int:
    """Append to the log (already known to follow `state.last`)."""
    for record in records:
        state.recent[record.seq] = record
    state.last = records[-1].position
    return persist(state, fx, AppendLog(next_number(state), records))


def send(state: PairState, fx: Effects, message: Message, now_ms: int) -> None:
    """Say something on the live link, if there is one."""
    if state.session is not None:
        state.session.sent_ms = now_ms
        fx.send.append((state.session.link, message))


def send_after(state: PairState, number: int, message: Message | None) -> None:
    """Say it on the present link once operation `number` is durable (None: see on_durable)."""
    if state.session is not None:
        state.after_persist.append((number, state.session.link, message))


def settle(state: PairState, number: int) -> list[PersistOp]:
    """Note that everything up to `number` is durable; returns the operations that became so."""
    became: list[PersistOp] = []
    while state.in_flight and state.in_flight[0].number <= number:
        op = state.in_flight.popleft()
        became.append(op)
        match op:
            case AppendLog(_, records):
                state.durable_seq = max(state.durable_seq, records[-1].seq)
            case SaveState(_, saved):
                state.durable = saved
            case InstallSnapshot(_, begin, saved):
                state.durable = saved
                state.durable_seq = begin.position.seq
            case StageRows():
                pass
    return became


def end_session(state: PairState, fx: Effects, why: str | None) -> None:
    """Forget the link; close it unless it is down already (`why` None)."""
    if state.session is None:
        return
    if why is not None:
        fx.close.append((state.session.link, why))
    state.after_persist = [a for a in state.after_persist if a[1] != state.session.link]
    state.session = None


def trim_recent(state: PairState, up_to_seq: int) -> None:
    """Drop records that nobody will ask for from memory."""
    while state.recent_from <= up_to_seq:
        state.recent.pop(state.recent_from, None)
        state.recent_from += 1


def reject_waiting(state: PairState, fx: Effects, reason: str, *, not_primary: bool) -> None:
    """Turn away everything that waits: not begun, so a retry is safe."""
    for request, _ in state.held:
        fx.reject.append(Rejected(request, reason, not_primary))
    state.held.clear()


def give_up_pending(state: PairState, fx: Effects, reason: str) -> None:
    """Begun writes whose outcome this node will not learn."""
    for waiting in state.pending:
        fx.unknown.append((waiting.request, reason))
    state.pending.clear()


def demote(state: PairState, fx: Effects, epoch: int) -> None:
    """Another node is primary of a higher epoch: become a replica. The log's end may be foreign."""
    fx.notes.append(("demoted", f"epoch {epoch} has another primary"))
    save(
        state,
        fx,
        role=Role.REPLICA,
        epoch=epoch,
        in_step=False,
        told_in_step=False,
        sealed=None,
        shown_limit=state.shown_seq,
    )
    state.sealed = False
    state.confirmed = True
    state.refused = ""
    reject_waiting(state, fx, "Not the primary", not_primary=True)
    give_up_pending(state, fx, "This node is no longer the primary")
