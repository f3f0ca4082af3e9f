"""Whose turn it is: the states of messages, their leases, and the consumers that wait for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from message_queue.core.delivery.backlog import Shelf
from message_queue.core.delivery.leases import Lease
from message_queue.core.delivery.lifecycle import ALLOWED, State
from message_queue.core.delivery.lots import Grant, Lot, Taken
from message_queue.core.delivery.model import (
    MAX_LEASE_MS,
    Ended,
    Ending,
    Entry,
    Receipt,
    Verdict,
)
from message_queue.core.delivery.queues import Queue, QueueView, Waiter
from message_queue.core.delivery.stock import DRAWN_AT_LEAST, Stock
from message_queue.core.operations import MAX_ANSWER_BYTES

CHUNK_BITS = 10
"""No lot reaches across a multiple of 1,024."""


class Turns(Stock):
    """How messages of one partition change their states and get to consumers; who decides that they
    do is `PartitionDelivery`."""

    def __init__(self, epoch: int, shelf: Shelf | None = None) -> None:
        super().__init__(shelf)
        self.epoch = epoch
        self._waiting_in: dict[int, Queue] = {}
        self.deliveries_changed = 0
        """Counts changes of what a successor should know."""
        self.paused = False
        """Nobody who waits is served: the right to deliver is in doubt. See `resume`."""
        self._endings: list[Ending] = []
        self._grants: list[Grant] = []

    # ── who waits ───────────────────────────────────────────────────────────────────────────────

    def wait(self, token: int, queue_name: str, most: int, visibility_ms: int | None) -> None:
        """Stand in line; a `Grant` with this token comes out of `drain` once."""
        queue = self._queue(queue_name)
        queue.waiters[token] = Waiter(token, most, visibility_ms)
        self._waiting_in[token] = queue

    def cancel(self, token: int) -> None:
        """Leave the line (time over, or the client went away). Harmless when no longer in it."""
        queue = self._waiting_in.pop(token, None)
        if queue is not None:
            del queue.waiters[token]
            self._drop_if_idle(queue)

    def waiting(self) -> list[int]:
        """Tokens of all who wait."""
        return list(self._waiting_in)

    def resume(self, now_ms: int) -> None:
        """Deliver again, first to those who waited. O(waiters)."""
        self.paused = False
        for queue in list({queue.name: queue for queue in self._waiting_in.values()}.values()):
            self._serve(queue, now_ms)

    def drain(self) -> tuple[list[Grant], list[Ending]]:
        """What was decided since the last call: messages for waiters, and ends to make durable."""
        grants, self._grants = self._grants, []
        endings, self._endings = self._endings, []
        return grants, endings

    # ── states ──────────────────────────────────────────────────────────────────────────────────

    def _move(self, queue: Queue, entry: Entry, state: State) -> None:
        if state not in ALLOWED[entry.state]:
            raise AssertionError(f"{entry.state.name} to {state.name}")
        queue.counts[entry.state] -= 1
        queue.counts[state] += 1
        if state is State.LEASED:
            self.delivered[entry.dot] = entry
        if state is State.GONE:
            changed = self.delivered.pop(entry.dot, None) is not None
        else:
            changed = State.LEASED in (state, entry.state)
        self.deliveries_changed += changed
        entry.state = state

    def _ready(self, queue: Queue, entry: Entry, now_ms: int) -> None:
        self._move(queue, entry, State.READY)
        if queue.expired(entry, now_ms):
            self._end(queue, entry, Ended.EXPIRED)
            return
        queue.line.push(entry)
        if queue.waiters:
            self._serve(queue, now_ms)

    def _ready_all(self, queue: Queue, entries: list[Entry], now_ms: int) -> None:
        """`_ready` for many at a time: who waits for several of them gets several."""
        for entry in entries:
            self._move(queue, entry, State.READY)
            if queue.expired(entry, now_ms):
                self._end(queue, entry, Ended.EXPIRED)
            else:
                queue.line.push(entry)
        if queue.waiters:
            self._serve(queue, now_ms)

    def _delay_until(self, queue: Queue, entry: Entry, due_ms: int) -> None:
        self._move(queue, entry, State.DELAYED)
        entry.due_ms = due_ms
        self._timers.add(due_ms, entry.dot)

    def _lease_until(self, queue: Queue, entry: Entry, due_ms: int) -> None:
        self._move(queue, entry, State.LEASED)
        entry.due_ms = due_ms
        self._timers.add(due_ms, entry.dot)

    def _take(self, queue: Queue, most: int, visibility_ms: int | None, now_ms: int) -> list[Taken]:
        lease_ms = queue.settings.visibility_ms if visibility_ms is None else visibility_ms
        taken: list[Taken] = []
        left, room_bytes = most, MAX_ANSWER_BYTES
        while left and room_bytes > 0:
            if left >= DRAWN_AT_LEAST and (drawn := self._draw(queue, left, room_bytes)):
                left -= self._lease_drawn(queue, drawn, now_ms, now_ms + lease_ms)
                room_bytes -= sum([lot.body_bytes for lot in drawn])
                taken += drawn
                continue
            entry = self._next(queue, left)
            if entry is None:
                break
            if queue.expired(entry, now_ms):
                self._end(queue, entry, Ended.EXPIRED)
                continue
            entry.epoch = self.epoch
            entry.attempt += 1
            entry.leased_ms = now_ms
            self._lease_until(queue, entry, now_ms + lease_ms)
            taken.append(entry)
            left -= 1
            room_bytes -= entry.body_bytes
        return taken

    def _trim_timers(self) -> None:
        """Who extends a lease leaves the old moment's timer behind."""
        if self._timers.crowded(len(self.entries) + self.lots.count):
            self._timers.replace(self._moments())

    def _moments(self) -> Iterator[tuple[int, int]]:
        """What `Stock` says there is a timer for. One that is SETTLING may be refused its end."""
        for entry in self.entries.values():
            if entry.state is State.DELAYED or entry.state is State.LEASED:
                yield entry.due_ms, entry.dot
            if expires_ms := self._queues[entry.queue].expires_ms(entry):
                yield expires_ms, entry.dot
        for lot in self.lots:
            yield lot.due_ms, lot.first

    def _lease_drawn(self, queue: Queue, drawn: list[Lot], now_ms: int, due_ms: int) -> int:
        """Messages straight from the backlog are leased: READY and LEASED in the same moment. How
        many they are."""
        messages = 0
        for lot in drawn:
            lot.epoch, lot.leased_ms, lot.due_ms = self.epoch, now_ms, due_ms
            messages += lot.count
            self.lots.add(lot)
            self._timers.add(due_ms, lot.first)
        queue.counts[State.LEASED] += messages
        self.deliveries_changed += 1
        return messages

    def _serve(self, queue: Queue, now_ms: int) -> None:
        """Hand ready messages to those who wait, first come, first served."""
        while queue.waiters and not self.paused:
            token = next(iter(queue.waiters))
            waiter = queue.waiters[token]
            taken = self._take(queue, waiter.most, waiter.visibility_ms, now_ms)
            if not taken:
                return
            del queue.waiters[token]
            del self._waiting_in[waiter.token]
            self._grants.append(Grant(waiter.token, taken))

    def _end(self, queue: Queue, entry: Entry, reason: Ended) -> None:
        self._move(queue, entry, State.SETTLING)
        self._endings.append(Ending(entry, reason))

    def _stale(self, receipt: Receipt | None, last: Receipt) -> bool:
        """Whether a receipt is not that of the last delivery. (One of an earlier owner may be, if
        this one has delivered nothing yet.)"""
        if receipt is None:
            return False
        # What this owner gave it knows; a later number than that was never given.
        return receipt < last or (receipt.epoch >= self.epoch and receipt != last)

    # ── lots ──────────────────────────────────────────────────────────────────────────────────────

    def _settle_lot(self, lot: Lot, first: int, last: int, receipt: Receipt | None) -> Verdict:
        if lot.settling:
            return Verdict.SETTLING
        if self._stale(receipt, Receipt(lot.epoch, 1)):
            return Verdict.OVERTAKEN
        part = self._cut(lot, first, last)
        part.settling = True
        counts = self._queues[lot.queue].counts
        counts[State.LEASED] -= part.count
        counts[State.SETTLING] += part.count
        self.deliveries_changed += 1
        return Verdict.DONE

    def _lease_over(self, lot: Lot, now_ms: int) -> None:
        """Nobody settled these in time."""
        queue = self._queues[lot.queue]
        back: list[Entry] = []
        for entry in self._apart(lot):
            if queue.exhausted(entry):
                self._end(queue, entry, Ended.EXHAUSTED)
            else:
                back.append(entry)
        self._ready_all(queue, back, now_ms)

    def _gone_lots(
        self, spans: Iterable[tuple[int, int]], touched: dict[str, Queue]
    ) -> Iterator[int]:
        """Forgets the lots of some spans; gives the dots that are in none."""
        for dot, last in spans:
            while dot <= last:
                lot = self.lots.holding(dot)
                if lot is None:
                    yield dot
                    dot += 1
                    continue
                lot = self._cut(lot, dot, min(last, lot.last))
                self.lots.remove(lot)
                queue = touched[lot.queue] = self._queues[lot.queue]
                queue.counts[State.SETTLING if lot.settling else State.LEASED] -= lot.count
                queue.bytes -= lot.body_bytes
                self.deliveries_changed += 1
                if lot.bodies is not None:
                    self.resident_bytes -= lot.body_bytes
                dot += lot.count

    def _restore_lot(self, lease: Lease, now_ms: int) -> bool:
        """Several that still wait together, and whose lease runs, are a lot here too."""
        first, last = lease.dot, lease.dot + lease.count - 1
        card = self.card(first)
        queue = self._queues.get(card.queue) if card is not None else None
        if (
            card is None
            or queue is None
            or lease.attempt != 1
            or lease.unseen
            or lease.due_ms <= now_ms
            or queue.settings.retention_ms is not None
            or first >> CHUNK_BITS != last >> CHUNK_BITS
            or not queue.backlog.take_span(card.priority, first, last)
        ):
            return False
        leased_ms = min(lease.leased_ms, now_ms)
        due_ms = min(lease.due_ms, leased_ms + MAX_LEASE_MS)
        while first <= last:
            lot = self._lot(queue, card.priority, first, last)
            self._lease_drawn(queue, [lot], leased_ms, due_ms)
            lot.epoch = lease.epoch
            first += lot.count
        return True

    # ── for invariants ──────────────────────────────────────────────────────────────────────────

    def timers(self) -> list[tuple[int, int]]:
        """(due_ms, dot) of every timer, stale ones too."""
        return self._timers.all()

    def views(self) -> list[QueueView]:
        """What `invariants.check` looks at."""
        return [
            QueueView(
                name=queue.name,
                counts=list(queue.counts),
                bytes=queue.bytes,
                members=[e for e in self.entries.values() if e.queue == queue.name],
                lots=[lot for lot in self.lots if lot.queue == queue.name],
                line_head=queue.line.peek(),
                backlog=queue.backlog,
                waiters=len(queue.waiters),
                heads={name: g.head for name, g in queue.groups.items() if g.head is not None},
            )
            for queue in self._queues.values()
        ]
