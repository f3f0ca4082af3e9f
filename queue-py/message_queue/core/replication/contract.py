"""The replication core as ``node.py`` and ``storage`` see it.

Every method is a step: it takes what happened and ``now_ms`` (the node's *monotonic* clock in ms,
never wall time), changes the state, and returns ``Effects``. Nothing here blocks, reads a clock or
draws a random number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from message_queue.core.messages import Copy, Member, PeerMessage, Spans
from message_queue.core.replication.config import ReplicationConfig as ReplicationConfig
from message_queue.core.replication.drafts import Accepted as Accepted
from message_queue.core.replication.drafts import AckDraft as AckDraft
from message_queue.core.replication.drafts import Draft as Draft
from message_queue.core.replication.drafts import NotOwner as NotOwner
from message_queue.core.replication.drafts import PutDraft as PutDraft
from message_queue.core.replication.drafts import RunDraft as RunDraft
from message_queue.core.replication.drafts import SetDraft as SetDraft
from message_queue.core.replication.effects import Effects, Read
from message_queue.core.replication.governor import Changed as Changed
from message_queue.core.replication.governor import Join as Join
from message_queue.core.replication.governor import Leave as Leave
from message_queue.core.replication.governor import RingAnswer as RingAnswer
from message_queue.core.replication.state import PartitionState


class Replication(Protocol):
    """One node's part in all the partitions that it replicates."""

    def tick(self, now_ms: int) -> Effects:
        """Time passes. Call every 50 ms or so; cost is independent of what is stored."""

    def receive_all(
        self, sender: int, incarnation: int, messages: tuple[PeerMessage, ...], now_ms: int
    ) -> Effects:
        """A peer's frame in one step: one batch to persist, one answer a partition. Hostile or
        outdated messages change nothing. The sender is authentic."""

    def peer_connected(self, peer: int, now_ms: int) -> Effects:
        """This node's link to the peer stands: what was lost meanwhile is sent again."""

    def peer_disconnected(self, peer: int, now_ms: int) -> Effects:
        """A connection to or from the peer broke: elect as soon as leases allow."""

    def propose(
        self, partition: int, drafts: tuple[Draft, ...], now_ms: int
    ) -> Accepted | NotOwner:
        """Stamps and replicates drafts as one atomic batch. Gather what waits per partition and
        call once per loop iteration. Held puts of own proposals count as held at once; deliver them
        at ``Committed``.
        """

    def durable(self, batch: int, now_ms: int) -> Effects:
        """Everything persisted up to this batch number is on disk (fsynced)."""

    def bodies_read(
        self, read: Read, found: tuple[Copy, ...], unreadable: Spans, now_ms: int
    ) -> Effects:
        """Storage's answer to a ``Read``: from the start of ``wanted`` as many puts as fit into
        ``max_bytes`` (at least one), and those on the way that failed their checksum.
        """

    def damaged(self, partition: int, lost: Spans, now_ms: int) -> Effects:
        """Storage found records of these dots unreadable (checksum). They are withdrawn and fetched
        again.
        """

    def soft(self, partition: int, soft: bytes) -> Effects:
        """The delivery machine's leases, passed to the other replicas. Call at heartbeat pace, when
        changed.
        """

    def change_ring(
        self, asked: Join | Leave, now_ms: int, heard: Mapping[int, Member]
    ) -> RingAnswer:
        """Take a change of the ring in. It is in force when ``ring.version`` has reached that of
        ``Changed``, and over when it names nobody who joins or leaves. ``heard``: nodes as they
        announced themselves."""

    def paused(self, partition: int, soft: bytes | None, now_ms: int) -> Effects:
        """The answer to ``Effects.pausing``: the leases, None if unchanged since the last
        ``soft``."""

    def yield_all(self, now_ms: int) -> Effects:
        """SIGTERM: hand everything over. Done when ``owned()`` is empty (or 2 s have passed)."""

    def may_serve(self, partition: int, now_ms: int) -> bool:
        """This node owns the partition and a majority renewed its lease: it may deliver messages
        now.
        """

    def owner(self, partition: int) -> int | None:
        """The owner's position as known here (possibly this node), or None."""

    def epoch(self, partition: int) -> int:
        """The epoch of the owner as last known here; 0: none yet."""

    def cluster_ms(self, now_ms: int) -> int:
        """Cluster time: never goes back, runs on monotonic clocks, bounded over gaps."""

    def owned(self) -> tuple[int, ...]:
        """Partitions that this node owns or is taking over."""

    def state(self, partition: int) -> PartitionState:
        """What this node holds of a partition (``held``, ``settings``, ``checkpoint()``): read
        only.
        """
