"""What a partition's owner was asked and has not yet stored: gathered, then proposed, then done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from message_queue.core.delivery.backlog import Purged
from message_queue.core.delivery.dedupe import Mark
from message_queue.core.delivery.model import Settings
from message_queue.core.delivery.stored import MessageMeta
from message_queue.core.ids import unpack_dot
from message_queue.core.messages import Spans
from message_queue.core.operations import Answer


class _Pending(Struct, eq=False):
    """What waits for its drafts to be stored. `token` 0: nobody asked."""

    token: int
    drafts: int
    seqs: int
    """How many its drafts take."""
    last: int = 0
    """The seq at which it is done."""


class New(Struct, frozen=True, eq=False):
    """Messages of a request that follow each other and share a meta."""

    offset: int
    """Of the first one's seq, from the request's first."""
    meta: MessageMeta
    bodies: tuple[bytes, ...]

    @property
    def body_bytes(self) -> int:
        """Of all of them."""
        return sum(map(len, self.bodies))


class Storing(_Pending):
    queue: str = ""
    batch: bool = False
    first: int = 0
    """Its first seq, once it was proposed."""
    pieces: Sequence[int | Mark] = ()
    """For each message of the request: the offset of its seq, or the mark it repeats."""
    new: tuple[New, ...] = ()
    messages: int = 0
    """How many are new."""
    marks: tuple[tuple[int, int, Mark], ...] = ()
    """(offset of the mark's seq, offset of its message's, mark)"""


class Settling(_Pending):
    spans: tuple[tuple[int, int], ...] = ()
    """(first, last) of what follows each other: sorted, disjoint."""
    answer: Answer | None = None
    purged: Purged | None = None
    """Messages of a backlog that end with it."""


class Configuring(_Pending):
    queue: str = ""
    settings: Settings | None = None
    """None: the queue is deleted."""
    answer: Answer | None = None


Pending = Storing | Settling | Configuring


def joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(first, last) of packed dots: sorted, joined where they touch or overlap."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        # No epoch has so many records that the next one's dots would follow on its own.
        if out and first <= out[-1][1] + 1:
            if last > out[-1][1]:
                out[-1] = (out[-1][0], last)
        else:
            out.append((first, last))
    return tuple(out)


def unpacked(spans: Iterable[tuple[int, int]]) -> Spans:
    """What `joined` gave, as records have it."""
    return tuple([(*unpack_dot(first), unpack_dot(last)[1]) for first, last in spans])


def spans_of(dots: Iterable[int]) -> Spans:
    """Packed dots as spans: sorted, joined where they touch."""
    return unpacked(joined(singly(dots)))


def singly(dots: Iterable[int]) -> list[tuple[int, int]]:
    """Dots as spans of one each."""
    return [(dot, dot) for dot in dots]


def runs_of(
    dots: Sequence[int], receipts: Sequence[str | None]
) -> Iterator[tuple[int, int, str | None]]:
    """(first, last, receipt) of dots that follow each other with one receipt, in their order."""
    first, last, receipt = -1, -2, None
    for dot, its in zip(dots, receipts, strict=False):
        if dot != last + 1 or its != receipt:
            if first >= 0:
                yield first, last, receipt
            first, receipt = dot, its
        last = dot
    if first >= 0:
        yield first, last, receipt
