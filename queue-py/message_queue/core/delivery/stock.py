"""All messages that a partition's owner holds: those in play, each with an `Entry` or many of them
in a `Lot`, and those that wait in their queue's backlog, of which a bit is all that is in
memory."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from sys import maxsize

from msgspec.structs import replace

from message_queue.core.delivery.backlog import Card, Purged, Shelf
from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.lots import LOT_BYTES, Lot, Lots, pieces, singles
from message_queue.core.delivery.model import PRIORITIES, Counts, Entry
from message_queue.core.delivery.parcels import SLOT_BYTES, Parcel, Parcels
from message_queue.core.delivery.queues import QUEUE_BYTES, Queue, QueueBook
from message_queue.core.delivery.stored import MessageMeta, waits_for_nothing
from message_queue.core.delivery.timers import Timers
from message_queue.core.replication.dots import DotSet

RECALLED_AT_LEAST = 64
RECALLED_AT_ONCE = 256
DRAWN_AT_LEAST = 16
"""Consumers that ask for fewer take them from the line: 64 at least come into play at a time."""
ENTRY_BYTES = 640
"""About what a message in play takes in memory besides its body (measured)."""


class Stock(QueueBook):
    """Invariants: a message is in one place, an entry, a lot or a backlog; every DELAYED and LEASED
    entry and every LEASED lot has a timer at its `due_ms` or earlier, and every entry that can
    expire one at its expiry or earlier; every queue with a retention and a backlog is in
    `_retained`."""

    def __init__(self, shelf: Shelf | None) -> None:
        super().__init__(shelf)
        self.entries: dict[int, Entry] = {}
        self.lots = Lots()
        self.delivered: dict[int, Entry] = {}
        """Entries that were delivered and are still held; with the lots, what a successor should
        know."""
        self.resident_bytes = 0
        """Bodies of messages in play that are in memory."""
        self.parcels = Parcels()
        """Those of messages in backlogs."""
        self._lent: deque[tuple[int, int]] = deque()
        """(first, last) of runs in there that memory has no room for, in the order of dots: their
        only place until this node's own disk has them as well."""
        self._timers = Timers()
        self._retained: dict[str, int] = {}
        """Queue -> when the oldest message of its backlog may expire."""
        self.ending = DotSet()
        """Purged out of a backlog: their end is being stored."""

    @property
    def held(self) -> int:
        """Messages of all queues. O(queues)."""
        waiting = sum(q.backlog.held for q in self._queues.values())
        return len(self.entries) + self.lots.messages + waiting

    @property
    def memory_bytes(self) -> int:
        """About what queues, messages in play, and bodies take. O(1)."""
        of_lots = LOT_BYTES * self.lots.count + SLOT_BYTES * self.lots.bodies
        of_entries = ENTRY_BYTES * len(self.entries) + QUEUE_BYTES * len(self._queues)
        return self.resident_bytes + self.parcels.bytes + of_entries + of_lots

    def counts(self, queue_name: str) -> Counts:
        """See `QueueBook`. O(lots)."""
        counts = super().counts(queue_name)
        times = [lot.enqueued_ms for lot in self.lots if lot.queue == queue_name]
        if not times:
            return counts
        oldest = min(times) if counts.oldest_ms is None else min(*times, counts.oldest_ms)
        return replace(counts, oldest_ms=oldest)

    def card(self, dot: int) -> Card | None:
        """What is known of a message that waits."""
        return self.parcels.card(dot) or super().card(dot)

    # ── into the backlog ────────────────────────────────────────────────────────────────────────

    def _wait(
        self, queue: Queue, first: int, meta: MessageMeta, bodies: Sequence[bytes], keep: bool
    ) -> bool:
        """Plain messages that were stored now join the backlog, if that is the place for them:
        several at once, or one behind others. `keep`: there is room for their bodies in memory."""
        if len(bodies) == 1 and keep and (queue.waiters or not queue.backlog.count):
            return False
        last = first + len(bodies) - 1
        if not keep:
            self._give_back()
        if keep:
            self.parcels.add(first, meta, bodies)
        elif self.shelf is None:
            return False
        elif super().card(last) is None:
            # Committed by the others before this node's own disk has it.
            self.parcels.add(first, meta, bodies)
            self._lent.append((first, last))
        queue.used = True
        queue.backlog.add_run(first, len(bodies), meta.priority, sum(map(len, bodies)))
        if queue.settings.retention_ms is not None and queue.name not in self._retained:
            self._watch_retention(queue)
        return True

    def _give_back(self) -> None:
        """What the disk has by now leaves memory. Amortised O(1) a message: a run is an entry of
        the log, so it is there as a whole."""
        while self._lent:
            first, last = self._lent[0]
            if self.parcels.holding(last) is not None:
                if super().card(last) is None:
                    return
                self.parcels.forget(first, last)
            self._lent.popleft()

    def shelve(self, queue_name: str, base: int, bits: int, priority: int, body_bytes: int) -> None:
        """Plain messages join a backlog: those whose bit is set, counted from the dot `base`, a
        multiple of 1,024. `body_bytes` of all together. For a takeover: O(1), however many."""
        queue = self._queue(queue_name)
        queue.used = True
        queue.backlog.add_chunk(base, bits, priority, body_bytes)
        self._watch_retention(queue)

    # ── out of it ───────────────────────────────────────────────────────────────────────────────

    def _next(self, queue: Queue, most: int) -> Entry | None:
        """The next message in line, still in it. `most`: how many will be asked for in a row."""
        entry = queue.line.peek()
        head = queue.backlog.head()
        if head is None or (entry is not None and before(entry, head)):
            return entry
        self._recall_first(queue, head[0], most)
        return queue.line.peek()

    def browse(self, queue_name: str, most: int) -> list[Entry]:
        """Ready messages in the order of delivery, without leasing them."""
        queue = self._queues.get(queue_name)
        if queue is None:
            return []
        while True:
            found = queue.line.browse(most)
            head = queue.backlog.head()
            if head is None or (len(found) >= most and before(found[-1], head)):
                return found
            self._recall_first(queue, head[0], most)

    def _find(self, dot: int) -> Entry | None:
        """The message of a dot: in play, taken out of its lot, or called into play."""
        entry = self.entries.get(dot)
        if entry is not None:
            return entry
        lot = self.lots.holding(dot)
        if lot is not None:
            return self._apart(self._cut(lot, dot, dot))[0]
        card = self.card(dot)
        queue = self._queues.get(card.queue) if card is not None else None
        if card is None or queue is None or not queue.backlog.has(dot, card.priority):
            return None
        return self._recall(queue, card.priority, dot)

    def _recall_first(self, queue: Queue, priority: int, most: int) -> None:
        """The first ones of a backlog come into play."""
        for dot in queue.backlog.first(priority, _within(most)):
            self._recall(queue, priority, dot)

    def _draw(self, queue: Queue, most: int, room_bytes: int) -> list[Lot]:
        """Up to `most` messages from the head of the backlog, as far as they come before those in
        line and (but for the last ones of a parcel) fit: in no state yet, and in none of the books.
        [] also if their lifetime must be watched."""
        head = queue.backlog.head()
        if head is None or queue.settings.retention_ms is not None:
            return []
        entry, below = queue.line.peek(), None
        if entry is not None:
            if before(entry, head):
                return []
            below = entry.dot if entry.priority == head[0] else None
        drawn: list[Lot] = []
        for first, last in queue.backlog.take_first(head[0], most, below):
            while first <= last and room_bytes > 0:
                lot = self._lot(queue, head[0], first, last, room_bytes)
                room_bytes -= lot.body_bytes
                drawn.append(lot)
                first += lot.count
            if first <= last:
                queue.backlog.add_run(first, last + 1 - first, head[0], 0)
        return drawn

    def _lot(
        self, queue: Queue, priority: int, first: int, last: int, room_bytes: int = maxsize
    ) -> Lot:
        """Messages that just left the backlog, together: as many from `first` on as lie in one
        parcel, or on disk and fit."""
        parcel = self.parcels.holding(first)
        meta: MessageMeta | None = None
        bodies: list[bytes] | None = None
        if parcel is not None:
            count = min(last + 1, parcel.first + len(parcel.bodies)) - first
            bodies, meta = self.parcels.take_run(parcel, first, count), parcel.meta
            sizes, enqueued_ms = array("I", map(len, bodies)), meta.enqueued_ms
        else:
            count = min(last + 1, self.parcels.next_first(first)) - first
            shelf, card = self.shelf, super().card(first)
            # What turned out unreadable a moment ago has no card: reading it will say so.
            sizes = shelf.sizes(first, count) if shelf is not None else array("I", [0]) * count
            enqueued_ms = card.enqueued_ms if card is not None else 1 << 62
            if sum(sizes) > room_bytes:
                count = max(1, bisect_right(list(accumulate(sizes)), room_bytes))
                sizes = sizes[:count]
        size = sum(sizes)
        if bodies is not None:
            self.resident_bytes += size
        queue.backlog.bytes -= size
        queue.bytes += size
        return Lot(
            first, count, queue.name, priority, enqueued_ms, sizes, size, 0, 0, 0, meta, bodies
        )

    # ── lots ────────────────────────────────────────────────────────────────────────────────────

    def _cut(self, lot: Lot, first: int, last: int) -> Lot:
        """Those of a lot as a lot of their own."""
        if first == lot.first and last == lot.last:
            return lot
        self.lots.remove(lot)
        before, wanted, after = pieces(lot, first, last)
        for piece in (before, wanted, after):
            if piece is not None:
                self.lots.add(piece)
                self._timers.add(piece.due_ms, piece.first)
        return wanted

    def _apart(self, lot: Lot) -> list[Entry]:
        """A lot's messages, each with an entry from now on, in the state they were in."""
        self.lots.remove(lot)
        queue = self._queues[lot.queue]
        found = singles(lot)
        for entry in found:
            if lot.meta is None and (card := super().card(entry.dot)) is not None:
                entry.enqueued_ms = card.enqueued_ms
            self.entries[entry.dot] = self.delivered[entry.dot] = entry
            self._timers.add(entry.due_ms, entry.dot)
            if expires_ms := queue.expires_ms(entry):
                self._timers.add(expires_ms, entry.dot)
        queue.recalled.extend(found)
        return found

    def _entry(self, name: str, priority: int, dot: int, parcel: Parcel | None) -> Entry:
        """A message comes into play, out of its parcel if it has one."""
        if parcel is not None:
            body, meta = self.parcels.take(parcel, dot), parcel.meta
            size = len(body)
            self.resident_bytes += size
            return Entry(
                dot, name, body, size, meta.enqueued_ms, meta.wall_ms, meta.headers, meta.origin,
                None, priority,
            )  # fmt: skip
        card = super().card(dot)
        if card is None:
            # It turned out unreadable a moment ago: reading it will say so.
            return Entry(dot, name, None, 0, 1 << 62, priority=priority)
        return Entry(dot, name, None, card.body_bytes, card.enqueued_ms, priority=priority)

    def _recall(self, queue: Queue, priority: int, dot: int) -> Entry:
        entry = self._entry(queue.name, priority, dot, self.parcels.holding(dot))
        size = entry.body_bytes
        queue.backlog.remove(dot, priority, size)
        entry.state = State.READY
        self.entries[dot] = entry
        queue.counts[State.READY] += 1
        queue.bytes += size
        queue.recalled.append(entry)
        if expires_ms := queue.expires_ms(entry):
            self._timers.add(expires_ms, dot)
        queue.line.push(entry)
        return entry

    def ahead(self, queue_name: str) -> list[Entry]:
        """Messages whose turn is near and whose bodies are only on disk."""
        queue = self._queues.get(queue_name)
        found = queue.line.browse(RECALLED_AT_LEAST) if queue is not None else []
        return [entry for entry in found if entry.body is None]

    def at_hand(self, queue_name: str) -> bool:
        """Whether the body of the message whose turn it is is in memory."""
        queue = self._queues.get(queue_name)
        if queue is None:
            return True
        entry, head = queue.line.peek(), queue.backlog.head()
        if head is not None and (entry is None or not before(entry, head)):
            return self.parcels.holding(head[1]) is not None
        return entry is None or entry.body is not None

    def head(self, queue_name: str) -> tuple[int, int, int] | None:
        """(priority, dot, mean body size) of a backlog: where it begins."""
        queue = self._queues.get(queue_name)
        head = queue.backlog.head() if queue is not None else None
        if queue is None or head is None:
            return None
        return *head, queue.backlog.bytes // queue.backlog.count

    def behind(self, queue_name: str, priority: int, dot: int, most: int) -> list[tuple[int, int]]:
        """Up to `most` messages of a backlog behind a dot: (first, last) of those that lie
        together, in a parcel or on disk."""
        queue = self._queues.get(queue_name)
        found: list[tuple[int, int]] = []
        for first, last in queue.backlog.after(priority, dot, most) if queue is not None else ():
            while first <= last:
                parcel = self.parcels.holding(first)
                end = (
                    parcel.first + len(parcel.bodies) if parcel else self.parcels.next_first(first)
                )
                found.append((first, min(last, end - 1)))
                first = end
        return found

    def fill(self, queue_name: str, first: int, meta: MessageMeta, bodies: list[bytes]) -> bool:
        """The bodies of messages that wait, which follow each other within a chunk, were read from
        disk: they are kept if all of them still wait, and lie nowhere else."""
        queue, last = self._queues.get(queue_name), first + len(bodies) - 1
        if (
            queue is None
            or meta.queue != queue_name
            or not waits_for_nothing(meta)
            or not 0 <= meta.priority < PRIORITIES
            or not queue.backlog.covers(meta.priority, first, last)
            or self.parcels.holding(first) is not None
            or self.parcels.next_first(first) <= last
        ):
            return False
        self.parcels.add(first, meta, bodies)
        return True

    def attach(self, entry: Entry, body: bytes) -> None:
        """A body was read ahead of its delivery."""
        if entry.body is None and self.entries.get(entry.dot) is entry:
            entry.body = body
            self.resident_bytes += entry.body_bytes

    # ── their ends ──────────────────────────────────────────────────────────────────────────────

    def _end_backlog(self, queue: Queue) -> Purged | None:
        purged = queue.backlog.end_all(queue.name)
        if purged is not None:
            self.ending.update(purged.all())
        return purged

    def purged(self, purged: Purged) -> None:
        """The end of these is durable."""
        self._queue(purged.queue).backlog.gone(purged)
        gone = purged.all()
        self.ending = self.ending.minus(gone)
        if self.parcels.bytes:
            self.parcels.drop(gone)

    def _unpurge(self, queue: Queue, purged: Purged) -> None:
        queue.backlog.back(purged)
        self.ending = self.ending.minus(purged.all())
        self._watch_retention(queue)

    def _expired(self, now_ms: int) -> Iterator[tuple[Queue, Entry]]:
        """Messages of backlogs whose retention is over, called into play; some at a time, so that
        the rest is due again."""
        for name in [name for name, due_ms in self._retained.items() if due_ms <= now_ms]:
            queue = self._queues[name]
            for _ in range(RECALLED_AT_ONCE):
                self._watch_retention(queue)
                dot = queue.backlog.oldest()
                if dot is None or self._retained.get(name, now_ms + 1) > now_ms:
                    break
                entry = self._find(dot)
                if entry is None:
                    break
                if queue.expired(entry, now_ms):
                    yield queue, entry

    def _watch_retention(self, queue: Queue) -> None:
        """Look at the backlog again when its oldest message expires."""
        kept_ms = queue.settings.retention_ms
        dot = queue.backlog.oldest() if kept_ms is not None else None
        card = self.card(dot) if dot is not None else None
        if card is None or kept_ms is None:
            self._retained.pop(queue.name, None)
        else:
            self._retained[queue.name] = card.enqueued_ms + kept_ms


def _within(most: int) -> int:
    return min(max(most, RECALLED_AT_LEAST), RECALLED_AT_ONCE)


def before(entry: Entry, head: tuple[int, int]) -> bool:
    """Whether a message in play is delivered before a backlog's head, (priority, dot)."""
    return (-entry.priority, entry.dot) < (-head[0], head[1])
