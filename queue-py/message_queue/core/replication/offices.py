"""Ownership: standing for election, holding office, handing over, stepping back.

```
             elect_ms                 READY                    majority sealed
  (replica) ─────────▶ Takeover ────────────▶ Tenure, sealing ─────────────────▶ Tenure, serving
      ▲                   │ FAILED                │                                    │
      ├───────────────────┘   a higher promise, damage, or a yield when idle           │
      └───────────────────────────────────────────┴────────────────────────────────────┘
```
"""

from __future__ import annotations

from message_queue.core.messages import (
    RING_PARTITION,
    CanvassAnswer,
    Copies,
    Promise,
    Refusal,
    SealRecord,
    Spans,
    Stored,
    WithdrawRecord,
    Yield,
    owner_of,
)
from message_queue.core.replication.clock import ClusterClock
from message_queue.core.replication.desk import Desk, OwnPromise, OwnStored
from message_queue.core.replication.effects import Lost
from message_queue.core.replication.heartbeats import STAGGER_MS
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.replica import Replica
from message_queue.core.replication.seat import Seat
from message_queue.core.replication.takeover import Founding, Phase, Takeover
from message_queue.core.replication.tenure import Tenure

YIELD_TIMEOUT_MS = 1_000
YIELDS_AT_ONCE = 8
STARTING_MS = 2_000
"""After its start a node asks eagerly: the others may be starting as well (a power cut), and each
gives its vote as soon as it has heard that the last owner owns nothing any more."""


