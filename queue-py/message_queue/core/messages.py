"""What the replication core says to peers, and what it asks the log to keep.

Two tagged unions of frozen structs. ``PeerMessage`` travels between nodes in frames (``Frame``),
with datagram semantics: it may be lost, doubled, delayed or overtaken. ``LogRecord`` is what
storage makes durable; replaying the records in order rebuilds the state
(``replication.state.PartitionState``).

Words
    partition   0..63; a queue hashes to one. 64 (``RING_PARTITION``) holds no queue but the ring.
    node        a position: in ``--peers``, 0-based, or given to a joiner. Never an address, and
                never given twice.
    epoch       one term of one owner. ``epoch % MAX_NODES`` is the owner's position, so two
                nodes can't own the same epoch even if a promise is forgotten. 0: none yet.
    seq         counts an owner's records within its epoch, from 1 and without gaps.
    dot         (epoch, seq): the name of one record. A message's dot is that of its ``Put``.
    span        (epoch, first, last): the dots of one epoch from first to last, both included.

Structs travel as msgpack arrays led by an integer tag. Numbers are bounded here, so that what gets
past the decoder is at least well-formed; whether it is *plausible* is judged by the core.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

MAX_NODES: Final = 1024
"""Positions that one cluster can give out, ever: each join takes a new one."""

RING_PARTITION: Final = 64
"""Replicated on all members like any partition; its one setting is the ring (`placement`)."""

Count = Annotated[int, Meta(ge=0, le=2**53)]
Position = Annotated[int, Meta(ge=0, lt=MAX_NODES)]
PartitionId = Annotated[int, Meta(ge=0, lt=4096)]
Span = tuple[Count, Count, Count]
Spans = tuple[Span, ...]
"""Sorted by epoch, then seq; never overlapping. The wire form of a set of dots."""

Chunk = tuple[Count, Count, Annotated[bytes, Meta(min_length=1, max_length=128)]]
Chunks = tuple[Chunk, ...]
"""The wire form of a set of dots that may be full of holes: (epoch, n, bits), where bit i, lowest
first, is seq n * 1024 + i. Sorted by epoch, then n. A million dots are 130 KB at most."""


class Member(Struct, frozen=True, array_like=True):
    """A node of the ring. ``id``: empty until it was heard of."""

    addr: Annotated[str, Meta(max_length=300)]
    id: Annotated[str, Meta(max_length=256)] = ""


class Membership(Struct, frozen=True, array_like=True):
    """The ring as a versioned configuration; ``placement.membership`` has its transitions."""

    version: Count  # 1: the founding ring, from --peers
    founders: Position  # positions 0..founders-1 founded the cluster
    virtual_nodes: Annotated[int, Meta(ge=1, le=4096)]
    copies: Annotated[int, Meta(ge=1, le=1 << 20)]
    members: tuple[tuple[Position, Member], ...]  # who shall hold the data, by position
    joining: Position | None = None  # a member that is being filled
    leaving: tuple[Position, Member] | None = None  # no member any more, being emptied
    next_position: Annotated[int, Meta(ge=1, le=MAX_NODES)] = 1


class Standing(IntEnum):
    """What a replica's word about a partition is worth."""

    BLANK = 0
    """Never heard of it: a new node, or one that lost its whole disk."""
    MEMBER = 1
    """Counts in majorities."""
    DAMAGED = 2
    """Knows that it exists and lacks it, or some of it: lost records, or never got them. Counts
    (again) when it has copied the partition."""


def owner_of(epoch: int) -> int:
    """The position of the node that an epoch belongs to."""
    return epoch % MAX_NODES


# --- entries: what an owner stamps and replicates ------------------------------------------------


class Put(Struct, frozen=True, array_like=True, tag=1):
    """A message (or anything else that is held until acked, such as a dedupe mark) comes to be.

    ``meta`` is small and may stay in memory; ``body`` may live on disk only. Both are opaque here.
    """

    seq: Count
    meta: bytes
    body: bytes


class Ack(Struct, frozen=True, array_like=True, tag=2):
    """The dots in ``targets`` are gone for ever: acknowledged, expired, purged or moved."""

    seq: Count
    targets: Spans


class Set(Struct, frozen=True, array_like=True, tag=3):
    """A setting; the latest dot of a key wins. An empty value removes the key."""

    seq: Count
    key: Annotated[str, Meta(max_length=1024)]
    value: bytes


class Settled(Struct, frozen=True, array_like=True, tag=4):
    """The seal of this epoch is on a majority of the old and of the new replicas: from here on the
    new ones decide alone."""

    seq: Count


class Puts(Struct, frozen=True, array_like=True, tag=5):
    """Consecutive puts ``seq``, ``seq`` + 1, ... that share a meta (``core.runs``)."""

    seq: Count
    meta: bytes
    sizes: bytes  # of each body, four bytes little-endian
    bodies: bytes  # one after the other


