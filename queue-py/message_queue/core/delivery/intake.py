"""What a produce stores: its messages in runs of those that are alike, then its dedupe marks."""

from __future__ import annotations

from typing import NamedTuple

from message_queue.core.delivery import stored
from message_queue.core.delivery.dedupe import DedupeWindow, Key, Mark
from message_queue.core.delivery.pending import New
from message_queue.core.delivery.stored import DEDUPE_WINDOW_MS, DedupeMark
from message_queue.core.operations import NewMessage, Produce
from message_queue.core.replication.drafts import Draft, PutDraft, RunDraft


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


def take_in(op: Produce, window: DedupeWindow, now_ms: int, wall_ms: int) -> Intake:
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
            meta = stored.meta_of(queue, like, now_ms, wall_ms)
            run = New(count - len(bodies), meta, tuple(bodies))
            new.append(run)
            drafts.append(RunDraft(stored.encode(meta), run.bodies))
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
