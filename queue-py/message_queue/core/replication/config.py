"""Where a node stands, and the times that it keeps."""

from __future__ import annotations

from msgspec import Struct


class ReplicationConfig(Struct, frozen=True):
    """Where this node stands; ``preference[p]``: p's replicas, best owner first."""

    node: int
    nodes: int
    incarnation: int  # strictly greater at every boot, durable before the core starts; never 0
    preference: tuple[tuple[int, ...], ...]
    ring: int = 1
    fresh: bool = False  # the store was empty at this start: a new node, or one that lost its disk
    seed: int = 0  # chance: jitter of elections, origins
    wall_ms: int = 0  # the wall clock at start: where cluster time begins in a new cluster
    heartbeat_ms: int = 200
    lease_ms: int = 600  # a replica that renewed an owner promises nobody else for this long
    patience_ms: int = 900  # a silent owner without a broken connection is replaced after this
    timeout_ms: int = 300  # an unanswered claim, seal, pull or record is sent again after this
    prefer_ms: int = 1_500  # a better owner must be back for this long before it is given its own
    # a new cluster forms at once if all nodes are there, after this long with a majority
    genesis_ms: int = 3_000
    window_bytes: int = 1 << 20  # per partition, kept for replicas that missed something
    copy_bytes: int = 1 << 20  # one message of copies at most

    @property
    def drift_ms(self) -> int:
        """An owner ends its lease this much before its replicas do: clocks may differ by 10 %."""
        return self.lease_ms // 10

    def replicas(self, partition: int) -> tuple[int, ...]:
        return self.preference[partition]

    def others(self, partition: int) -> tuple[int, ...]:
        """The partition's replicas but this node."""
        return tuple(node for node in self.preference[partition] if node != self.node)

    def majority(self, partition: int) -> int:
        return len(self.preference[partition]) // 2 + 1

    def witnesses(self, partition: int) -> int:
        """So many of the *other* replicas that one of them took part in every election so far."""
        return len(self.preference[partition]) - self.majority(partition) + 1