Entry = Put | Ack | Set | Settled | Puts


class Copy(Struct, frozen=True, array_like=True):
    """A ``Put`` of any epoch on its way to a node that lacks it."""

    epoch: Count
    seq: Count
    meta: bytes
    body: bytes


class Setting(Struct, frozen=True, array_like=True):
    """A setting and the dot that set it. An empty value: removed under the present epoch."""

    epoch: Count
    seq: Count
    key: Annotated[str, Meta(max_length=1024)]
    value: bytes


class View(Struct, frozen=True, array_like=True):
    """The whole state of a partition but the bodies.

    Covered by ``context`` and not in ``held`` means acked: an observed-remove set without
    tombstones (Bieniusa et al. 2012). Invariant: held is a subset of context.
    """

    sealed: Count  # the epoch whose takeover this state descends from; 0 = never taken over
    # a number drawn at the partition's first takeover; 0 = none yet. Two origins never mix
    origin: Count
    context: Spans
    held: Chunks
    settings: tuple[Setting, ...]
    # who replicates the partition from this seal on; () = whom the founding ring names
    replicas: tuple[Position, ...] = ()
    # while these hand over to ``replicas``, a majority of both is needed; () = nobody does
    before: tuple[Position, ...] = ()


# --- what peers tell each other ------------------------------------------------------------------


class Heartbeat(Struct, frozen=True, array_like=True, tag=1):
    """I am here, and these partitions are mine: renew my leases. One per pair of nodes and
    interval.
    """

    beat: Count  # counts this sender's rounds; the answer echoes it
    heard: Count  # the receiver's incarnation as known here; 0 = never heard of it
    cluster_ms: Count  # the sender's cluster time
    owned: tuple[tuple[PartitionId, Count], ...]  # (partition, epoch): elected by a majority
    claimed: tuple[tuple[PartitionId, Count], ...]  # claimed, not elected yet
    ring: Count = 0  # the version of the sender's ring
    moving: tuple[PartitionId, ...] = ()  # owned, and not yet where that ring wants them


class HeartbeatAnswer(Struct, frozen=True, array_like=True, tag=2):
    """All partitions named are renewed for ``lease_ms`` from now, except the refused ones."""

    beat: Count
    heard: Count
    cluster_ms: Count
    refused: tuple[tuple[PartitionId, Count, Count], ...]  # (partition, epoch asked, my promise)
    ring: Count = 0


class Canvass(Struct, frozen=True, array_like=True, tag=3):
    """Would you promise me this partition? Nothing is kept on either side (Raft's PreVote)."""

    partition: PartitionId
    epoch: Count  # the highest promise that the asker knows of


class CanvassAnswer(Struct, frozen=True, array_like=True, tag=4):
    partition: PartitionId
    epoch: Count  # echo
    granted: bool
    promised: Count  # the answerer's promise
    standing: Standing
    sealed: Count = 0  # the answerer's seal, and whom it names (see ``View``)
    replicas: tuple[Position, ...] = ()
    before: tuple[Position, ...] = ()


class Claim(Struct, frozen=True, array_like=True, tag=5):
    """Promise never again to store records of an epoch below this one, and say what you have.

    ``total``: too few members are left for a majority, so every replica is asked, whatever its
    standing (or, for a partition that never existed, a majority of blank ones).
    """

    partition: PartitionId
    epoch: Count
    ring: Count
    total: bool
    beat: Count  # the claimer's last heartbeat: only later ones can end the lease given here


class Promise(Struct, frozen=True, array_like=True, tag=6):
    """Granted, and durable. ``view`` is what the promiser has on its disk."""

    partition: PartitionId
    epoch: Count
    standing: Standing
    view: View


class Refusal(Struct, frozen=True, array_like=True, tag=7):
    """A claim, a seal or records of ``epoch`` were refused, because of a higher promise or a live
    lease.
    """

    partition: PartitionId
    epoch: Count
    promised: Count


class Pull(Struct, frozen=True, array_like=True, tag=8):
    """Send me these puts; I am installing the view of ``for_epoch``."""

    partition: PartitionId
    for_epoch: Count
    wanted: Spans


class Copies(Struct, frozen=True, array_like=True, tag=9):
    """Some of what was pulled. ``missing``: what the sender does not have either."""

    partition: PartitionId
    for_epoch: Count
    copies: tuple[Copy, ...]
    missing: Spans


class Seal(Struct, frozen=True, array_like=True, tag=10):
    """The partition's state under ``epoch``: everything older that is not in here is void.

    Sent at a takeover, and again to whoever falls too far behind.
    """

    partition: PartitionId
    epoch: Count
    ring: Count
    view: View


class Append(Struct, frozen=True, array_like=True, tag=11):
    """Consecutive entries of one epoch, the first with ``seq``; stored all or none."""

    partition: PartitionId
    epoch: Count
    entries: tuple[Entry, ...]


