"""The replication core: elections, leases, replication and catch-up of every partition of a node.

Theory of operation. Each partition has N replicas. An owner is elected by a majority of them for an
epoch; replicas persist their promise and refuse everything older. The owner stamps records with
(epoch, seq) and sends them to the others in order; what a majority has on disk is committed. It may
hand out messages only while a majority has renewed its lease, and no replica that renewed promises
another node anything before the lease has run out: so a message that was acked under a later owner
can't be handed out by an earlier one that has not noticed yet.

This file receives and routes; the work is in ``takeover`` (becoming the owner), ``tenure`` (being
it), ``install`` (following one). ``desk`` decides what waits for the disk. See DESIGN.md.
"""

from __future__ import annotations

from typing import assert_never

from message_queue.core.messages import (
    Append,
    Attest,
    Canvass,
    CanvassAnswer,
    Claim,
    ClockRecord,
    Copies,
    Copy,
    Heartbeat,
    HeartbeatAnswer,
    Inquire,
    PeerMessage,
    Promise,
    Pull,
    Refusal,
    Seal,
    SealRecord,
    Soft,
    Spans,
    Stored,
    WithdrawRecord,
    Yield,
    owner_of,
)
from message_queue.core.replication.clock import ClusterClock
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.desk import Answer, Desk, OwnPromise, OwnStored
from message_queue.core.replication.drafts import Accepted, Draft, NotOwner
from message_queue.core.replication.effects import Effects, Lost, Read
from message_queue.core.replication.heartbeats import STAGGER_MS, Heartbeats
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.replica import Replica
from message_queue.core.replication.seat import Seat
from message_queue.core.replication.state import PartitionState
from message_queue.core.replication.takeover import Phase, Takeover
from message_queue.core.replication.tenure import Tenure
from message_queue.core.replication.validation import plausible

CLOCK_RECORD_MS = 1_000
YIELD_TIMEOUT_MS = 1_000
YIELDS_AT_ONCE = 8


