"""What a produce stores: its messages in runs of those that are alike, then its dedupe marks."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from message_queue.core.delivery import stored
from message_queue.core.delivery.dedupe import DedupeWindow, Key, Mark
from message_queue.core.delivery.pending import New
from message_queue.core.delivery.stored import DEDUPE_WINDOW_MS, DedupeMark, MessageMeta
from message_queue.core.operations import NewMessage, Produce
from message_queue.core.replication.drafts import Draft, PutDraft, RunDraft

SHARED_MS: Final = 5
"""So long may a message pass for enqueued together with one before it."""


class Metas:
    """Gives messages their metas, and those that come within `SHARED_MS` and differ in nothing but
    their bodies the same one. So what many clients send one by one becomes a run as well, of one
    entry on the wire, in the log and in every index, where each millisecond would begin another.
    The price: a message's time may be that much before its request came. What has a delay or a
    lifetime, which are to last as long as they were asked for, has a meta of its own."""

    __slots__ = ("_encoded", "_like", "_meta")

    def __init__(self) -> None:
        self._like: NewMessage | None = None
        self._meta = MessageMeta("", 0, 0)
        self._encoded = b""

    def of(
        self, queue: str, message: NewMessage, now_ms: int, wall_ms: int
    ) -> tuple[MessageMeta, bytes]:
        """The meta of a message that is enqueued now, and its encoding."""
        like, meta = self._like, self._meta
        if (
            like is not None
            and meta.queue == queue
            and 0 <= now_ms - meta.enqueued_ms <= SHARED_MS
            and stored.alike(like, message)
        ):
            return meta, self._encoded
        meta = stored.meta_of(queue, message, now_ms, wall_ms)
        encoded = stored.encode(meta)
        if not (message.delay_ms or message.ttl_ms):
            self._like = msgspec.structs.replace(message, body=b"")
            self._meta, self._encoded = meta, encoded
        return meta, encoded


class Intake(NamedTuple):
    """See `pending.Storing`."""

    drafts: list[Draft]
    pieces: list[int | Mark]
    new: tuple[New, ...]
    messages: int
    marks: tuple[tuple[int, int, Mark], ...]


def count_new(op: Produce, window: DedupeWindow, now_ms: int) -> int:
    """How many of a request's messages repeat none that is stored, nor each other."""
    used: set[Key] = set()
    new = 0
    for message in op.messages:
        if message.dedupe_id is not None:
            key = (op.queue, message.dedupe_id, message.moved)
            if key in used or window.find(key, now_ms) is not None:
                continue
            used.add(key)
        new += 1
    return new


def repeats(op: Produce, window: DedupeWindow, now_ms: int) -> bool:
    """Whether a request stores nothing: all of it is there."""
    return op.messages[0].dedupe_id is not None and not count_new(op, window, now_ms)


def take_in(op: Produce, window: DedupeWindow, metas: Metas, now_ms: int, wall_ms: int) -> Intake:
    """Sort a request's messages out. Their dedupe ids are in use from now on."""
    queue = op.queue
    pieces: list[int | Mark] = []
    marked: list[tuple[int, NewMessage, Mark]] = []
    new: list[New] = []
    drafts: list[Draft] = []
    bodies: list[bytes] = []
    like: NewMessage | None = None
    count = 0

    def end_run() -> None:
        if like is not None:
            meta, encoded = metas.of(queue, like, now_ms, wall_ms)
            run = New(count - len(bodies), meta, tuple(bodies))
            new.append(run)
            drafts.append(RunDraft(encoded, run.bodies))
            bodies.clear()

    for message in op.messages:
        if message.dedupe_id is not None:
            key = (queue, message.dedupe_id, message.moved)
            mark = window.find(key, now_ms)
            if mark is not None:
                pieces.append(mark)
                continue
            mark = Mark(0, 0, now_ms + DEDUPE_WINDOW_MS)
            window.add(key, mark)
            marked.append((count, message, mark))
        if like is None or not stored.alike(like, message):
            end_run()
            like = message
        bodies.append(message.body)
        pieces.append(count)
        count += 1
    end_run()
    marks: list[tuple[int, int, Mark]] = []
    for at, (offset, message, mark) in enumerate(marked, count):
        dedupe_id = message.dedupe_id or ""
        meta = DedupeMark(queue, dedupe_id, at - offset, mark.until_ms, message.moved)
        drafts.append(PutDraft(stored.encode(meta), b""))
        marks.append((at, offset, mark))
    return Intake(drafts, pieces, tuple(new), count, tuple(marks))