class Stored(Struct, frozen=True, array_like=True, tag=12):
    """The seal of ``epoch`` and its records 1..upto are durable here. ``gap``: later ones came,
    resend.
    """

    partition: PartitionId
    epoch: Count
    upto: Count
    gap: bool


class Inquire(Struct, frozen=True, array_like=True, tag=13):
    """What have you promised? Asked by a node that lost (part of) its disk."""

    partition: PartitionId
    nonce: Count


class Attest(Struct, frozen=True, array_like=True, tag=14):
    partition: PartitionId
    nonce: Count
    promised: Count
    standing: Standing


class Yield(Struct, frozen=True, array_like=True, tag=15):
    """I have stopped serving this epoch and nothing is in flight: the lease is yours to give to
    ``to``.
    """

    partition: PartitionId
    epoch: Count
    to: Position
    soft: bytes
    target: tuple[Position, ...] = ()  # take over for these replicas; () = for the present ones


class Soft(Struct, frozen=True, array_like=True, tag=16):
    """Consumer leases, so that a failover redelivers little. Never durable."""

    partition: PartitionId
    epoch: Count
    soft: bytes


class Farewell(Struct, frozen=True, array_like=True, tag=17):
    """I hold this partition and the ring does not want it here: am I needed?"""

    partition: PartitionId
    sealed: Count


class Dismiss(Struct, frozen=True, array_like=True, tag=18):
    """These replicas decide without you: drop what you hold."""

    partition: PartitionId
    epoch: Count
    ring: Count
    replicas: tuple[Position, ...]


class RingNews(Struct, frozen=True, array_like=True, tag=19):
    """A later ring than the receiver's, committed by a majority of the members before it."""

    ring: Membership


PeerMessage = (
    Heartbeat
    | HeartbeatAnswer
    | Canvass
    | CanvassAnswer
    | Claim
    | Promise
    | Refusal
    | Pull
    | Copies
    | Seal
    | Append
    | Stored
    | Inquire
    | Attest
    | Yield
    | Soft
    | Farewell
    | Dismiss
    | RingNews
)


class Frame(Struct, frozen=True, array_like=True):
    """What one write to a peer link carries: all that gathered since the last one."""

    sender: Position
    incarnation: Count  # the sender's boot; what an earlier life of it sent is void
    messages: tuple[PeerMessage, ...]


# --- what storage keeps --------------------------------------------------------------------------


class AppendRecord(Struct, frozen=True, array_like=True, tag=1):
    """Entries under an epoch. One checksummed frame, so that a batch is atomic on disk."""

    partition: PartitionId
    epoch: Count
    entries: tuple[Entry, ...]


class CopyRecord(Struct, frozen=True, array_like=True, tag=2):
    """Bodies fetched for a view not yet installed: without effect until its ``SealRecord``."""

    partition: PartitionId
    for_epoch: Count
    copies: tuple[Copy, ...]


class PromiseRecord(Struct, frozen=True, array_like=True, tag=3):
    """``elected``: a majority had chosen that owner already, so the partition exists: a node that
    has nothing of it is not a founder."""

    partition: PartitionId
    epoch: Count
    ring: Count
    elected: bool = False


class SealRecord(Struct, frozen=True, array_like=True, tag=4):
    """From here on the partition's state is ``view`` (plus what was already stored under
    ``epoch``).
    """

    partition: PartitionId
    epoch: Count
    ring: Count
    view: View


class WithdrawRecord(Struct, frozen=True, array_like=True, tag=5):
    """Storage found damage: these dots are no longer known here, and the node counts in no majority
    of the partition until it has copied it again.
    """

    partition: PartitionId
    lost: Spans


class ClockRecord(Struct, frozen=True, array_like=True, tag=6):
    """Cluster time had come this far: it goes on from here after a power cut of all nodes."""

    cluster_ms: Count


class CheckpointRecord(Struct, frozen=True, array_like=True, tag=7):
    """A partition's whole state, written by storage before it deletes segments: replaces all before
    it.

    The puts that ``view.held`` and ``copied`` name are found in the segments that
    stay.
    """

    partition: PartitionId
    promised: Count
    ring: Count
    standing: Standing
    view: View
    copied: Chunks  # bodies fetched for a seal that is still to come


class DismissRecord(Struct, frozen=True, array_like=True, tag=8):
    """This node is no replica any more: it holds nothing, and knows who does."""

    partition: PartitionId
    epoch: Count
    ring: Count
    replicas: tuple[Position, ...]


LogRecord = (
    AppendRecord
    | CopyRecord
    | PromiseRecord
    | SealRecord
    | WithdrawRecord
    | ClockRecord
    | CheckpointRecord
    | DismissRecord
)

frame_decoder: Final = msgspec.msgpack.Decoder(Frame)
record_decoder: Final[msgspec.msgpack.Decoder[LogRecord]] = msgspec.msgpack.Decoder(LogRecord)