class Offices:
    """What this node owns, wants to own, or is about to give away."""

    def __init__(
        self,
        desk: Desk,
        seats: dict[int, Seat],
        peers: dict[int, Peer],
        clock: ClusterClock,
        replica: Replica,
        now_ms: int,
    ) -> None:
        self.config = desk.config
        self.seats = seats
        self.peers = peers
        self.leaving = False
        self._desk = desk
        self._clock = clock
        self._replica = replica
        self._born_ms = now_ms
        self._prefer_due_ms = now_ms + self.config.prefer_ms

    def tick(self, now_ms: int) -> None:
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

    def own_promise(self, item: OwnPromise, now_ms: int) -> None:
        """This node's own promise is durable."""
        seat = self.seats[item.partition]
        if seat.takeover is not None:
            seat.takeover.own_promise(item.epoch, now_ms)
            self._proceed(seat, now_ms)

    def own_stored(self, item: OwnStored, now_ms: int) -> None:
        """This node's own records are durable."""
        seat = self.seats[item.partition]
        tenure = seat.tenure
        if tenure is not None and tenure.epoch == item.epoch:
            tenure.own_stored(item.upto)
            if tenure.yield_to is not None:
                self._finish_yield(seat, tenure, now_ms)

    def canvassed(self, seat: Seat, sender: int, message: CanvassAnswer, now_ms: int) -> None:
        if seat.takeover is not None:
            seat.takeover.canvassed(sender, message, now_ms, self._founding(now_ms))
            self._proceed(seat, now_ms)

    def promised(self, seat: Seat, sender: int, message: Promise, now_ms: int) -> None:
        if seat.takeover is not None:
            seat.takeover.promised(sender, message, now_ms)
            self._proceed(seat, now_ms)

    def is_up(self, node: int, now_ms: int) -> bool:
        peer = self.peers.get(node)
        return peer is not None and peer.alive(now_ms, self.config.lease_ms)

    def stagger(self, seat: Seat) -> int:
        """Better owners stand earlier."""
        return self._desk.rank(seat.state) * STAGGER_MS + self._desk.chance.below(STAGGER_MS // 2)

    def _founding(self, now_ms: int) -> Founding:
        """Whether a partition of which nobody shows a seal may be made now. All nodes have to be
        there and to know of no later ring: only then is it sure that it never existed."""
        if self._desk.ring.version > 1:
            return Founding.NEVER
        if now_ms - self._born_ms >= self.config.genesis_ms:
            return Founding.MAJORITY
        if RING_PARTITION not in self.seats:
            return Founding.ALL
        if all(peer.hears_me and peer.ring == 1 for peer in self.peers.values()):
            return Founding.ALL
        return Founding.NEVER

    # -- becoming the owner ----------------------------------------------------------------------

    def _stand(self, seat: Seat, now_ms: int) -> None:
        """Stands for election, unless another node's lease runs."""
        called, target = seat.called, seat.target
        seat.called, seat.target = False, ()
        if self.leaving or seat.leased_to_other(self.config.node, now_ms):
            return
        deciders = target or self._desk.quorum(seat.state).replicas
        if self.config.node not in deciders:
            seat.elect_ms = now_ms + self.config.patience_ms
            return
        install = seat.install
        if install is not None and self.is_up(owner_of(install.epoch), now_ms):
            return
        seat.install = None
        eager = called or now_ms - self._born_ms < STARTING_MS
        seat.takeover = Takeover(self._desk, seat.state, seat.seen, now_ms, target, eager=eager)
        seat.takeover.begin(now_ms, self._founding(now_ms))
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
        seat.elect_ms = now_ms + 50 + self._desk.chance.below(150) + self.stagger(seat)

    def _ascend(self, seat: Seat, takeover: Takeover, now_ms: int) -> None:
        """Seals the older epochs and begins a tenure; it serves when a majority has the seal."""
        desk, state, epoch = self._desk, seat.state, takeover.epoch
        seat.takeover = None
        seat.install = None
        quorum = takeover.config
        view = takeover.records.view(epoch, takeover.origin, quorum.replicas, quorum.before)
        desk.persist(SealRecord(state.partition, epoch, desk.ring_of(state), view), state)
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

    def refused(self, seat: Seat, sender: int, message: Refusal, now_ms: int) -> None:
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

    def copies(self, seat: Seat, sender: int, message: Copies, now_ms: int) -> None:
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

    def stored(self, seat: Seat, sender: int, message: Stored, now_ms: int) -> None:
        tenure = seat.tenure
        if tenure is not None and tenure.epoch == message.epoch:
            tenure.stored(sender, message.upto, message.gap, now_ms)
            if tenure.yield_to is not None:
                self._finish_yield(seat, tenure, now_ms)

    def _tick_tenure(self, seat: Seat, tenure: Tenure, alive: frozenset[int], now_ms: int) -> None:
        tenure.tick(alive, now_ms)
        if tenure.yield_to is not None:
            if now_ms >= tenure.yield_until_ms:
                if self.leaving:
                    self._end_tenure(seat, now_ms, clean=tenure.idle)
                else:
                    tenure.yield_to = None
            else:
                self._finish_yield(seat, tenure, now_ms)
        elif tenure.outbid > tenure.epoch:
            if now_ms >= tenure.lease_until_ms():
                self._end_tenure(seat, now_ms, clean=False)
                seat.elect_ms = now_ms + self.stagger(seat) + 50
            else:
                # A replica promised more to somebody who failed, and can't follow this epoch any
                # more: a new epoch of the same owner takes it back in, when nothing is in flight.
                self.start_yield(tenure, self.config.node, now_ms)
                self._finish_yield(seat, tenure, now_ms)

    def abdicate(self, partition: int, now_ms: int) -> None:
        """Ends what this node was doing under an epoch older than its promise."""
        seat = self.seats.get(partition)
        if seat is None:
            return
        promised = seat.state.promised
        if seat.tenure is not None and seat.tenure.epoch < promised:
            self._end_tenure(seat, now_ms, clean=False)
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

    def _end_tenure(self, seat: Seat, now_ms: int, *, clean: bool) -> None:
        tenure = seat.tenure
        if tenure is None:
            return
        seat.tenure = None
        seat.elect_ms = max(seat.elect_ms, now_ms + self.config.patience_ms)
        if tenure.serving:
            # What was gained in this very step was told to nobody: there is nothing to lose.
            fx = self._desk.fx
            told = len(fx.gained)
            fx.gained = [
                g for g in fx.gained if (g.partition, g.epoch) != (tenure.partition, tenure.epoch)
            ]
            if len(fx.gained) == told:
                fx.lost.append(Lost(seat.state.partition, tenure.epoch, clean))
        self._desk.note("owner_lost", seat.state.partition, tenure.epoch)

    def start_yield(
        self, tenure: Tenure, to: int, now_ms: int, target: tuple[int, ...] = ()
    ) -> None:
        """From here on nothing is delivered or taken in; ``_finish_yield`` does the rest."""
        tenure.yield_to = to
        tenure.target = target
        tenure.told = not self.config.pauses
        self._desk.fx.pausing.append(tenure.partition)
        tenure.yield_until_ms = now_ms + YIELD_TIMEOUT_MS

    def _finish_yield(self, seat: Seat, tenure: Tenure, now_ms: int) -> None:
        """Hands over once nothing is in flight, so that no client is left in doubt."""
        to = tenure.yield_to
        if to is None or not tenure.idle or not tenure.serving:
            return
        if not tenure.told and now_ms < tenure.yield_until_ms:
            return
        if any(c.partition == tenure.partition for c in self._desk.fx.committed):
            return  # in a step of its own, so that nobody has to ask which came first
        if to != self.config.node and not tenure.up_to_date(to) and now_ms < tenure.yield_until_ms:
            return
        self._desk.note("yielded", seat.state.partition, tenure.epoch, f"to {to}")
        word = Yield(seat.state.partition, tenure.epoch, to, tenure.soft, tenure.target)
        for peer in tenure.followers:
            self._desk.send(peer, word)
        seat.soft, seat.soft_epoch = tenure.soft, tenure.epoch
        seat.seen = max(seat.seen, tenure.outbid)
        self._end_tenure(seat, now_ms, clean=True)
        if to == self.config.node:
            seat.elect_ms = now_ms
            seat.called, seat.target = True, tenure.target
            self._stand(seat, now_ms)

    def told(self, seat: Seat, now_ms: int) -> None:
        """The leases as they stood when deliveries ended were passed on."""
        if seat.tenure is not None and seat.tenure.yield_to is not None:
            seat.tenure.told = True
            self._finish_yield(seat, seat.tenure, now_ms)

    def yield_all(self, now_ms: int) -> None:
        """SIGTERM: each partition goes to a replica that is up to date, if there is one."""
        self.leaving = True
        for seat in self.seats.values():
            seat.takeover = None
            tenure = seat.tenure
            if tenure is not None and tenure.yield_to is None:
                others = [
                    p
                    for p in tenure.quorum.replicas
                    if p != self.config.node and self.is_up(p, now_ms)
                ]
                ready = [p for p in others if tenure.up_to_date(p)]
                target = next(iter(ready or others), self.config.node)
                self.start_yield(tenure, target, now_ms)
                self._finish_yield(seat, tenure, now_ms)

    def _give_back(self, now_ms: int) -> None:
        """Hands partitions to better placed replicas that are back and up to date."""
        if self.leaving:
            return
        moved = 0
        for partition, seat in self.seats.items():
            tenure = seat.tenure
            if tenure is None or not tenure.serving or tenure.yield_to is not None:
                continue
            for node in self._desk.ranked(partition, tenure.quorum.replicas):
                if node == self.config.node:
                    break
                peer = self.peers.get(node)
                if (
                    peer is not None
                    and node in tenure.followers
                    and self.is_up(node, now_ms)
                    and now_ms - peer.alive_since_ms >= self.config.prefer_ms
                    and tenure.followers[node].match >= tenure.committed
                ):
                    self.start_yield(tenure, node, now_ms)
                    self._finish_yield(seat, tenure, now_ms)
                    moved += 1
                    break
            if moved >= YIELDS_AT_ONCE:
                return

    def withdraw(self, partition: int, lost: Spans, now_ms: int) -> None:
        """Records turned out unreadable: this node can't vouch for the partition until it has
        copied it again; an owner steps back."""
        seat = self.seats.get(partition)
        if seat is None:
            return
        self._desk.note("damaged", partition, seat.state.sealed, f"{lost}")
        self._desk.persist(WithdrawRecord(partition, lost), seat.state)
        seat.takeover = None
        if seat.tenure is not None:
            self._end_tenure(seat, now_ms, clean=False)
