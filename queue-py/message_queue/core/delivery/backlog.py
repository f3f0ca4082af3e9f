"""Messages of a queue that merely wait for their turn, too many to have an object each.

A plain message that is ready and lies deep in line needs no more than a bit: its queue is known,
its place in line is its dot, and the rest is on disk (`Shelf`). It becomes an `Entry` when its turn
comes near or somebody names it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from message_queue.core.delivery.model import PRIORITIES
from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.replication.dots import DotSet


class Card(NamedTuple):
    """What is known of a stored plain message without reading it."""

    queue: str
    priority: int
    body_bytes: int
    enqueued_ms: int


class Shelf(Protocol):
    """What this node's index knows of the messages of one partition."""

    def card(self, dot: int) -> Card | None:
        """Of a stored plain message; None for any other."""

    def sizes(self, first: int, count: int) -> array[int]:
        """Bytes of the bodies of consecutive messages within a chunk; 0 where nothing is known."""


class ShelfPart(NamedTuple):
    """The messages of one chunk of dots, as a takeover finds them on the shelf."""

    base: int
    """The chunk's first dot."""
    plain: Sequence[tuple[str, int, int, int]]
    """(queue, priority, bits, bytes of all bodies)"""
    others: Sequence[tuple[int, bytes, int]]
    """(dot, meta without headers, body bytes)"""
    missing: int
    """Bits of those that are held and not on the shelf."""


class Purged(NamedTuple):
    """What a purge took out of a backlog; its end is being stored."""

    queue: str
    levels: tuple[tuple[int, DotSet], ...]
    """(priority, messages)"""
    bytes: int

    @property
    def messages(self) -> int:
        """How many."""
        return sum(len(level) for _, level in self.levels)

    def all(self) -> DotSet:
        """The messages."""
        dots = DotSet()
        for _, level in self.levels:
            dots.update(level)
        return dots


