"""What a partition's owner was asked and has not yet stored: gathered, then proposed, then done."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from message_queue.core.delivery.backlog import Purged
from message_queue.core.delivery.dedupe import Mark
from message_queue.core.delivery.model import Settings
from message_queue.core.delivery.stored import MessageMeta
from message_queue.core.ids import unpack_dot
from message_queue.core.messages import Span, Spans
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
    dots: tuple[int, ...] = ()
    answer: Answer | None = None
    purged: Purged | None = None
    """Messages of a backlog that end with it."""


class Configuring(_Pending):
    queue: str = ""
    settings: Settings | None = None
    """None: the queue is deleted."""
    answer: Answer | None = None


Pending = Storing | Settling | Configuring


def spans_of(dots: Sequence[int]) -> Spans:
    """Packed dots as spans: sorted, joined where they touch."""
    spans: list[Span] = []
    first = last = -1
    for dot in sorted(set(dots)):
        # No epoch has so many records that the next one's dots would follow on its own.
        if dot != last + 1:
            if first >= 0:
                spans.append((*unpack_dot(first), unpack_dot(last)[1]))
            first = dot
        last = dot
    if first >= 0:
        spans.append((*unpack_dot(first), unpack_dot(last)[1]))
    return tuple(spans)
