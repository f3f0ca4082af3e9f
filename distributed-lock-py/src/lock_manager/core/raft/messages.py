"""What nodes say to each other, and what they keep: Raft's nouns as frozen structs.

Every message names its `sender`, its receiver `to` and the sender's `term`. Messages are
datagrams: each may be lost, doubled, delayed or overtaken, and the core copes. On the wire they
are MessagePack arrays told apart by their first element (`array_like`, `tag`), decoded straight
into these types, so that a malformed frame never becomes a message. Decoding checks types;
`RaftCore.step` checks everything else.

Node ids are positive integers (the position in `--peers`, counted from 1). Log indices start at 1;
index 0 with term 0 stands for "before the log". The paper is Ongaro & Ousterhout, "In Search of an
Understandable Consensus Algorithm (extended version)"; "thesis" is Ongaro's dissertation.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec

# Checked while decoding. Far below 2^63, so that no sum of ours leaves what the store can hold.
NodeId = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]  # terms, indices, sizes, milliseconds


class EntryKind(IntEnum):
    """What an entry's payload means."""

    NOOP = 0  # a new leader's first entry (§8); the payload is empty
    COMMAND = 1  # opaque to Raft: the replicated machine's input
    CONFIGURATION = 2  # a MessagePack `Configuration`, in force from the moment it is appended


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of the replicated log. (index, term) identifies its content for ever (§5.3)."""

    index: Count
    term: Count
    kind: EntryKind
    payload: bytes


class Member(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One node of a configuration. Raft reads `node_id` and `voter`; the rest is the node's own
    business."""

    node_id: NodeId
    voter: bool = True  # False: a learner, receives everything and counts for nothing
    promote: bool = False  # a learner that the leader makes a voter once it has caught up
    name: str = ""  # `--id`, empty until first contact
    store_id: str = ""  # the data directory's random id, empty until first contact (guarantee 10)
    raft_addr: str = ""  # empty: as in the flags
    http_addr: str = ""


class Configuration(msgspec.Struct, frozen=True, array_like=True):
    """The cluster's members as of one log index. Empty: a node that waits to be added
    (`--join`)."""

    members: tuple[Member, ...] = ()

    @property
    def voters(self) -> frozenset[int]:
        return frozenset(member.node_id for member in self.members if member.voter)

    @property
    def learners(self) -> frozenset[int]:
        return frozenset(member.node_id for member in self.members if not member.voter)

    def get(self, node_id: int) -> Member | None:
        return next((member for member in self.members if member.node_id == node_id), None)


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What a node must never forget once it acted on it (figure 2, "persistent state").

    `commit_index` is volatile as in the paper: a restarted node learns it anew.
    """

    term: Count = 0
    voted_for: NodeId | None = None


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The machine's state after applying `index`, in place of the log up to there."""

    index: Count = 0
    term: Count = 0
    configuration: Configuration = Configuration()
    data: bytes = b""  # opaque to Raft


# ---------------------------------------------------------------------------------------- messages


class RequestVote(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=1):
    """§5.2. With `pre_vote` nothing is promised and `term` is the proposed one, not yet the
    sender's (§9.6)."""

    sender: NodeId
    to: NodeId
    term: Count
    last_index: Count
    last_term: Count
    pre_vote: bool = False
    transfer: bool = (
        False  # the leader itself asked for this election: voters do not protect it (§3.10)
    )


class VoteReply(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=2):
    """A granted pre-vote repeats the proposed term; every other reply carries the voter's own."""

    sender: NodeId
    to: NodeId
    term: Count
    granted: bool
    pre_vote: bool = False


class AppendEntries(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=3):
    """§5.3; without entries it is a heartbeat, a probe, or a round that confirms reads."""

    sender: NodeId
    to: NodeId
    term: Count
    prev_index: Count
    prev_term: Count
    entries: tuple[Entry, ...] = ()
    commit: Count = 0
    read_round: Count = 0  # the leader's newest ReadIndex round; an answer echoes it
    stamp_ms: Count = 0  # cluster time; Raft only carries it (guarantee 8)


class AppendReply(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=4):
    """Success: everything up to `match_index` is on the follower's disk and equals the leader's
    log.

    Refusal (`success` false): the follower lacks (`prev_index`, the message's prev_term). The
    largest index at which the two logs may still agree is `hint_index`; there the follower has
    `hint_term`. So the leader skips a whole term a round trip (§5.3, last paragraphs).
    """

    sender: NodeId
    to: NodeId
    term: Count
    success: bool
    match_index: Count = 0
    prev_index: Count = 0
    hint_index: Count = 0
    hint_term: Count = 0
    read_round: Count = 0


class InstallSnapshot(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=5):
    """One chunk of a snapshot (§7)."""

    sender: NodeId
    to: NodeId
    term: Count
    index: Count
    index_term: Count
    configuration: Configuration
    offset: Count
    data: bytes
    total_bytes: Count
    read_round: Count = 0
    stamp_ms: Count = 0


class SnapshotReply(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=6):
    """The follower has the first `next_offset` bytes of the snapshot at `index`.

    The whole snapshot durable is said by an AppendReply with `match_index`.
    """

    sender: NodeId
    to: NodeId
    term: Count
    index: Count
    next_offset: Count
    read_round: Count = 0


class TimeoutNow(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=7):
    """Leadership transfer: the receiver is caught up and starts an election at once (§3.10)."""

    sender: NodeId
    to: NodeId
    term: Count


Message = (
    RequestVote
    | VoteReply
    | AppendEntries
    | AppendReply
    | InstallSnapshot
    | SnapshotReply
    | TimeoutNow
)
