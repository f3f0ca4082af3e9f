"""The replication core as ``node.py`` and ``storage`` see it.

Every method is a step: it takes what happened and ``now_ms`` (the node's *monotonic* clock in ms,
never wall time), changes the state, and returns ``Effects``. Nothing here blocks, reads a clock or
draws a random number.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from message_queue.core.messages import PeerMessage, Spans
from message_queue.core.replication.effects import Effects, Read
from message_queue.core.replication.state import PartitionState


class ReplicationConfig(Struct, frozen=True):
    """Where this node stands; ``preference[p]``: p's replicas, best owner first."""

    node: int
    nodes: int
    incarnation: int  # strictly greater at every boot, durable before the core starts; never 0
    preference: tuple[tuple[int, ...], ...]
    ring: int = 1
    seed: int = 0  # chance: jitter of elections, origins
    heartbeat_ms: int = 100
    lease_ms: int = 600  # a replica that renewed an owner promises nobody else for this long
    patience_ms: int = 900  # a silent owner without a broken connection is replaced after this
    # a new cluster forms at once if all nodes are there, after this long with a majority
    genesis_ms: int = 3_000
    window_bytes: int = 4 << 20  # per partition, kept for replicas that missed something
    copy_bytes: int = 1 << 20  # one message of copies at most


class PutDraft(Struct, frozen=True):
    """A put to be stamped."""

    meta: bytes
    body: bytes


class AckDraft(Struct, frozen=True):
    """Dots to be forgotten for ever. Dots that are not held are passed over."""

    targets: Spans


class SetDraft(Struct, frozen=True):
    key: str
    value: bytes


Draft = PutDraft | AckDraft | SetDraft


class Accepted(Struct, frozen=True):
    """The drafts got the seqs first..first+n-1 of ``epoch``; done when ``Committed.upto`` reaches
    the last.
    """

    epoch: int
    first: int
    effects: Effects


class NotOwner(Struct, frozen=True):
    """Nothing was proposed (definite). ``owner`` is where to forward to; None = nobody known right
    now.
    """

    owner: int | None


class Replication(Protocol):
    def tick(self, now_ms: int) -> Effects:
        """Time passes. Call every 50 ms or so; cost is independent of what is stored."""

    def receive(self, sender: int, incarnation: int, message: PeerMessage, now_ms: int) -> Effects:
        """A peer's message; hostile or outdated ones change nothing. The sender is authentic."""

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
        self, read: Read, found: tuple[tuple[int, int, bytes, bytes], ...], now_ms: int
    ) -> Effects:
        """Storage's answer to a ``Read``: (epoch, seq, meta, body) of what it could read and
        verify.
        """

    def damaged(self, partition: int, lost: Spans, now_ms: int) -> Effects:
        """Storage found records of these dots unreadable (checksum). They are withdrawn and fetched
        again.
        """

    def soft(self, partition: int, soft: bytes) -> Effects:
        """The delivery machine's leases, passed to the other replicas. Call at heartbeat pace, when
        changed.
        """

    def yield_all(self, now_ms: int) -> Effects:
        """SIGTERM: hand everything over. Done when ``owned()`` is empty (or 2 s have passed)."""

    def may_serve(self, partition: int, now_ms: int) -> bool:
        """This node owns the partition and a majority renewed its lease: it may deliver messages
        now.
        """

    def owner(self, partition: int) -> int | None:
        """The owner's position as known here (possibly this node), or None."""

    def cluster_ms(self, now_ms: int) -> int:
        """Cluster time: never goes back, runs on monotonic clocks, bounded over gaps."""

    def owned(self) -> tuple[int, ...]:
        """Partitions that this node owns or is taking over."""

    def state(self, partition: int) -> PartitionState:
        """What this node holds of a partition (``held``, ``settings``, ``checkpoint()``): read
        only.
        """
