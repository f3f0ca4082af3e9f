"""Moving partitions to where the ring wants them, a few at a time.

```
 owner: learners copy ──▶ they are up to date ──▶ hand over (a planned one: nothing in flight,
          in the background                      leases passed on) to the best of the new replicas
                                                            │
 successor: canvass, claim, seal with (new, before) ◀───────┘
            a majority of the old ones sealed, of the new ones too ──▶ serve, ``Settled``
            asked by one that is no replica any more ──▶ ``Dismiss``: it drops what it holds
```

The owner of a partition is the only one who begins this. If it dies, or the successor does, the
partition is taken over by whatever its latest seal says, and the next owner begins again.
"""

from __future__ import annotations

from message_queue.core.messages import Dismiss, Farewell, Standing, owner_of
from message_queue.core.replication.desk import Desk
from message_queue.core.replication.offices import Offices
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.seat import Seat
from message_queue.core.replication.tenure import Tenure

LEARNING_AT_ONCE = 4
"""Partitions of one owner that are copied at the same time."""
NEARLY = 512
"""A learner that lacks no more records than this is as good as there: the seal brings the rest."""
FAREWELL_MS = 1_000


class Moves:
    """What this node owns and the ring wants elsewhere; what it holds and nobody wants here."""

    __slots__ = ("_desk", "_farewell_ms", "_offices", "_peers", "_seats")

    def __init__(
        self, desk: Desk, seats: dict[int, Seat], peers: dict[int, Peer], offices: Offices
    ) -> None:
        self._desk = desk
        self._seats = seats
        self._peers = peers
        self._offices = offices
        self._farewell_ms = 0

    def tick(self, routes: dict[int, tuple[int, int]], now_ms: int) -> None:
        """``routes``: who owns what, as heard in heartbeats (partition -> epoch, when)."""
        if self._offices.leaving:
            return
        learning = 0
        for partition, seat in self._seats.items():
            tenure = seat.tenure
            if tenure is None or not tenure.in_place or tenure.yield_to is not None:
                continue
            target = self._desk.preference[partition]
            present = tenure.quorum.replicas
            if target == present or set(target) == set(present):
                if len(tenure.followers) >= len(present):
                    tenure.learn((), now_ms)
                continue
            learners = [node for node in target if node not in present]
            if not all(self._offices.is_up(node, now_ms) for node in learners):
                continue
            if learning >= LEARNING_AT_ONCE and not any(n in tenure.followers for n in learners):
                continue
            learning += 1
            tenure.learn(learners, now_ms)
            self._hand_over(seat, tenure, target, now_ms)
        if now_ms >= self._farewell_ms:
            self._farewell_ms = now_ms + FAREWELL_MS
            self._say_farewell(routes)

    def _hand_over(self, seat: Seat, tenure: Tenure, target: tuple[int, ...], now_ms: int) -> None:
        """If a majority of the new replicas, and each new one, has (nearly) everything: to the best
        of them."""
        me = self._desk.me
        near = tenure.committed - NEARLY
        there = [
            node
            for node in target
            if node == me
            or (
                (follower := tenure.followers.get(node)) is not None
                and follower.match >= max(near, 0)
                and self._offices.is_up(node, now_ms)
            )
        ]
        learned = all(node in there for node in target if node not in tenure.quorum.replicas)
        if learned and len(there) > len(target) // 2:
            self._desk.note("moving", seat.state.partition, tenure.epoch, f"to {target}")
            self._offices.start_yield(tenure, there[0], now_ms, target)

    def _say_farewell(self, routes: dict[int, tuple[int, int]]) -> None:
        """Asks owners whether what is held here is still needed."""
        desk = self._desk
        for partition, seat in self._seats.items():
            state = seat.state
            if (
                seat.tenure is None
                and seat.takeover is None
                and desk.me not in desk.preference[partition]
                and state.standing is Standing.MEMBER
                and partition in routes
            ):
                owner = owner_of(routes[partition][0])
                if owner in self._peers:
                    desk.send(owner, Farewell(partition, state.sealed))

    def farewell(self, seat: Seat, sender: int) -> None:
        """A node asks whether it is needed. Not if the present replicas decide alone, and the ring
        does not want it either."""
        tenure, desk = seat.tenure, self._desk
        partition = seat.state.partition
        if (
            tenure is not None
            and tenure.in_place
            and tenure.yield_to is None
            and sender not in tenure.followers
            and sender not in desk.preference[partition]
        ):
            replicas = tenure.quorum.replicas
            desk.send(sender, Dismiss(partition, tenure.epoch, desk.ring.version, replicas))
