"""Where a node stands, and the times that it keeps."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from message_queue.core.messages import Member, Membership
from message_queue.core.placement.membership import placement

NEVER_MS = 1 << 40
Placement = Callable[[Membership], dict[int, tuple[int, ...]]]


class ReplicationConfig(Struct, frozen=True):
    """Where this node stands. ``membership``: the ring as last known here, and ``place`` what it
    means. (With ``preference``, p's replicas, best owner first, there is no ring to change: for
    tests of what does not depend on it.)
    """

    node: int
    nodes: int
    incarnation: int  # strictly greater at every boot, durable before the core starts; never 0
    preference: tuple[tuple[int, ...], ...] = ()
    membership: Membership | None = None
    place: Placement = placement
    fresh: bool = False  # the store was empty at this start: a new node, or one that lost its disk
    seed: int = 0  # chance: jitter of elections, origins
    wall_ms: int = 0  # the wall clock at start: where cluster time begins in a new cluster
    heartbeat_ms: int = 200
    lease_ms: int = 600  # a replica that renewed an owner promises nobody else for this long
    patience_ms: int = 900  # a silent owner without a broken connection is replaced after this
    timeout_ms: int = 300  # an unanswered claim, seal, pull or record is sent again after this
    prefer_ms: int = 1_500  # a better owner must be back for this long before it is given its own
    # a new cluster forms when all nodes are there; after this long a majority does, which is safe
    # only if no disk is lost before the others have come
    genesis_ms: int = NEVER_MS
    window_bytes: int = 1 << 20  # per partition, kept for replicas that missed something
    pauses: bool = False  # the node answers ``Effects.pausing`` with the leases
    copy_bytes: int = 1 << 20  # one message of copies at most

    @property
    def drift_ms(self) -> int:
        """An owner ends its lease this much before its replicas do: clocks may differ by 10 %."""
        return self.lease_ms // 10

    def founding(self) -> Membership:
        """The ring to begin with."""
        if self.membership is not None:
            return self.membership
        members = tuple((node, Member("")) for node in range(self.nodes))
        return Membership(1, self.nodes, 1, 3, members, next_position=self.nodes)

    def placed(self, ring: Membership) -> dict[int, tuple[int, ...]]:
        """Partition -> its replicas, best owner first, as that ring wants it."""
        return dict(enumerate(self.preference)) if self.preference else self.place(ring)
