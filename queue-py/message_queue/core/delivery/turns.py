"""Whose turn it is: the states of messages, their leases, and the consumers that wait for them."""

from __future__ import annotations

from message_queue.core.delivery.backlog import Shelf
from message_queue.core.delivery.lifecycle import ALLOWED, State
from message_queue.core.delivery.model import Ended, Ending, Entry, Grant
from message_queue.core.delivery.queues import Queue, QueueView, Waiter
from message_queue.core.delivery.stock import DRAWN_AT_LEAST, Stock


class Turns(Stock):
    """How messages of one partition change their states and get to consumers; who decides that they
    do is `PartitionDelivery`."""

    def __init__(self, epoch: int, shelf: Shelf | None = None) -> None:
        super().__init__(shelf)
        self.epoch = epoch
        self._waiting_in: dict[int, Queue] = {}
        self.delivered: dict[int, Entry] = {}
        """Messages that were delivered and are still held: what a successor should know."""
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

    def _delay_until(self, queue: Queue, entry: Entry, due_ms: int) -> None:
        self._move(queue, entry, State.DELAYED)
        entry.due_ms = due_ms
        self._timers.add(due_ms, entry.dot)

    def _lease_until(self, queue: Queue, entry: Entry, due_ms: int) -> None:
        self._move(queue, entry, State.LEASED)
        entry.due_ms = due_ms
        self._timers.add(due_ms, entry.dot)

    def _take(self, queue: Queue, most: int, visibility_ms: int | None, now_ms: int) -> list[Entry]:
        lease_ms = queue.settings.visibility_ms if visibility_ms is None else visibility_ms
        taken: list[Entry] = []
        while len(taken) < most:
            if most - len(taken) >= DRAWN_AT_LEAST:
                drawn = self._draw(queue, most - len(taken))
                if drawn:
                    self._lease_drawn(queue, drawn, now_ms, now_ms + lease_ms)
                    taken += drawn
                    continue
            entry = self._next(queue, most - len(taken))
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
        return taken

    def _lease_drawn(self, queue: Queue, drawn: list[Entry], now_ms: int, due_ms: int) -> None:
        """Messages straight from the backlog are leased: READY and LEASED in the same moment."""
        epoch, delivered, add_timer = self.epoch, self.delivered, self._timers.add
        for entry in drawn:
            entry.state = State.LEASED
            entry.epoch = epoch
            entry.attempt = 1
            entry.leased_ms = now_ms
            entry.due_ms = due_ms
            delivered[entry.dot] = entry
            add_timer(due_ms, entry.dot)
        queue.counts[State.LEASED] += len(drawn)
        self.deliveries_changed += len(drawn)

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
                line_head=queue.line.peek(),
                backlog=queue.backlog,
                waiters=len(queue.waiters),
                heads={name: g.head for name, g in queue.groups.items() if g.head is not None},
            )
            for queue in self._queues.values()
        ]
