"""Waiting messages whose bodies are in memory, as they were stored: many at a time.

A message that waits in a backlog is a bit there. If its body is in memory too, it lies here, in a
parcel with those that were stored with it: what they have in common is kept once. It leaves when it
comes into play (its `Entry` takes the body along) or when it ends.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from message_queue.core.delivery.backlog import Card
from message_queue.core.delivery.stored import MessageMeta
from message_queue.core.ids import pack_dot
from message_queue.core.replication.dots import DotSet

_BLOCK_BITS: Final = 10
_BLOCK: Final = 1 << _BLOCK_BITS
_LOW: Final = _BLOCK - 1
SLOT_BYTES: Final = 48
"""About what a waiting message takes in memory besides the bytes of its body."""
PARCEL_BYTES: Final = 320
"""About what a parcel takes besides: of messages that were stored one by one each has its own
(measured)."""


class Parcel(Struct, eq=False, gc=False):
    """Messages with consecutive dots and one meta; never across a multiple of 1,024.

    Invariant: `left` bodies are not None, at least one.
    """

    first: int
    meta: MessageMeta
    bodies: list[bytes | None]
    left: int


class Parcels:
    """Invariants: no two parcels overlap; `bytes` is about what all of them take in memory."""

    __slots__ = ("_blocks", "bytes")

    def __init__(self) -> None:
        self._blocks: dict[int, list[Parcel]] = {}
        """By first dot >> 10, in order."""
        self.bytes = 0

    def add(self, first: int, meta: MessageMeta, bodies: Sequence[bytes]) -> None:
        """Messages begin to wait; none of these dots is here. O(1) for dots later than all."""
        self.bytes += sum(map(len, bodies)) + SLOT_BYTES * len(bodies)
        at = 0
        while at < len(bodies):
            dot = first + at
            part: list[bytes | None] = list(bodies[at : at + _BLOCK - (dot & _LOW)])
            parcel = Parcel(dot, meta, part, len(part))
            self.bytes += _shared_bytes(meta)
            block = self._blocks.get(dot >> _BLOCK_BITS)
            if block is None:
                self._blocks[dot >> _BLOCK_BITS] = [parcel]
            elif block[-1].first < dot:
                block.append(parcel)
            else:
                insort(block, parcel, key=_first)
            at += len(part)

    def holding(self, dot: int) -> Parcel | None:
        """The parcel that a message lies in; None: not here."""
        block = self._blocks.get(dot >> _BLOCK_BITS)
        if block is None:
            return None
        at = bisect_right(block, dot, key=_first) - 1 if len(block) > 1 else 0
        if at < 0:
            return None
        parcel = block[at]
        offset = dot - parcel.first
        if 0 <= offset < len(parcel.bodies) and parcel.bodies[offset] is not None:
            return parcel
        return None

    def card(self, dot: int) -> Card | None:
        """What is known of a message that is here."""
        parcel = self.holding(dot)
        body = parcel.bodies[dot - parcel.first] if parcel is not None else None
        if parcel is None or body is None:
            return None
        meta = parcel.meta
        return Card(meta.queue, meta.priority, len(body), meta.enqueued_ms)

    def take(self, parcel: Parcel, dot: int) -> bytes:
        """A message leaves the parcel that holds it. Its body."""
        offset = dot - parcel.first
        body = parcel.bodies[offset]
        if body is None:
            raise AssertionError("a message left twice")
        parcel.bodies[offset] = None
        parcel.left -= 1
        self.bytes -= len(body) + SLOT_BYTES
        if not parcel.left:
            self._remove(parcel)
        return body

    def _remove(self, parcel: Parcel) -> None:
        self.bytes -= _shared_bytes(parcel.meta)
        key = parcel.first >> _BLOCK_BITS
        block = self._blocks[key]
        if len(block) == 1:
            del self._blocks[key]
        else:
            del block[bisect_right(block, parcel.first, key=_first) - 1]

    def take_run(self, parcel: Parcel, first: int, count: int) -> list[bytes]:
        """`take` for consecutive messages of one parcel. O(1) for all of it, but for the sizes."""
        low = first - parcel.first
        bodies = [body for body in parcel.bodies[low : low + count] if body is not None]
        if len(bodies) < count:
            raise AssertionError("a message left twice")
        self.bytes -= sum(map(len, bodies)) + SLOT_BYTES * count
        if parcel.left > count:
            parcel.bodies[low : low + count] = [None] * count
            parcel.left -= count
            return bodies
        self._remove(parcel)
        return bodies

    def next_first(self, dot: int) -> int:
        """Where the first parcel behind `dot` begins; at the next multiple of 1,024 at most."""
        block = self._blocks.get(dot >> _BLOCK_BITS, ())
        at = bisect_right(block, dot, key=_first)
        return block[at].first if at < len(block) else (dot | _LOW) + 1

    def drop(self, dots: DotSet) -> None:
        """Messages that ended; those that are not here are passed over."""
        for epoch, number, bits in dots.numbered():
            base = pack_dot(epoch, number << _BLOCK_BITS)
            for parcel in tuple(self._blocks.get(base >> _BLOCK_BITS, ())):
                for offset, body in enumerate(parcel.bodies):
                    if body is not None and bits >> (parcel.first + offset - base) & 1:
                        self.take(parcel, parcel.first + offset)

    def forget(self, first: int, last: int) -> None:
        """Those of these messages that are here lie elsewhere as well, and need not be here."""
        while first <= last:
            parcel = self.holding(first)
            if parcel is None:
                first += 1
                continue
            end = min(last, parcel.first + len(parcel.bodies) - 1)
            for dot in range(first, end + 1):
                if parcel.bodies[dot - parcel.first] is not None:
                    self.take(parcel, dot)
            first = end + 1

    def dots(self) -> Iterator[int]:
        """All that are here."""
        for block in self._blocks.values():
            for parcel in block:
                for offset, body in enumerate(parcel.bodies):
                    if body is not None:
                        yield parcel.first + offset


def _shared_bytes(meta: MessageMeta) -> int:
    """Of a parcel itself, and what its messages have in common."""
    return PARCEL_BYTES + len(meta.headers or b"") + len(meta.origin or b"")


def _first(parcel: Parcel) -> int:
    return parcel.first
