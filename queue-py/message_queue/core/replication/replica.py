"""The replica's side: what a node answers to candidates and owners. Rules of acceptance, in one
place.

Nothing here is answered before what it says is durable (``Desk.later``).
"""

from __future__ import annotations

from message_queue.core.messages import (
    Append,
    AppendRecord,
    Attest,
    Canvass,
    CanvassAnswer,
    Claim,
    Copies,
    Copy,
    Dismiss,
    DismissRecord,
    Inquire,
    Promise,
    PromiseRecord,
    Pull,
    Refusal,
    Seal,
    Soft,
    Spans,
    Standing,
    Stored,
    Yield,
    owner_of,
)
from message_queue.core.replication.desk import Answer, Desk
from message_queue.core.replication.dots import joined
from message_queue.core.replication.effects import Read
from message_queue.core.replication.install import Install
from message_queue.core.replication.seat import Seat
from message_queue.core.runs import last_seq

YIELD_GRACE_MS = 300
"""After a hand-over the others leave the chosen one this much time."""


class Replica:
    """Answers for all partitions of this node."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def canvass(self, seat: Seat, sender: int, message: Canvass, now_ms: int) -> None:
        state = seat.state
        tenure = seat.tenure
        granted = not seat.leased_to_other(sender, now_ms) and (
            tenure is None or now_ms >= tenure.lease_until_ms()
        )
        self._desk.send(
            sender,
            CanvassAnswer(
                state.partition,
                message.epoch,
                granted,
                state.promised,
                state.standing,
                state.sealed,
                state.replicas if state.sealed else (),
                state.before,
            ),
        )

    def claim(self, seat: Seat, sender: int, message: Claim, now_ms: int) -> bool:
        """True if promised; the caller ends whatever this node was doing under an older epoch."""
        desk, state = self._desk, seat.state
        tenure = seat.tenure
        if (
            message.epoch < state.promised
            or message.ring < state.ring
            or seat.leased_to_other(sender, now_ms)
            or (tenure is not None and now_ms < tenure.lease_until_ms())
            or (state.standing is not Standing.MEMBER and not message.total)
        ):
            desk.send(sender, Refusal(state.partition, message.epoch, state.promised))
            return False
        if message.epoch > state.promised:
            desk.persist(PromiseRecord(state.partition, message.epoch, message.ring), state)
            seat.promise_batch = desk.batch
        if message.total:
            seat.consented = message.epoch
        config = desk.config
        seat.grant(message.epoch, message.beat, now_ms + config.lease_ms)
        seat.elect_ms = now_ms + config.patience_ms + desk.chance.below(100)
        desk.later(
            Answer(sender, Promise(state.partition, message.epoch, state.standing, state.view()))
        )
        return True

    def inquire(self, seat: Seat, sender: int, message: Inquire) -> None:
        state = seat.state
        self._desk.later(
            Answer(sender, Attest(state.partition, message.nonce, state.promised, state.standing))
        )

    def pull(self, seat: Seat, sender: int, message: Pull) -> None:
        """Bodies that this node has; what it has no more is said at once."""
        state = seat.state
        bodies = state.bodies()
        found = joined(part for span in message.wanted for part in bodies.within(span))
        missing = bodies.outside(message.wanted)
        if missing:
            self._desk.send(sender, Copies(state.partition, message.for_epoch, (), missing))
        if found:
            self._desk.fx.reads.append(
                Read(
                    sender,
                    state.partition,
                    message.for_epoch,
                    found,
                    self._desk.config.copy_bytes,
                )
            )

    def bodies_read(self, read: Read, found: tuple[Copy, ...], unreadable: Spans) -> None:
        if found or unreadable:
            self._desk.send(read.to, Copies(read.partition, read.for_epoch, found, unreadable))

    def seal(self, seat: Seat, sender: int, message: Seal, now_ms: int) -> bool:
        """True if this node now follows that epoch; the caller ends older business of its own."""
        state = seat.state
        if message.epoch < state.promised or message.ring < state.ring:
            self._desk.send(sender, Refusal(state.partition, message.epoch, state.promised))
            return False
        if state.origin and message.view.origin != state.origin:
            self._desk.note("origin_conflict", state.partition, message.epoch)
            return False
        if message.epoch > state.promised:
            # Whoever seals was elected by a majority: no earlier owner can have a lease any more.
            self._desk.persist(
                PromiseRecord(state.partition, message.epoch, message.ring, True), state
            )
            seat.promise_batch = self._desk.batch
        seat.seen = max(seat.seen, message.epoch)
        if seat.install is not None and seat.install.epoch == message.epoch:
            seat.install.renew(message, now_ms)
        elif self._nothing_new(seat, message):
            self._answer_stored(seat, sender, gap=False)
            return True
        else:
            seat.install = Install(
                self._desk, state, message, seat.consented == message.epoch, now_ms
            )
        self.settle(seat)
        return True

    def _nothing_new(self, seat: Seat, message: Seal) -> bool:
        """A duplicate: this node is sealed under that epoch and knows all that the view covers."""
        state = seat.state
        if message.epoch != state.sealed or state.standing is not Standing.MEMBER:
            return False
        known = state.records.context
        return all(known.within(span) == (span,) for span in message.view.context)

    def settle(self, seat: Seat) -> None:
        """Completes an installation whose last piece may have come."""
        install = seat.install
        if install is not None and install.finish():
            seat.install = None
            self._desk.note("sealed", seat.state.partition, install.epoch)
            self._answer_stored(seat, owner_of(install.epoch), gap=False)

    def append(self, seat: Seat, sender: int, message: Append) -> None:
        """Stores an owner's records, unless a later epoch was promised or its seal is not here."""
        desk, state = self._desk, seat.state
        if (
            message.epoch != state.sealed
            or message.epoch != state.promised
            or state.standing is not Standing.MEMBER
        ):
            desk.send(sender, Refusal(state.partition, message.epoch, state.promised))
            return
        context = state.records.context
        first, last = message.entries[0].seq, last_seq(message.entries[-1])
        if context.within((message.epoch, first, last)) != ((message.epoch, first, last),):
            desk.persist(AppendRecord(state.partition, message.epoch, message.entries), state)
        self._answer_stored(seat, sender, gap=context.contiguous(message.epoch) < last)

    def _answer_stored(self, seat: Seat, to: int, *, gap: bool) -> None:
        state = seat.state
        upto = state.records.context.contiguous(state.sealed)
        self._desk.later(Answer(to, Stored(state.partition, state.sealed, upto, gap)))

    def soft(self, seat: Seat, message: Soft) -> None:
        if message.epoch >= seat.soft_epoch and message.epoch <= seat.state.promised:
            seat.soft_epoch = message.epoch
            seat.soft = message.soft

    def yielded(self, seat: Seat, message: Yield, now_ms: int) -> None:
        """The owner steps back: the lease ends, and the one it names stands first."""
        if message.epoch != seat.state.promised:
            return
        if seat.lease_epoch == message.epoch:
            seat.release()
        elif message.to != self._desk.me:
            return  # a learner may be the successor, though it gave no lease yet
        self.soft(seat, Soft(message.partition, message.epoch, message.soft))
        if message.to == self._desk.me:
            seat.elect_ms = now_ms
            seat.called = True
            seat.target = message.target
        else:
            seat.elect_ms = now_ms + YIELD_GRACE_MS

    def dismissed(self, seat: Seat, sender: int, message: Dismiss) -> None:
        """Others replicate the partition by now: what is here is not needed."""
        state, me = seat.state, self._desk.me
        if me in message.replicas or message.epoch < state.promised:
            return
        if state.standing is Standing.MEMBER or state.copied:
            self._desk.persist(
                DismissRecord(state.partition, message.epoch, message.ring, message.replicas),
                state,
            )
            seat.promise_batch = self._desk.batch
            seat.install = None
            self._desk.note("dismissed", state.partition, message.epoch)
