"""What an owner is asked to stamp and store."""

from __future__ import annotations

from msgspec import Struct

from message_queue.core.messages import Spans
from message_queue.core.replication.effects import Effects


class PutDraft(Struct, frozen=True):
    """A put to be stamped."""

    meta: bytes
    body: bytes


class RunDraft(Struct, frozen=True):
    """Puts that share a meta, to be stamped one after the other."""

    meta: bytes
    bodies: tuple[bytes, ...]


class AckDraft(Struct, frozen=True):
    """Dots to be forgotten for ever. Dots that are not held are passed over."""

    targets: Spans


class SetDraft(Struct, frozen=True):
    """A setting; an empty value removes the key."""

    key: str
    value: bytes


Draft = PutDraft | RunDraft | AckDraft | SetDraft


def seqs(draft: Draft) -> int:
    """How many seqs it takes."""
    return len(draft.bodies) if isinstance(draft, RunDraft) else 1


class Accepted(Struct, frozen=True):
    """The drafts got the seqs from ``first`` on (``seqs`` each) of ``epoch``; they are done when
    ``Committed.upto`` reaches the last.
    """

    epoch: int
    first: int
    effects: Effects


class NotOwner(Struct, frozen=True):
    """Nothing was proposed (definite). ``owner``: where to forward to; None: nobody known now."""

    owner: int | None
