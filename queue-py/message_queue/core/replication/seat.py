"""One replica's view of who owns a partition: the lease it gave, and when it would stand itself.

Volatile. After a restart the lease that was given before is not remembered, so a node that has a
past promises nobody anything for one lease time, unless the owner itself says that it owns no
longer.
"""

from __future__ import annotations

from message_queue.core.messages import owner_of
from message_queue.core.replication.install import Install
from message_queue.core.replication.state import PartitionState
from message_queue.core.replication.takeover import Takeover
from message_queue.core.replication.tenure import Tenure


class Seat:
    """Invariants: at most one of takeover and tenure; a tenure's epoch is the state's promise, or
    the tenure is about to end."""

    __slots__ = (
        "called",
        "consented",
        "elect_ms",
        "install",
        "lease_beat",
        "lease_epoch",
        "lease_until_ms",
        "promise_batch",
        "seen",
        "soft",
        "soft_epoch",
        "state",
        "takeover",
        "target",
        "tenure",
    )

    def __init__(self, state: PartitionState) -> None:
        self.state = state
        self.tenure: Tenure | None = None
        self.takeover: Takeover | None = None
        self.install: Install | None = None
        self.lease_epoch = 0
        self.lease_until_ms = 0
        """Nobody but the owner of ``lease_epoch`` gets a promise before this (own monotonic clock).
        """
        self.lease_beat = 0
        self.elect_ms = 0
        """When this node stands for election, unless it hears of an owner."""
        self.seen = 0
        """The highest promise of anybody, as far as known: the next claim must be above it."""
        self.consented = 0
        """The last epoch promised to a total claim in this life."""
        self.called = False
        """The last owner named this node as its successor,"""
        self.target: tuple[int, ...] = ()
        """and for these replicas; (): for the present ones."""
        self.soft = b""
        self.soft_epoch = 0
        self.promise_batch = 0
        """The batch that the promise was persisted in: a lease is given only on a durable promise,
        so that after a restart the node knows whom it may have given one."""

    def leased_to_other(self, node: int, now_ms: int) -> bool:
        """A live lease forbids a promise to ``node``."""
        return now_ms < self.lease_until_ms and owner_of(self.lease_epoch) != node

    def grant(self, epoch: int, beat: int, until_ms: int) -> None:
        self.lease_epoch = epoch
        self.lease_beat = beat
        self.lease_until_ms = until_ms

    def release(self) -> None:
        self.lease_until_ms = 0
