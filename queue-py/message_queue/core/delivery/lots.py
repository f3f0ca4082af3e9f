"""Leases of many: messages that were delivered together, straight from the backlog.

Messages that a consumer takes a hundred at a time are mostly acked a hundred at a time. So what was
delivered together and follows each other is one `Lot`: one object, one timer, one line in what a
successor is told; leasing, settling and forgetting it cost about the same for a hundred messages as
for one. Whoever names a single one of them for anything but an ack (nack, extend, release) has it
taken out, as an `Entry`; an ack of some of them cuts the lot in pieces; a lease that ends takes it
apart. Messages with a group, a delay or a lifetime never are in one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import Entry, Receipt
from message_queue.core.delivery.stored import MessageMeta, entry_of

_BLOCK_BITS: Final = 10
LOT_BYTES: Final = 500
"""About what a lot takes in memory besides its messages' bodies (measured)."""


class Lot(Struct, eq=False, gc=False):
    """Messages with consecutive dots, delivered once (attempt 1), together; never across a multiple
    of 1,024. LEASED, or all SETTLING. Times are cluster time."""

    first: int
    count: int
    queue: str
    priority: int
    enqueued_ms: int
    """Of the first one."""
    sizes: array[int]
    """Bytes of each body."""
    body_bytes: int
    """Of all of them."""
    epoch: int
    leased_ms: int
    due_ms: int
    meta: MessageMeta | None = None
    """Of all of them; None: their bodies (and what a meta says) are only on disk."""
    bodies: list[bytes] | None = None
    settling: bool = False

    @property
    def last(self) -> int:
        """The last one's dot."""
        return self.first + self.count - 1


Taken = Entry | Lot
"""What a consumer is given."""


Spanned = Sequence[tuple[int, int, Receipt]]
"""(first, last, receipt) of what was leased together."""


def receipts_of(taken: Sequence[Taken]) -> Spanned:
    """What a consumer was given, and with which receipts."""
    return [
        (its.first, its.last, Receipt(its.epoch, 1))
        if isinstance(its, Lot)
        else (its.dot, its.dot, Receipt(its.epoch, its.attempt))
        for its in taken
    ]


class Grant(Struct, frozen=True):
    """Messages leased to a waiter, which has left the line."""

    token: int
    entries: list[Taken]


class Lots:
    """Invariants: no two lots overlap; `messages` is how many all of them hold, `bodies` how many
    of these have their body here."""

    __slots__ = ("_blocks", "bodies", "count", "messages")

    def __init__(self) -> None:
        self._blocks: dict[int, list[Lot]] = {}
        """By first dot >> 10, in order."""
        self.count = 0
        self.messages = 0
        self.bodies = 0

    def add(self, lot: Lot) -> None:
        """None of its dots is here. O(1) for dots later than all."""
        self.count += 1
        self.messages += lot.count
        if lot.bodies is not None:
            self.bodies += lot.count
        block = self._blocks.get(lot.first >> _BLOCK_BITS)
        if block is None:
            self._blocks[lot.first >> _BLOCK_BITS] = [lot]
        else:
            block.insert(bisect_right(block, lot.first, key=_first), lot)

    def remove(self, lot: Lot) -> None:
        """One that is here."""
        self.count -= 1
        self.messages -= lot.count
        if lot.bodies is not None:
            self.bodies -= lot.count
        block = self._blocks[lot.first >> _BLOCK_BITS]
        if len(block) == 1:
            del self._blocks[lot.first >> _BLOCK_BITS]
        else:
            del block[bisect_right(block, lot.first, key=_first) - 1]

    def holding(self, dot: int) -> Lot | None:
        """The lot that a message is in; None: in none."""
        block = self._blocks.get(dot >> _BLOCK_BITS)
        if block is None:
            return None
        at = bisect_right(block, dot, key=_first) - 1
        if at < 0:
            return None
        lot = block[at]
        return lot if dot < lot.first + lot.count else None

    def __contains__(self, dot: object) -> bool:
        return isinstance(dot, int) and self.holding(dot) is not None

    def __iter__(self) -> Iterator[Lot]:
        for block in self._blocks.values():
            yield from block


def pieces(lot: Lot, first: int, last: int) -> tuple[Lot | None, Lot, Lot | None]:
    """A lot in three: what is before first..last, that itself, and what is after; None: nothing."""
    return (
        _piece(lot, lot.first, first - 1) if first > lot.first else None,
        _piece(lot, first, last),
        _piece(lot, last + 1, lot.last) if last < lot.last else None,
    )


def singles(lot: Lot) -> list[Entry]:
    """A lot's messages, each with an entry, in the state they are in."""
    found: list[Entry] = []
    for offset, size in enumerate(lot.sizes):
        dot = lot.first + offset
        body = lot.bodies[offset] if lot.bodies is not None else None
        if lot.meta is not None:
            entry = entry_of(dot, lot.meta, body, size)
        else:
            entry = Entry(dot, lot.queue, body, size, lot.enqueued_ms, priority=lot.priority)
        entry.state = State.SETTLING if lot.settling else State.LEASED
        entry.attempt, entry.epoch = 1, lot.epoch
        entry.leased_ms, entry.due_ms = lot.leased_ms, lot.due_ms
        found.append(entry)
    return found


def singly(taken: Iterable[Taken]) -> list[Entry]:
    """What was taken, message by message."""
    return [e for its in taken for e in (singles(its) if isinstance(its, Lot) else (its,))]


def _piece(lot: Lot, first: int, last: int) -> Lot:
    low, high = first - lot.first, last - lot.first + 1
    sizes = lot.sizes[low:high]
    bodies = lot.bodies[low:high] if lot.bodies is not None else None
    return msgspec.structs.replace(
        lot, first=first, count=high - low, sizes=sizes, body_bytes=sum(sizes), bodies=bodies
    )


def _first(lot: Lot) -> int:
    return lot.first
