"""Heartbeats: leases, routes, cluster time, signs of life. One exchange per pair of nodes."""

from __future__ import annotations

from message_queue.core.messages import (
    Heartbeat,
    HeartbeatAnswer,
    PromiseRecord,
    RingNews,
    Standing,
    owner_of,
)
from message_queue.core.replication.clock import ClusterClock
from message_queue.core.replication.desk import Desk
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.seat import Seat

NEWS_EVERY = 5
"""Beats. A peer that does not know this node can't ask for the ring, and is not heard."""
STAGGER_MS = 40
"""Better owners stand for election this much earlier than the next."""


class Heartbeats:
    """Both sides of the exchange."""

    def __init__(
        self, desk: Desk, seats: dict[int, Seat], peers: dict[int, Peer], clock: ClusterClock
    ) -> None:
        self._desk = desk
        self._seats = seats
        self._peers = peers
        self._clock = clock
        self._due_ms = 0
        self.routes: dict[int, tuple[int, int]] = {}
        """Partition -> (epoch, when heard) of the node that says it owns it, for forwarding."""

    def tick(self, now_ms: int) -> None:
        if now_ms >= self._due_ms:
            self._due_ms = now_ms + self._desk.config.heartbeat_ms
            self.send(now_ms)

    def soon(self) -> None:
        """There is news in the next round: it comes with the next tick."""
        self._due_ms = 0

    def greet(self, node: int, now_ms: int) -> None:
        """A beat for a peer that has just come, out of turn: the leases that it gave to an earlier
        life of this node end when it hears this one, which was up to two rounds later."""
        if node in self._peers:
            self._round((node,), now_ms)

    def send(self, now_ms: int) -> None:
        """One round."""
        self._round(tuple(self._peers), now_ms)

    def _round(self, nodes: tuple[int, ...], now_ms: int) -> None:
        """Takeovers in progress are named as well: their leases run too."""
        owned: list[tuple[int, int]] = []
        claimed: list[tuple[int, int]] = []
        moving: list[int] = []
        for partition, seat in self._seats.items():
            if seat.tenure is not None:
                owned.append((partition, seat.tenure.epoch))
                if not self._in_place(partition, seat):
                    moving.append(partition)
            elif seat.takeover is not None and seat.takeover.epoch:
                takeover = seat.takeover
                (owned if takeover.elected else claimed).append((partition, takeover.epoch))
                if takeover.elected:
                    moving.append(partition)
        owns, claims, away = tuple(owned), tuple(claimed), tuple(moving)
        named = owns + claims
        desk = self._desk
        version = desk.ring.version
        self._placed(owns, away, version)
        desk.beat += 1
        for node in nodes:
            peer = self._peers[node]
            beat = Heartbeat(
                desk.beat, peer.incarnation, self._clock.ms, owns, claims, version, away
            )
            peer.sent(desk.beat, named, now_ms)
            desk.send(node, beat)
            knows = peer.ring >= version and peer.alive(now_ms, desk.config.patience_ms)
            if version > 1 and not knows and desk.beat % NEWS_EVERY == 0:
                desk.send(node, RingNews(desk.ring))

    def _in_place(self, partition: int, seat: Seat) -> bool:
        tenure = seat.tenure
        return (
            tenure is not None
            and tenure.in_place
            and set(tenure.quorum.replicas) == set(self._desk.preference[partition])
        )

    def _placed(
        self, owned: tuple[tuple[int, int], ...], moving: tuple[int, ...], version: int
    ) -> None:
        """An owner says which of its partitions are where that ring wants them. What is in place
        stays there until the next ring, whoever owns it."""
        desk = self._desk
        if version != desk.ring.version:
            return
        for partition, _ in owned:
            if partition not in moving and desk.in_place.get(partition) != version:
                desk.in_place[partition] = version
                if partition in desk.moved:
                    done, total = desk.progress()
                    desk.note("ring_moved", partition, version, f"{done}/{total}")

    def news(self, peer: int, version: int) -> None:
        """Tells a peer about the ring if what it knows is older."""
        if 0 < version < self._desk.ring.version:
            self._desk.send(peer, RingNews(self._desk.ring))

    def heard(self, sender: int, message: Heartbeat, now_ms: int) -> None:
        """A peer's round: renew what it owns, unless something newer was promised."""
        desk, peer = self._desk, self._peers[sender]
        if message.beat <= peer.beat:
            return
        peer.beat = message.beat
        peer.hears_me = message.heard == desk.config.incarnation
        if desk.config.fresh and 0 < message.heard < desk.config.incarnation:
            self._not_a_founder()
        if message.heard > desk.config.incarnation and not peer.outlived:
            # Its disk is lost *and* its clock went back: incarnations come from both.
            peer.outlived = True
            detail = f"node {sender} hears only a later life of this node: set the clock, restart"
            desk.note("outlived", 0, message.heard, detail)
        self._clock.hear(message.cluster_ms)
        refused: list[tuple[int, int, int]] = []
        named = dict(message.owned + message.claimed)
        peer.ring = message.ring
        self.news(sender, message.ring)
        self._placed(message.owned, message.moving, message.ring)
        for partition, epoch in message.owned:
            known, heard_ms = self.routes.get(partition, (0, 0))
            if known <= epoch or now_ms - heard_ms > desk.config.patience_ms:
                self.routes[partition] = (epoch, now_ms)
            seat = self._seats.get(partition)
            if seat is None:
                continue
            seat.seen = max(seat.seen, epoch)
            # Silence is consent. Who decides about a partition no more may still be asked by an
            # owner that does not know it, was deposed, and must not take it for its majority.
            if not self._concerned(seat, epoch) or not self._renew(
                seat, epoch, message.beat, now_ms
            ):
                refused.append((partition, epoch, seat.state.promised))
        for partition, epoch in message.claimed:
            seat = self._seats.get(partition)
            # A claim's lease began with the claim; what was not granted then is not granted now.
            if seat is not None and (
                seat.lease_epoch != epoch or not self._renew(seat, epoch, message.beat, now_ms)
            ):
                refused.append((partition, epoch, seat.state.promised))
        if peer.hears_me:
            self._released(sender, named, message.beat, now_ms)
        desk.send(
            sender,
            HeartbeatAnswer(
                message.beat, peer.incarnation, self._clock.ms, tuple(refused), desk.ring.version
            ),
        )

    def _concerned(self, seat: Seat, epoch: int) -> bool:
        """This node is a replica, or is learning to be one. Others take note and renew nothing."""
        state, me = seat.state, self._desk.me
        return (
            state.standing is Standing.MEMBER and state.sealed == epoch
        ) or me in self._desk.quorum(state).nodes

    def _not_a_founder(self) -> None:
        """A peer knows an earlier life of this node, whose disk is empty: it lost it."""
        for partition, seat in self._seats.items():
            if seat.state.standing is Standing.BLANK:
                promised = seat.state.promised
                self._desk.persist(
                    PromiseRecord(partition, promised, self._desk.ring.version, True), seat.state
                )
                self._desk.note("disk_lost", partition, promised)

    def _renew(self, seat: Seat, epoch: int, beat: int, now_ms: int) -> bool:
        """Lengthens the lease of an owner that this node promised, or promises to follow it."""
        state = seat.state
        if epoch < state.promised:
            return False
        config = self._desk.config
        seat.elect_ms = now_ms + config.patience_ms + self._desk.chance.below(100)
        if epoch > state.promised:
            # Elected without this node. Following it is a promise like any other: durable first, so
            # the lease is renewed at a later heartbeat.
            self._desk.persist(
                PromiseRecord(state.partition, epoch, self._desk.ring.version, True), state
            )
            seat.promise_batch = self._desk.batch
            return False
        if seat.promise_batch > self._desk.durable:
            return False
        if state.standing is not Standing.MEMBER and seat.consented != epoch:
            return False
        seat.grant(epoch, beat, now_ms + config.lease_ms)
        return True

    def _released(self, sender: int, named: dict[int, int], beat: int, now_ms: int) -> None:
        """What a live node no longer names, it does not own: epochs are never resumed."""
        for partition, seat in self._seats.items():
            epoch = seat.lease_epoch
            if (
                epoch
                and owner_of(epoch) == sender
                and beat > seat.lease_beat
                and named.get(partition) != epoch
            ):
                if now_ms < seat.lease_until_ms:
                    # It stepped back without a word: whoever stands next need not wait.
                    rank = self._desk.rank(seat.state)
                    seat.elect_ms = min(seat.elect_ms, now_ms + (rank + 1) * STAGGER_MS)
                seat.release()

    def answered(self, sender: int, message: HeartbeatAnswer, now_ms: int) -> None:
        """A peer renewed the leases of a round, counted from when the round was sent."""
        self._clock.hear(message.cluster_ms)
        self.news(sender, message.ring)
        renewed = self._peers[sender].answered(message)
        if renewed is None or message.heard != self._desk.config.incarnation:
            return
        sent_ms, owned = renewed
        refused = {partition: promised for partition, _, promised in message.refused}
        for partition, epoch in owned:
            tenure = self._seats[partition].tenure
            if tenure is None or tenure.epoch != epoch:
                continue
            follower = tenure.followers.get(sender)
            if follower is None:
                continue
            promised = refused.get(partition)
            if promised is None:
                follower.renewed_ms = max(follower.renewed_ms, sent_ms)
            elif promised > epoch:
                tenure.outbid = max(tenure.outbid, promised)
            else:
                tenure.unsealed(sender, now_ms)
