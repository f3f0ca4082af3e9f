"""All messages that a partition's owner holds: those in play, each with an `Entry`, and those that
wait in their queue's backlog, of which a bit is all that is in memory."""

from __future__ import annotations

from collections.abc import Iterator

from message_queue.core.delivery.backlog import Purged, Shelf
from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.queues import Queue, QueueBook
from message_queue.core.delivery.timers import Timers
from message_queue.core.replication.dots import DotSet

RECALLED_AT_LEAST = 64
RECALLED_AT_ONCE = 256
ENTRY_BYTES = 640
"""About what a message in play takes in memory besides its body (measured)."""


class Stock(QueueBook):
    """Invariants: no message is both in play and in a backlog; every DELAYED and LEASED entry has
    a timer at its `due_ms` or earlier, and every entry that can expire one at its expiry or
    earlier; every queue with a retention and a backlog is in `_retained`."""

    def __init__(self, shelf: Shelf | None) -> None:
        super().__init__(shelf)
        self.entries: dict[int, Entry] = {}
        self.resident_bytes = 0
        """Bodies in memory."""
        self._timers = Timers()
        self._retained: dict[str, int] = {}
        """Queue -> when the oldest message of its backlog may expire."""
        self._ending = DotSet()
        """Purged out of a backlog: their end is being stored."""

    @property
    def held(self) -> int:
        """Messages of all queues. O(queues)."""
        return len(self.entries) + sum(q.backlog.held for q in self._queues.values())

    @property
    def memory_bytes(self) -> int:
        """About what the messages in play take. O(1)."""
        return self.resident_bytes + ENTRY_BYTES * len(self.entries)

    # ── into the backlog ────────────────────────────────────────────────────────────────────────

    def deep(self, queue_name: str, keep_bodies: bool) -> bool:
        """Whether a plain message that is stored now should wait in the backlog: memory is full, or
        others wait there already."""
        if self.shelf is None:
            return False
        queue = self._queues.get(queue_name)
        if queue is None:
            return not keep_bodies
        return not queue.waiters and (not keep_bodies or queue.backlog.count > 0)

    def shelve(self, queue_name: str, base: int, bits: int, priority: int, body_bytes: int) -> None:
        """Plain messages join a backlog: those whose bit is set, counted from the dot `base`, a
        multiple of 1,024. `body_bytes` of all together. For a takeover: O(1), however many."""
        queue = self._queue(queue_name)
        queue.used = True
        queue.backlog.add_chunk(base, bits, priority, body_bytes)
        self._watch_retention(queue)

    def shelve_one(self, queue_name: str, dot: int, priority: int, body_bytes: int) -> None:
        """A plain message that is on the shelf joins the backlog."""
        queue = self._queue(queue_name)
        queue.used = True
        queue.backlog.add(dot, priority, body_bytes)
        if queue.settings.retention_ms is not None and queue.name not in self._retained:
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
        """The message of a dot: in play, or called into play."""
        entry = self.entries.get(dot)
        if entry is not None:
            return entry
        card = self.card(dot)
        queue = self._queues.get(card.queue) if card is not None else None
        if card is None or queue is None or not queue.backlog.has(dot, card.priority):
            return None
        return self._recall(queue, card.priority, dot)

    def _recall_first(self, queue: Queue, priority: int, most: int) -> None:
        """The first ones of a backlog come into play."""
        for dot in queue.backlog.first(priority, _within(most)):
            self._recall(queue, priority, dot)

    def _recall(self, queue: Queue, priority: int, dot: int) -> Entry:
        card = self.card(dot)
        # Without a card it turned out unreadable a moment ago: reading it will say so.
        size, enqueued_ms = (
            (card.body_bytes, card.enqueued_ms) if card is not None else (0, 1 << 62)
        )
        queue.backlog.remove(dot, priority, size)
        entry = Entry(dot, queue.name, None, size, enqueued_ms, priority=priority)
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

    def attach(self, entry: Entry, body: bytes) -> None:
        """A body was read ahead of its delivery."""
        if entry.body is None and self.entries.get(entry.dot) is entry:
            entry.body = body
            self.resident_bytes += entry.body_bytes

    # ── their ends ──────────────────────────────────────────────────────────────────────────────

    def _end_backlog(self, queue: Queue) -> Purged | None:
        purged = queue.backlog.end_all(queue.name)
        if purged is not None:
            self._ending.update(purged.all())
        return purged

    def purged(self, purged: Purged) -> None:
        """The end of these is durable."""
        self._queue(purged.queue).backlog.gone(purged)
        self._ending = self._ending.minus(purged.all())

    def _unpurge(self, queue: Queue, purged: Purged) -> None:
        queue.backlog.back(purged)
        self._ending = self._ending.minus(purged.all())
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