class Replicator:
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
        partitions = [p for p, nodes in enumerate(config.preference) if config.node in nodes]
        for partition in partitions:
            states.setdefault(partition, PartitionState(partition))
        self.config = config
        self._desk = Desk(config, states)
        self.seats = {partition: Seat(states[partition]) for partition in partitions}
        self.peers = {node: Peer() for node in range(config.nodes) if node != config.node}
        self._clock = ClusterClock(restored_ms, now_ms)
        self._clock_kept_ms = restored_ms
        self._heartbeats = Heartbeats(self._desk, self.seats, self.peers, self._clock)
        self._replica = Replica(self._desk)
        self._born_ms = now_ms
        self._now_ms = now_ms
        self._prefer_due_ms = now_ms + config.prefer_ms
        self._leaving = False
        for seat in self.seats.values():
            seat.elect_ms = now_ms + 2 * self._stagger(seat)
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
        """The epoch of the owner as last known here; 0: none yet."""
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

    # -- steps -----------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._clock.advance(now_ms)
        self._heartbeats.tick(now_ms)
        alive = frozenset(
            node for node, peer in self.peers.items() if peer.alive(now_ms, self.config.patience_ms)
        )
        for seat in self.seats.values():
            if seat.tenure is not None:
                self._tick_tenure(seat, seat.tenure, alive, now_ms)
            elif seat.takeover is not None:
                seat.takeover.tick(now_ms)
                self._proceed(seat, now_ms)
            elif now_ms >= seat.elect_ms:
                self._stand(seat, now_ms)
            if seat.install is not None:
                seat.install.tick(now_ms)
        if now_ms >= self._prefer_due_ms:
            self._prefer_due_ms = now_ms + self.config.patience_ms // 2
            self._give_back(now_ms)
        self._keep_clock()
        return self._end(fx, now_ms)

    def receive(self, sender: int, incarnation: int, message: PeerMessage, now_ms: int) -> Effects:
        return self.receive_all(sender, incarnation, (message,), now_ms)

    def receive_all(
        self, sender: int, incarnation: int, messages: tuple[PeerMessage, ...], now_ms: int
    ) -> Effects:
        fx = self._begin(now_ms)
        peer = self.peers.get(sender)
        if peer is None or incarnation < peer.incarnation:
            return fx
        if incarnation > peer.incarnation:
            self._reborn(sender, peer, incarnation, now_ms)
        peer.hear(now_ms, self.config.patience_ms)
        for message in messages:
            if plausible(sender, message):
                self._dispatch(sender, message, now_ms)
            else:
                self._desk.note("implausible", 0, 0, f"{type(message).__name__} from {sender}")
        return self._end(fx, now_ms)

    def peer_connected(self, peer: int, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        for seat in self.seats.values():
            tenure = seat.tenure
            if tenure is not None and peer in tenure.followers and not tenure.up_to_date(peer):
                tenure.resend(peer, now_ms)
        return self._end(fx, now_ms)

    def peer_disconnected(self, peer: int, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        for seat in self.seats.values():
            if seat.lease_epoch and owner_of(seat.lease_epoch) == peer:
                due_ms = max(now_ms, seat.lease_until_ms) + self._stagger(seat)
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
            self._withdraw(read.partition, unreadable)
        return self._end(fx, now_ms)

    def damaged(self, partition: int, lost: Spans, now_ms: int) -> Effects:
        fx = self._begin(now_ms)
        self._withdraw(partition, lost)
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
        self._leaving = True
        for seat in self.seats.values():
            seat.takeover = None
            tenure = seat.tenure
            if tenure is not None and tenure.yield_to is None:
                ready = [p for p in tenure.followers if tenure.up_to_date(p)]
                others = [
                    p for p in self.config.others(seat.state.partition) if self._is_up(p, now_ms)
                ]
                target = next((p for p in others if p in ready), others[0] if others else None)
                self._start_yield(tenure, self.config.node if target is None else target, now_ms)
                self._finish_yield(seat, tenure, now_ms)
        return self._end(fx, now_ms)

    # -- inside a step ---------------------------------------------------------------------------

    def _begin(self, now_ms: int) -> Effects:
        self._now_ms = max(now_ms, self._now_ms)
        return self._desk.begin()

    def _end(self, fx: Effects, now_ms: int) -> Effects:
        if self._desk.due:
            self._release(0, now_ms)
        return fx

    def _release(self, batch: int, now_ms: int) -> None:
        """Does what waited for the disk."""
        for item in self._desk.ready(batch):
            match item:
                case Answer(to, message):
                    self._desk.send(to, message)
                case OwnPromise(partition, epoch):
                    seat = self.seats[partition]
                    if seat.takeover is not None:
                        seat.takeover.own_promise(epoch, now_ms)
                        self._proceed(seat, now_ms)
                case OwnStored(partition, epoch, upto):
                    tenure = self.seats[partition].tenure
                    if tenure is not None and tenure.epoch == epoch:
                        tenure.own_stored(upto)
                        if tenure.yield_to is not None:
                            self._finish_yield(self.seats[partition], tenure, now_ms)
                case _:
                    assert_never(item)

    def _dispatch(self, sender: int, message: PeerMessage, now_ms: int) -> None:
        match message:
            case Heartbeat():
                self._heartbeats.heard(sender, message, now_ms)
                for partition, _ in message.owned:
                    self._abdicate(partition, now_ms)
                return
            case HeartbeatAnswer():
                self._heartbeats.answered(sender, message, now_ms)
                return
            case _:
                pass
        seat = self.seats.get(message.partition)
        if seat is None or sender not in self.config.replicas(message.partition):
            return
        match message:
            case Append():
                self._replica.append(seat, sender, message)
            case Stored():
                self._stored(seat, sender, message, now_ms)
            case Canvass():
                self._replica.canvass(seat, sender, message, now_ms)
            case CanvassAnswer():
                if seat.takeover is not None:
                    seat.takeover.canvassed(sender, message, now_ms, self._genesis(now_ms))
                    self._proceed(seat, now_ms)
            case Claim():
                if self._replica.claim(seat, sender, message, now_ms):
                    self._abdicate(message.partition, now_ms)
            case Promise():
                if seat.takeover is not None:
                    seat.takeover.promised(sender, message, now_ms)
                    self._proceed(seat, now_ms)
            case Refusal():
                self._refused(seat, sender, message, now_ms)
            case Pull():
                self._replica.pull(seat, sender, message)
            case Copies():
                self._copies(seat, sender, message, now_ms)
            case Seal():
                if self._replica.seal(seat, sender, message, now_ms):
                    self._abdicate(message.partition, now_ms)
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
            case _:
                assert_never(message)

    def _reborn(self, sender: int, peer: Peer, incarnation: int, now_ms: int) -> None:
        """The peer restarted. What its earlier life owned is free."""
        first = peer.incarnation == 0
        peer.reborn(incarnation)
        if first:
            return
        for seat in self.seats.values():
            if seat.lease_epoch and owner_of(seat.lease_epoch) == sender:
                seat.release()
                seat.elect_ms = min(seat.elect_ms, now_ms + self._stagger(seat))

    def _is_up(self, node: int, now_ms: int) -> bool:
        return self.peers[node].alive(now_ms, self.config.lease_ms)

    def _stagger(self, seat: Seat) -> int:
        """Better owners stand earlier."""
        rank = self.config.replicas(seat.state.partition).index(self.config.node)
        return rank * STAGGER_MS + self._desk.chance.below(STAGGER_MS // 2)

    def _genesis(self, now_ms: int) -> bool:
        return now_ms - self._born_ms >= self.config.genesis_ms

    # -- becoming the owner ----------------------------------------------------------------------

    def _stand(self, seat: Seat, now_ms: int) -> None:
        """Stands for election, unless another node's lease runs."""
        if self._leaving or seat.leased_to_other(self.config.node, now_ms):
            return
        install = seat.install
        if install is not None and self._is_up(owner_of(install.epoch), now_ms):
            return
        seat.install = None
        seat.takeover = Takeover(self._desk, seat.state, seat.seen, now_ms)
        seat.takeover.begin(now_ms, self._genesis(now_ms))
        self._proceed(seat, now_ms)

    def _proceed(self, seat: Seat, now_ms: int) -> None:
        takeover = seat.takeover
        if takeover is None:
            return
        seat.seen = max(seat.seen, takeover.seen)
        if takeover.phase is Phase.FAILED:
            self._give_up(seat, now_ms)
        elif takeover.phase is Phase.READY:
            self._ascend(seat, takeover, now_ms)

    def _give_up(self, seat: Seat, now_ms: int) -> None:
        seat.takeover = None
        seat.elect_ms = now_ms + 50 + self._desk.chance.below(150) + self._stagger(seat)

    def _ascend(self, seat: Seat, takeover: Takeover, now_ms: int) -> None:
        """Seals the older epochs and begins a tenure; it serves when a majority has the seal."""
        desk, state, epoch = self._desk, seat.state, takeover.epoch
        seat.takeover = None
        seat.install = None
        view = takeover.records.view(epoch, takeover.origin)
        desk.persist(SealRecord(state.partition, epoch, self.config.ring, view), state)
        renewed = {peer: takeover.claimed_ms[peer] for peer in takeover.grantors}
        tenure = Tenure(desk, state, epoch, renewed, now_ms)
        tenure.soft = seat.soft
        seat.tenure = tenure
        seat.release()
        if not self._clock.ms and self.config.wall_ms:
            self._clock.hear(self.config.wall_ms + now_ms - self._born_ms)
        desk.later(OwnStored(state.partition, epoch, 0))
        for peer in tenure.followers:
            tenure.send_seal(peer, now_ms)

    def _refused(self, seat: Seat, sender: int, message: Refusal, now_ms: int) -> None:
        seat.seen = max(seat.seen, message.promised)
        takeover, tenure = seat.takeover, seat.tenure
        if takeover is not None and takeover.epoch == message.epoch:
            takeover.refused(sender, message.promised)
            self._proceed(seat, now_ms)
        elif tenure is not None and tenure.epoch == message.epoch:
            if message.promised > message.epoch:
                tenure.outbid = max(tenure.outbid, message.promised)
            else:
                tenure.unsealed(sender, now_ms)

    def _copies(self, seat: Seat, sender: int, message: Copies, now_ms: int) -> None:
        takeover, install = seat.takeover, seat.install
        if takeover is not None and takeover.fetch is not None:
            before = len(takeover.fetch.remaining)
            takeover.fetch.take(sender, message, now_ms)
            takeover.copied(len(takeover.fetch.remaining) < before, now_ms)
            self._proceed(seat, now_ms)
        elif install is not None:
            # What the owner has no more was acked meanwhile: its next seal says so.
            install.fetch.take(sender, message, now_ms)
            self._replica.settle(seat)

    # -- being the owner, and ceasing to ---------------------------------------------------------

    def _stored(self, seat: Seat, sender: int, message: Stored, now_ms: int) -> None:
        tenure = seat.tenure
        if tenure is not None and tenure.epoch == message.epoch:
            tenure.stored(sender, message.upto, message.gap, now_ms)
            if tenure.yield_to is not None:
                self._finish_yield(seat, tenure, now_ms)

    def _tick_tenure(self, seat: Seat, tenure: Tenure, alive: frozenset[int], now_ms: int) -> None:
        tenure.tick(alive, now_ms)
        if tenure.yield_to is not None:
            if now_ms >= tenure.yield_until_ms:
                if self._leaving:
                    self._end_tenure(seat, clean=tenure.idle)
                else:
                    tenure.yield_to = None
            else:
                self._finish_yield(seat, tenure, now_ms)
        elif tenure.outbid > tenure.epoch:
            if now_ms >= tenure.lease_until_ms():
                self._end_tenure(seat, clean=False)
                seat.elect_ms = now_ms + self._stagger(seat) + 50
            else:
                # A replica promised more to somebody who failed, and can't follow this epoch any
                # more: a new epoch of the same owner takes it back in, when nothing is in flight.
                self._start_yield(tenure, self.config.node, now_ms)
                self._finish_yield(seat, tenure, now_ms)

    def _abdicate(self, partition: int, now_ms: int) -> None:
        """Ends what this node was doing under an epoch older than its promise."""
        seat = self.seats.get(partition)
        if seat is None:
            return
        promised = seat.state.promised
        if seat.tenure is not None and seat.tenure.epoch < promised:
            self._end_tenure(seat, clean=False)
        takeover = seat.takeover
        # A canvass has no epoch yet: it is over when somebody else is followed.
        if (
            takeover is not None
            and takeover.epoch < promised
            and (takeover.epoch or owner_of(promised) != self.config.node)
        ):
            seat.takeover = None
        if seat.install is not None and seat.install.epoch < promised:
            seat.install = None

    def _end_tenure(self, seat: Seat, *, clean: bool) -> None:
        tenure = seat.tenure
        if tenure is None:
            return
        seat.tenure = None
        seat.elect_ms = max(seat.elect_ms, self._now_ms + self.config.patience_ms)
        if tenure.serving:
            self._desk.fx.lost.append(Lost(seat.state.partition, tenure.epoch, clean))
        self._desk.note("owner_lost", seat.state.partition, tenure.epoch)

    def _start_yield(self, tenure: Tenure, to: int, now_ms: int) -> None:
        tenure.yield_to = to
        tenure.yield_until_ms = now_ms + YIELD_TIMEOUT_MS

    def _finish_yield(self, seat: Seat, tenure: Tenure, now_ms: int) -> None:
        """Hands over once nothing is in flight, so that no client is left in doubt."""
        to = tenure.yield_to
        if to is None or not tenure.idle or not tenure.serving:
            return
        if any(c.partition == tenure.partition for c in self._desk.fx.committed):
            return  # in a step of its own, so that nobody has to ask which came first
        if to != self.config.node and not tenure.up_to_date(to) and now_ms < tenure.yield_until_ms:
            return
        self._desk.note("yielded", seat.state.partition, tenure.epoch, f"to {to}")
        for peer in tenure.followers:
            self._desk.send(peer, Yield(seat.state.partition, tenure.epoch, to, tenure.soft))
        seat.soft, seat.soft_epoch = tenure.soft, tenure.epoch
        seat.seen = max(seat.seen, tenure.outbid)
        self._end_tenure(seat, clean=True)
        if to == self.config.node:
            seat.elect_ms = now_ms
            self._stand(seat, now_ms)

    def _give_back(self, now_ms: int) -> None:
        """Hands partitions to better placed replicas that are back and up to date."""
        if self._leaving:
            return
        moved = 0
        for partition, seat in self.seats.items():
            tenure = seat.tenure
            if tenure is None or not tenure.serving or tenure.yield_to is not None:
                continue
            for node in self.config.replicas(partition):
                if node == self.config.node:
                    break
                peer = self.peers[node]
                if (
                    self._is_up(node, now_ms)
                    and now_ms - peer.alive_since_ms >= self.config.prefer_ms
                    and tenure.followers[node].match >= tenure.committed
                ):
                    self._start_yield(tenure, node, now_ms)
                    self._finish_yield(seat, tenure, now_ms)
                    moved += 1
                    break
            if moved >= YIELDS_AT_ONCE:
                return

    # -- the disk --------------------------------------------------------------------------------

    def _withdraw(self, partition: int, lost: Spans) -> None:
        """Records turned out unreadable: this node can't vouch for the partition until it has
        copied it again; an owner steps back."""
        seat = self.seats.get(partition)
        if seat is None:
            return
        self._desk.note("damaged", partition, seat.state.sealed, f"{lost}")
        self._desk.persist(WithdrawRecord(partition, lost), seat.state)
        seat.takeover = None
        if seat.tenure is not None:
            self._end_tenure(seat, clean=False)

    def _keep_clock(self) -> None:
        """Cluster time goes to the log once a second while anything depends on it."""
        if self._clock.ms - self._clock_kept_ms >= CLOCK_RECORD_MS and any(
            seat.state.held for seat in self.seats.values()
        ):
            self._clock_kept_ms = self._clock.ms
            self._desk.persist(ClockRecord(self._clock.ms))
