"""The replication core: elections, leases, replication and catch-up of every partition of a node.

Theory of operation. Each partition has N replicas. An owner is elected by a majority of them for an
epoch; replicas persist their promise and refuse everything older. The owner stamps records with
(epoch, seq) and sends them to the others in order; what a majority has on disk is committed. It may
hand out messages only while a majority has renewed its lease, and no replica that renewed promises
another node anything before the lease has run out: so a message that was acked under a later owner
can't be handed out by an earlier one that has not noticed yet.

This file receives and routes; the work is in ``offices`` (who owns what), ``takeover`` (becoming
the owner), ``tenure`` (being it), ``replica`` and ``install`` (following one). ``desk`` decides
what waits for the disk. See DESIGN.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, assert_never

from message_queue.core.messages import (
    RING_PARTITION,
    Append,
    Attest,
    Canvass,
    CanvassAnswer,
    Claim,
    ClockRecord,
    Copies,
    Copy,
    Dismiss,
    Farewell,
    Heartbeat,
    HeartbeatAnswer,
    Inquire,
    Member,
    Membership,
    PeerMessage,
    Promise,
    Pull,
    Refusal,
    RingNews,
    Seal,
    Soft,
    Spans,
    Stored,
    Yield,
    owner_of,
)
from message_queue.core.placement.membership import Declined, changing, nodes
from message_queue.core.replication.clock import ClusterClock
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.contract import Replication
from message_queue.core.replication.desk import Answer, Desk, OwnPromise, OwnStored
from message_queue.core.replication.drafts import Accepted, Draft, NotOwner
from message_queue.core.replication.effects import Effects, Read
from message_queue.core.replication.governor import (
    Changed,
    Governor,
    Join,
    Leave,
    RingAnswer,
)
from message_queue.core.replication.heartbeats import Heartbeats
from message_queue.core.replication.moves import Moves
from message_queue.core.replication.offices import Offices
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.replica import Replica
from message_queue.core.replication.seat import Seat
from message_queue.core.replication.state import PartitionState
from message_queue.core.replication.validation import plausible

CLOCK_RECORD_MS = 1_000
NOBODY: Final[Mapping[int, Member]] = MappingProxyType({})


class Replicator(Replication):
    """See ``contract.Replication`` for what each public method takes and gives."""

    def __init__(
        self,
        config: ReplicationConfig,
        states: dict[int, PartitionState],
        restored_ms: int,
        now_ms: int,
    ) -> None:
        """``states``: what storage replayed (a partition without records may be left out);
        ``restored_ms``: the highest ``ClockRecord``, 0 if none."""
        self.config = config
        self._desk = Desk(config, states)
        for partition in self._desk.preference:
            states.setdefault(partition, PartitionState(partition))
        self.seats = {p: Seat(states[p]) for p in self._desk.preference}
        """Of all partitions: a node may be asked to become a replica of any."""
        self.peers = {node: Peer() for node in nodes(self._desk.ring) if node != config.node}
        self._clock = ClusterClock(restored_ms, now_ms)
        self._clock_kept_ms = restored_ms
        self._heartbeats = Heartbeats(self._desk, self.seats, self.peers, self._clock)
        self._replica = Replica(self._desk)
        self._now_ms = now_ms
        self._offices = Offices(
            self._desk, self.seats, self.peers, self._clock, self._replica, now_ms
        )
        self._moves = Moves(self._desk, self.seats, self.peers, self._offices)
        self._governor = Governor(self._desk, self.seats, self.peers, self._offices, self.owner)
        for seat in self.seats.values():
            seat.elect_ms = now_ms + 2 * self._offices.stagger(seat)
            if seat.state.promised:
                # The lease that this node may have given before it went down.
                seat.grant(seat.state.promised, 0, now_ms + config.lease_ms)
                if owner_of(seat.state.promised) != config.node:
                    seat.elect_ms += config.lease_ms

    # -- questions -------------------------------------------------------------------------------

    def may_serve(self, partition: int, now_ms: int) -> bool:
        seat = self.seats.get(partition)
        tenure = None if seat is None else seat.tenure
        return (
            tenure is not None
            and tenure.serving
            and tenure.yield_to is None
            and now_ms < tenure.lease_until_ms()
        )

    def owner(self, partition: int) -> int | None:
        seat = self.seats.get(partition)
        if seat is not None and seat.tenure is not None:
            return self.config.node if seat.tenure.serving else None
        epoch, heard_ms = self._heartbeats.routes.get(partition, (0, 0))
        if not epoch or self._now_ms - heard_ms > self.config.patience_ms:
            return None
        return owner_of(epoch)

    def epoch(self, partition: int) -> int:
        seat = self.seats.get(partition)
        if seat is not None and seat.tenure is not None:
            return seat.tenure.epoch
        return self._heartbeats.routes.get(partition, (0, 0))[0]

    def cluster_ms(self, now_ms: int) -> int:
        self._clock.advance(now_ms)
        return self._clock.ms

    def owned(self) -> tuple[int, ...]:
        return tuple(p for p, seat in self.seats.items() if seat.tenure or seat.takeover)

    def state(self, partition: int) -> PartitionState:
        return self._desk.states[partition]

    @property
    def ring(self) -> Membership:
        """The latest that is known to be committed."""
        return self._desk.ring

    @property
    def progress(self) -> tuple[int, int]:
        """Of the ring change under way: partitions moved, and to be moved."""
        return self._desk.progress()

    def replicas(self, partition: int) -> tuple[int, ...]:
        """Who replicates a partition, best owner first: what its seal says if it is here, else
        what the ring wants."""
        seat = self.seats[partition]
        quorum = self._desk.quorum(seat.state)
        if seat.state.sealed and (self._desk.me in quorum.nodes or not changing(self.ring)):
            return quorum.replicas
        return self._desk.preference[partition]

    # -- steps -----------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._heartbeats.tick(now_ms)
        self._offices.tick(now_ms)
        self._moves.tick(self._heartbeats.routes, now_ms)
        if RING_PARTITION in self.seats:
            self._governor.tick(self.may_serve(RING_PARTITION, now_ms), now_ms)
        self._keep_clock()
        return self._end(fx, now_ms)

    def receive_all(
        self, sender: int, incarnation: int, messages: tuple[PeerMessage, ...], now_ms: int
    ) -> Effects:
        fx = self._begin(now_ms)
        peer = self.peers.get(sender)
        if peer is None:
            self._from_a_stranger(sender, messages)
            return self._end(fx, now_ms)
        if incarnation < peer.incarnation:
            return fx
        if incarnation > peer.incarnation:
            self._reborn(sender, peer, incarnation, now_ms)
        peer.hear(now_ms, self.config.patience_ms)
        for message in messages:
            if sender not in self.peers:
                break  # it has left, as one of these said
            if plausible(sender, message):
                self._dispatch(sender, message, now_ms)
            else:
                self._desk.note("implausible", 0, 0, f"{type(message).__name__} from {sender}")
        return self._end(fx, now_ms)

    def peer_connected(self, peer: int, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._heartbeats.greet(peer, now_ms)
        for seat in self.seats.values():
            tenure = seat.tenure
            if tenure is not None and peer in tenure.followers and not tenure.up_to_date(peer):
                tenure.resend(peer, now_ms)
            elif seat.takeover is not None:
                seat.takeover.reached(peer)
        return self._end(fx, now_ms)

    def peer_disconnected(self, peer: int, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        for seat in self.seats.values():
            if seat.lease_epoch and owner_of(seat.lease_epoch) == peer:
                due_ms = max(now_ms, seat.lease_until_ms) + self._offices.stagger(seat)
                seat.elect_ms = min(seat.elect_ms, due_ms)
        return self._end(fx, now_ms)

    def propose(
        self, partition: int, drafts: tuple[Draft, ...], now_ms: int
    ) -> Accepted | NotOwner:
        seat = self.seats.get(partition)
        tenure = None if seat is None else seat.tenure
        if tenure is None or not self.may_serve(partition, now_ms):
            owner = self.owner(partition)
            return NotOwner(None if owner == self.config.node else owner)
        fx = self._begin(now_ms)
        first = tenure.propose(drafts, now_ms)
        return Accepted(tenure.epoch, first, self._end(fx, now_ms))

    def durable(self, batch: int, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._release(batch, now_ms)
        return self._end(fx, now_ms)

    def bodies_read(
        self, read: Read, found: tuple[Copy, ...], unreadable: Spans, now_ms: int
    ) -> Effects:
        fx = self._begin(now_ms)
        self._replica.bodies_read(read, found, unreadable)
        if unreadable:
            self._offices.withdraw(read.partition, unreadable, now_ms)
        return self._end(fx, now_ms)

    def damaged(self, partition: int, lost: Spans, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._offices.withdraw(partition, lost, now_ms)
        return self._end(fx, now_ms)

    def change_ring(
        self, asked: Join | Leave, now_ms: int, heard: Mapping[int, Member] = NOBODY
    ) -> RingAnswer:
        if RING_PARTITION not in self.seats or not self.may_serve(RING_PARTITION, now_ms):
            owner = self.owner(RING_PARTITION)
            return NotOwner(None if owner == self.config.node else owner)
        fx = self._begin(now_ms)
        answer = self._governor.change(asked, now_ms, heard)
        if isinstance(answer, Declined):
            return answer
        return Changed(answer.version, self._end(fx, now_ms))

    def paused(self, partition: int, soft: bytes | None, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        seat = self.seats[partition]
        if soft is not None and seat.tenure is not None:
            seat.tenure.soft = soft
        self._offices.told(seat, now_ms)
        return self._end(fx, now_ms)

    def soft(self, partition: int, soft: bytes) -> Effects:
        fx = self._desk.begin()
        seat = self.seats.get(partition)
        if seat is not None and seat.tenure is not None and seat.tenure.serving:
            seat.tenure.soft = soft
            for peer in seat.tenure.followers:
                self._desk.send(peer, Soft(partition, seat.tenure.epoch, soft))
        return fx

    def yield_all(self, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._offices.yield_all(now_ms)
        return self._end(fx, now_ms)

    # -- inside a step ---------------------------------------------------------------------------

    def _from_a_stranger(self, sender: int, messages: tuple[PeerMessage, ...]) -> None:
        """Only what it says about the ring: all whom this node knew may have been replaced while it
        was away, or before its disk was lost."""
        for message in messages:
            if (
                isinstance(message, RingNews)
                and RING_PARTITION in self.seats
                and plausible(sender, message)
                and sender in nodes(message.ring)
            ):
                self._governor.adopt(message.ring)

    def _begin(self, now_ms: int) -> Effects:
        self._now_ms = self._desk.now_ms = max(now_ms, self._now_ms)
        self._clock.advance(self._now_ms)
        return self._desk.begin()

    def _end(self, fx: Effects, now_ms: int) -> Effects:
        if self._desk.due:
            self._release(0, now_ms)
        if fx.committed or fx.gained or fx.lost:
            self._governor.after(fx)
        if fx.gained:
            self._heartbeats.soon()  # others forward to the new owner
        fx.jumped_ms = self._clock.take_jump()
        return fx

    def _release(self, batch: int, now_ms: int) -> None:
        """Does what waited for the disk."""
        for item in self._desk.ready(batch):
            match item:
                case Answer(to, message):
                    self._desk.send(to, message)
                case OwnPromise():
                    self._offices.own_promise(item, now_ms)
                case OwnStored():
                    self._offices.own_stored(item, now_ms)
                case _:
                    assert_never(item)

    def _dispatch(self, sender: int, message: PeerMessage, now_ms: int) -> None:
        match message:
            case Heartbeat():
                self._heartbeats.heard(sender, message, now_ms)
                for partition, _ in message.owned:
                    self._offices.abdicate(partition, now_ms)
                return
            case HeartbeatAnswer():
                self._heartbeats.answered(sender, message, now_ms)
                return
            case RingNews(ring):
                if RING_PARTITION in self.seats:
                    self._governor.adopt(ring)
                return
            case _:
                pass
        seat = self.seats.get(message.partition)
        if seat is None or sender not in self.peers:
            return
        match message:
            case Append():
                self._replica.append(seat, sender, message)
            case Stored():
                self._offices.stored(seat, sender, message, now_ms)
            case Canvass():
                self._replica.canvass(seat, sender, message, now_ms)
            case CanvassAnswer():
                self._offices.canvassed(seat, sender, message, now_ms)
            case Claim():
                if self._replica.claim(seat, sender, message, now_ms):
                    self._offices.abdicate(message.partition, now_ms)
            case Promise():
                self._offices.promised(seat, sender, message, now_ms)
            case Refusal():
                self._offices.refused(seat, sender, message, now_ms)
            case Pull():
                self._replica.pull(seat, sender, message)
            case Copies():
                self._offices.copies(seat, sender, message, now_ms)
            case Seal():
                if self._replica.seal(seat, sender, message, now_ms):
                    self._offices.abdicate(message.partition, now_ms)
            case Inquire():
                self._replica.inquire(seat, sender, message)
            case Attest():
                install = seat.install
                if install is not None:
                    if install.attested(sender, message):
                        self._replica.settle(seat)
                    else:
                        seat.install = None
            case Yield():
                self._replica.yielded(seat, message, now_ms)
            case Soft():
                self._replica.soft(seat, message)
            case Farewell():
                self._moves.farewell(seat, sender)
            case Dismiss():
                self._replica.dismissed(seat, sender, message)
            case _:
                assert_never(message)

    def _reborn(self, sender: int, peer: Peer, incarnation: int, now_ms: int) -> None:
        """The peer restarted. What its earlier life owned is free."""
        first = peer.incarnation == 0
        peer.reborn(incarnation)
        self._heartbeats.greet(sender, now_ms)
        if first:
            return
        for seat in self.seats.values():
            if seat.lease_epoch and owner_of(seat.lease_epoch) == sender:
                seat.release()
                seat.elect_ms = min(seat.elect_ms, now_ms + self._offices.stagger(seat))

    # -- the disk --------------------------------------------------------------------------------

    def _keep_clock(self) -> None:
        """Cluster time goes to the log once a second while anything depends on it."""
        if self._clock.ms - self._clock_kept_ms >= CLOCK_RECORD_MS:
            self._clock_kept_ms = self._clock.ms
            if any(seat.state.held for seat in self.seats.values()):
                self._desk.persist(ClockRecord(self._clock.ms))