class Backlog:
    """One queue's. Invariant: `bytes` is what the bodies of all `count` waiting messages take."""

    __slots__ = ("_head", "_levels", "bytes", "count", "ending", "ending_bytes")

    def __init__(self) -> None:
        self._levels: list[DotSet | None] = [None] * PRIORITIES
        self._head: tuple[int, int] | None = None
        """(priority, dot) of the next in line, when it is known."""
        self.count = 0
        self.bytes = 0
        self.ending = 0
        """Purged, and not yet gone."""
        self.ending_bytes = 0

    @property
    def held(self) -> int:
        """Waiting or ending."""
        return self.count + self.ending

    def add(self, dot: int, priority: int, body_bytes: int) -> None:
        """A message joins. O(1)."""
        level = self._levels[priority]
        if level is None:
            level = self._levels[priority] = DotSet()
        if level.add(*unpack_dot(dot)):
            self.count += 1
            self.bytes += body_bytes
            if self._head is not None and (-priority, dot) < (-self._head[0], self._head[1]):
                self._head = None

    def add_run(self, first: int, messages: int, priority: int, body_bytes: int) -> None:
        """Messages with consecutive dots join, none of which is here yet; `body_bytes` of all of
        them. O(1) for a thousand."""
        level = self._levels[priority]
        if level is None:
            level = self._levels[priority] = DotSet()
        epoch, seq = unpack_dot(first)
        before = len(level)
        level.add_range(epoch, seq, seq + messages - 1)
        self.count += len(level) - before
        self.bytes += body_bytes
        if self._head is not None and (-priority, first) < (-self._head[0], self._head[1]):
            self._head = None

    def take_first(self, priority: int, most: int, below: int | None) -> list[tuple[int, int]]:
        """Up to `most` messages of a priority leave, in order, only those before the dot `below`:
        (first, last) of spans, none across a chunk. The caller takes off `bytes` what their bodies
        take."""
        level = self._levels[priority]
        if level is None:
            return []
        spans = [
            (pack_dot(epoch, first), pack_dot(epoch, last))
            for epoch, first, last in level.take_first(most, unpack_dot(below) if below else None)
        ]
        self.count -= sum([last - first + 1 for first, last in spans])
        if not level:
            self._levels[priority] = None
        self._head = None
        return spans

    def take_span(self, priority: int, first: int, last: int) -> bool:
        """Consecutive messages within a chunk leave, if all of them wait here. The caller takes off
        `bytes` what their bodies take."""
        level = self._levels[priority]
        epoch, low = unpack_dot(first)
        if level is None or not level.covers(epoch, low, unpack_dot(last)[1]):
            return False
        level.remove_range(epoch, low, unpack_dot(last)[1])
        self.count -= last - first + 1
        if not level:
            self._levels[priority] = None
        self._head = None
        return True

    def add_chunk(self, base: int, bits: int, priority: int, body_bytes: int) -> None:
        """Many at once: bit i is the message `base` + i (a multiple of the chunk's size).
        `body_bytes` of all of them. None is here yet."""
        level = self._levels[priority]
        if level is None:
            level = self._levels[priority] = DotSet()
        before = len(level)
        level.add_chunk(base, bits)
        self.count += len(level) - before
        self.bytes += body_bytes
        self._head = None

    def has(self, dot: int, priority: int) -> bool:
        """Whether a message waits here."""
        level = self._levels[priority]
        return level is not None and level.has(*unpack_dot(dot))

    def remove(self, dot: int, priority: int, body_bytes: int) -> bool:
        """It leaves. False when it is not here."""
        level = self._levels[priority]
        if level is None or not level.discard(*unpack_dot(dot)):
            return False
        self.count -= 1
        self.bytes -= body_bytes
        if not level:
            self._levels[priority] = None
        if self._head is not None and self._head[1] == dot:
            self._head = None
        return True

    def first(self, priority: int, most: int = 1) -> list[int]:
        """Up to `most` messages of a priority, in order; they stay. O(chunks + most)."""
        level = self._levels[priority]
        return [pack_dot(*dot) for dot in level.first(most)] if level is not None else []

    def after(self, priority: int, dot: int, most: int) -> list[tuple[int, int]]:
        """Up to `most` messages of a priority behind a dot, in order; they stay: (first, last) of
        spans, none across a chunk."""
        level = self._levels[priority]
        if level is None:
            return []
        spans = level.after(*unpack_dot(dot), most)
        return [(pack_dot(epoch, first), pack_dot(epoch, last)) for epoch, first, last in spans]

    def covers(self, priority: int, first: int, last: int) -> bool:
        """Whether all of these wait here."""
        level = self._levels[priority]
        epoch, low = unpack_dot(first)
        return level is not None and level.covers(epoch, low, unpack_dot(last)[1])

    def head(self) -> tuple[int, int] | None:
        """(priority, dot) of the next in line; O(1) while it stays the same."""
        if self._head is None and self.count:
            for priority in range(PRIORITIES - 1, -1, -1):
                if first := self.first(priority):
                    self._head = priority, first[0]
                    break
        return self._head

    def oldest(self) -> int | None:
        """The smallest dot that waits."""
        return min((dot for p in range(PRIORITIES) for dot in self.first(p)), default=None)

    def end_all(self, queue: str) -> Purged | None:
        """A purge: all that wait begin to end."""
        if not self.count:
            return None
        levels = tuple((p, level) for p, level in enumerate(self._levels) if level is not None)
        purged = Purged(queue, levels, self.bytes)
        self.ending += self.count
        self.ending_bytes += self.bytes
        self._levels = [None] * PRIORITIES
        self._head = None
        self.count = self.bytes = 0
        return purged

    def gone(self, purged: Purged) -> None:
        """The end of these is stored."""
        self.ending -= purged.messages
        self.ending_bytes -= purged.bytes

    def back(self, purged: Purged) -> None:
        """Their end was refused: they wait again."""
        self.gone(purged)
        for priority, dots in purged.levels:
            level = self._levels[priority] or DotSet()
            level.update(dots)
            self._levels[priority] = level
            self.count += len(dots)
        self.bytes += purged.bytes
        self._head = None

    def dots(self) -> Iterator[tuple[int, int]]:
        """(priority, dot) of all that wait."""
        for priority, level in enumerate(self._levels):
            for dot in level.dots() if level is not None else ():
                yield priority, pack_dot(*dot)
