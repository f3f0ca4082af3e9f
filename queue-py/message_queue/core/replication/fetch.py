"""Copying puts from peers that hold them, a page at a time.

Stop and wait: one pull is in flight; each page is bounded by the source, and the next asks for what
is still missing. What was fetched is persisted before the seal that needs it, so the log's order
makes it durable in time.
"""

from __future__ import annotations

from itertools import islice

from message_queue.core.messages import Copies, CopyRecord, Pull, Spans
from message_queue.core.replication.desk import Desk
from message_queue.core.replication.dots import DotSet

PULL_SPANS = 2_048


class Fetch:
    """Invariant: ``remaining`` only shrinks; a source is asked only for what it may have."""

    __slots__ = ("_asked_ms", "_desk", "_partition", "_source", "epoch", "remaining", "sources")

    def __init__(self, desk: Desk, partition: int, epoch: int, wanted: DotSet) -> None:
        self._desk = desk
        self._partition = partition
        self.epoch = epoch
        self.remaining = wanted
        self.sources: dict[int, DotSet] = {}
        self._source: int | None = None
        self._asked_ms = 0

    def add_source(self, peer: int, held: DotSet) -> None:
        self.sources[peer] = held.copy()

    @property
    def done(self) -> bool:
        return not self.remaining

    def lost(self) -> DotSet:
        """What no source has."""
        left = self.remaining.copy()
        for held in self.sources.values():
            left = left.minus(held)
        return left

    def ask(self, now_ms: int) -> None:
        """Pulls the next page, from a source that has something of it."""
        for peer, held in self.sources.items():
            wanted = self.remaining.common(held)
            if wanted:
                self._source = peer
                self._asked_ms = now_ms
                spans = tuple(islice(wanted.runs(), PULL_SPANS))
                self._desk.send(peer, Pull(self._partition, self.epoch, spans))
                return
        self._source = None

    def tick(self, now_ms: int) -> None:
        """An unanswered pull goes to the next source, or again to the only one."""
        if self.done or now_ms - self._asked_ms < 2 * self._desk.config.timeout_ms:
            return
        if self._source is not None and len(self.sources) > 1:
            self.sources[self._source] = self.sources.pop(self._source)
        self.ask(now_ms)

    def take(self, sender: int, message: Copies, now_ms: int) -> Spans:
        """A page came. Returns what the sender turned out not to have."""
        held = self.sources.get(sender)
        if held is None or message.for_epoch != self.epoch:
            return ()
        state = self._desk.states[self._partition]
        new = tuple(copy for copy in message.copies if self.remaining.discard(copy.epoch, copy.seq))
        if new:
            self._desk.persist(CopyRecord(self._partition, self.epoch, new), state)
        for span in message.missing:
            held.remove_range(*span)
        if not self.done and (new or message.missing):
            self.ask(now_ms)
        return message.missing
