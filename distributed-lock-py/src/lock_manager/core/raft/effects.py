"""The boundary of the Raft core: what it wants done, and in which order.

Inputs (messages, ticks, proposals, finished writes) change the core at once and gather their
consequences; `RaftCore.drain()` hands them out as one `Effects`. Several inputs may precede one
drain: that is how a turn of the event loop becomes one write and one message a peer.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from lock_manager.core.raft.messages import Configuration, Entry, HardState, Message, Snapshot


class Role(StrEnum):
    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre_candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Persist(msgspec.Struct, frozen=True, kw_only=True):
    """One atomic change of the store. Apply the parts in the order of the fields, then sync, then
    tell the core by `persisted(seq)`.

    Writes are strictly in order of `seq`. Several that wait may share one transaction and one
    fsync; then one `persisted(highest seq)` answers for all of them. A write that fails ends the
    node: it is never retried and `persisted` is never called for it.
    """

    seq: int
    hard_state: HardState | None = None
    # Replaces the stored snapshot; stored entries up to `snapshot.index` may be deleted.
    snapshot: Snapshot | None = None
    # Delete stored entries with index >= truncate_from; applied before `entries`.
    truncate_from: int | None = None
    # Delete stored entries with index <= compact_to (never above the stored snapshot's index).
    compact_to: int | None = None
    # Contiguous; the first follows the last stored entry.
    entries: tuple[Entry, ...] = ()


class ReadReady(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A quorum confirmed this leader after `read_index(read_id)`: serve it from a machine that
    applied `index`."""

    read_id: int
    index: int


# ------------------------------------------------------------- notes: for logs, events and waiters


class ElectionStarted(msgspec.Struct, frozen=True, tag=True):
    """This node asks for votes. `pre_vote`: only whether it would get them; `term` is the proposed
    one."""

    term: int
    pre_vote: bool


class WonElection(msgspec.Struct, frozen=True, tag=True):
    """This node leads `term`: log `WON election` and `starting heartbeats`. Its no-op is at
    `noop_index`; the machine is up to date and reads are answered once that is applied."""

    term: int
    votes: int
    noop_index: int


class SteppedDown(msgspec.Struct, frozen=True, tag=True):
    """This node led `term` and leads no more. What it proposed and did not see committed has an
    unknown outcome. Precedes LeaderChanged."""

    term: int
    reason: str


class LeaderChanged(msgspec.Struct, frozen=True, tag=True):
    """This node follows (or is) another leader than before; None: it knows of none."""

    term: int
    leader_id: int | None


class ConfigurationChanged(msgspec.Struct, frozen=True, tag=True):
    """Another configuration is in force (appended or rolled back, not necessarily committed): dial
    accordingly."""

    index: int
    configuration: Configuration


class ConfigurationCommitted(msgspec.Struct, frozen=True, tag=True):
    """`included` is False when this node was removed: it takes no further part and should stop."""

    index: int
    configuration: Configuration
    included: bool


class TransferEnded(msgspec.Struct, frozen=True, tag=True):
    """A transfer did not happen in time; proposals are taken again. (A transfer that works:
    SteppedDown.)"""

    target: int


class Suspicious(msgspec.Struct, frozen=True, tag=True):
    """A peer said something that no correct peer says; the message was ignored. Worth an error
    line."""

    sender: int
    what: str


class Forgetful(msgspec.Struct, frozen=True, tag=True):
    """A peer says that it lacks what it had acknowledged as durable: its disk lost it, unless the
    network doubled an old message. Worth an error line."""

    sender: int
    acknowledged: int
    has: int  # at most


Note = (
    ElectionStarted
    | WonElection
    | SteppedDown
    | LeaderChanged
    | ConfigurationChanged
    | ConfigurationCommitted
    | TransferEnded
    | Suspicious
    | Forgetful
)


class Effects(msgspec.Struct, kw_only=True):
    """What one drain hands out. Handle the fields in their order; only `persist` may take its time.

    Invariant the core keeps for the node: whatever needs the disk first (votes, a candidate's own
    vote and its requests, acknowledgements of entries) is not in `messages` yet; it appears in the
    drain after `persisted(seq)`. So a node cannot send too early, and no field needs to wait for
    another.
    """

    # May leave at once, in any order, each at most once. The leader's AppendEntries are here too,
    # beside the `persist` of the same entries: its own fsync runs in parallel, and it counts
    # itself only after it.
    messages: list[Message] = []
    # Submit before the next drain's. The core goes on meanwhile.
    persist: Persist | None = None
    # Replace the machine's whole state by this one, before applying `committed`.
    restore: Snapshot | None = None
    # Committed: durable on a majority, final. Apply in order, NOOP and CONFIGURATION included (the
    # machine skips them); each index exactly once between two starts. At most `max_apply_entries`
    # a drain: `has_effects` stays true while more wait.
    committed: list[Entry] = []
    # Answer from the machine as it is after `committed` of this drain was applied... if `index` is
    # applied; else when it is. On the leader, `index` <= the last committed index handed out,
    # unless the batch was cut short.
    reads_ready: list[ReadReady] = []
    # Not the leader (any more): answer "Not the leader".
    reads_refused: list[int] = []
    notes: list[Note] = []


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """Proposals took the indices first_index..last_index in `term`. They are done when committed
    with that very term; another term at such an index in `committed` means: definitely lost."""

    term: int
    first_index: int
    last_index: int


class Refusal(StrEnum):
    NOT_LEADER = "not_leader"
    TRANSFERRING = "transferring"  # soon another leads; retry there
    OVERLOADED = "overloaded"  # too much is appended and not committed
    NOT_READY = "not_ready"  # this term's no-op is not committed yet (configuration changes only)
    IN_PROGRESS = "in_progress"  # another configuration change is not committed yet
    UNKNOWN_MEMBER = "unknown_member"
    ALREADY_MEMBER = "already_member"
    LAST_VOTER = "last_voter"


class Refused(msgspec.Struct, frozen=True):
    reason: Refusal
