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
    last: int = 0
    """The seq at which it is done."""


class Storing(_Pending):
    queue: str = ""
    batch: bool = False
    pieces: tuple[int | Mark, ...] = ()
    """For each message of the request: the offset of its draft, or the mark it repeats."""
    new: tuple[tuple[int, MessageMeta, bytes], ...] = ()
    marks: tuple[tuple[int, Mark], ...] = ()
    """(offset of the mark's draft, mark); the message's draft stands right before it."""


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
    for epoch, seq in map(unpack_dot, sorted(set(dots))):
        if spans and spans[-1][0] == epoch and spans[-1][2] + 1 == seq:
            spans[-1] = (epoch, spans[-1][1], seq)
        else:
            spans.append((epoch, seq, seq))
    return tuple(spans)
