"""Moves between queues of different partitions: to the dead letter queue, and back from it.

```
                 note stored here        stored at the target        end and note's end stored here
 exhausted ──▶ "these are being moved" ──▶ under one dedupe id each ──▶ gone here
```

A message is stored at its target before it is removed at its source, so a crash in between leaves
two, never none. The note makes the next owner take the move up at once, and the dedupe id, made of
the message's own id, makes the repetition give the same message again: the same id, one copy. (The
note is a setting of the partition, one for each queue: one whose dead letter queue is full does not
keep the others waiting.)
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import Entry, Verdict
from message_queue.core.ids import message_id
from message_queue.core.operations import Answer, NewMessage, Produce, Redrive, refusal

if TYPE_CHECKING:
    from message_queue.hosting import Host

log = logging.getLogger(__name__)

BURY_NOTE = "note/dead/"
REDRIVE_NOTE = "note/redrive/"
_RETRY_S = (0.1, 5.0)
"""How long a move pauses that was refused: at first, and at most when the same refusal (a full
queue, a full disk) comes again and again. One without an owner has waited for one already."""
_AT_ONCE = 300
"""Letters of a batch: two syncs one after the other each, so thousands in small batches would take
a busy machine long."""
_BYTES_AT_ONCE = 1 << 20
_ANSWER_WITHIN_S = 1.2
"""A redrive that takes longer goes on after its answer."""
_SKIPPED_MOST = 10_000
"""Messages in a dead letter queue that are not for this redrive, beyond which it ends."""
_STORED = (200, 201)
_json = msgspec.json.Encoder()


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dead letter's past, as its consumer sees it."""

    source_id: str
    source: str
    reason: str
    deliveries: int = 0
    priority: int = 0
    group_id: str | None = None


class Burying(msgspec.Struct, frozen=True, array_like=True):
    """Messages that are being moved to their dead letter queue: (dot, attempts)."""

    letters: tuple[tuple[int, int], ...]


class Redriving(msgspec.Struct, frozen=True, array_like=True):
    """A redrive that is under way."""

    source: str | None
    upto: int
    """The last letter that it sends back: what dies again meanwhile stays."""
    most: int | None
    """How many letters it may send back; after a failover it counts anew."""


_origins = msgspec.json.Decoder(Origin)
_burying = msgspec.msgpack.Decoder(Burying)
_redriving = msgspec.msgpack.Decoder(Redriving)
_msgpack = msgspec.msgpack.Encoder()


class Mover:
    """One for each `Host`, and as long: what it has not done is done by the next owner's."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._exhausted: dict[str, deque[Entry]] = {}
        """By queue; a task for each, which ends when there is nothing left."""
        self.redriving: set[str] = set()
        """Dead letter queues that are being emptied."""

    # ── to the dead letter queue ────────────────────────────────────────────────────────────────

    def bury(self, entries: Iterable[Entry]) -> None:
        """Exhausted messages, already SETTLING: one task a queue moves them, some at a time."""
        for entry in entries:
            waiting = self._exhausted.get(entry.queue)
            if waiting is None:
                waiting = self._exhausted[entry.queue] = deque()
                self._host.around.spawn(self._bury_all(entry.queue, waiting))
            waiting.append(entry)

    async def _bury_all(self, queue: str, waiting: deque[Entry]) -> None:
        while waiting and not self._host.ended:
            batch = _together(waiting, queue)
            for _ in batch:
                waiting.popleft()
            await self._bury(queue, batch)
        del self._exhausted[queue]

    async def _bury(self, queue: str, batch: Sequence[Entry]) -> None:
        """Tried until done, until the queue's settings want it no more, or until the ownership ends
        (then the note speaks)."""
        host = self._host
        delivery = host.owner.delivery
        key = BURY_NOTE + queue
        retry_s, status = _RETRY_S[0], 503
        note = _msgpack.encode(Burying(tuple((e.dot, e.attempt) for e in batch)))
        noted = await host.keep_note(key, note)
        # A consumer that was too slow may still ack one: then it is no dead letter.
        while not host.ended and (left := [e for e in batch if e.state is not State.GONE]):
            target = delivery.settings(queue).dead_letter
            if target is None:
                # They have no place to go to (any more): they are delivered on.
                now_ms = host.around.cluster_ms()
                for entry in left:
                    delivery.unsettle(entry.dot, now_ms)
                    delivery.nack(entry.dot, None, 0, now_ms)  # its lease was over
                break
            if not noted:
                noted = await host.keep_note(key, note)
            elif (status := await self._store_letters(target, left)) in _STORED:
                host.metrics.dead_lettered += len(left)
                host.owner.remove([entry.dot for entry in left], key)
                host.after()
                return
            await asyncio.sleep(retry_s)
            retry_s = next_pause_s(retry_s, status)
        if not host.ended:
            host.owner.keep_note(0, key, b"")
            host.after()

    async def _store_letters(self, target: str, entries: Sequence[Entry]) -> int:
        """The status; 0: they cannot be read here just now."""
        host = self._host
        bodies = await host.reader.bodies(entries)
        if bodies is None:
            return 0
        letters = []
        for entry, body in zip(entries, bodies, strict=True):
            source_id = message_id(host.partition, entry.dot)
            origin = Origin(
                source_id, entry.queue, "max_deliveries", entry.seen, entry.priority, entry.group
            )
            past = _json.encode(origin)[1:-1]
            letters.append(
                NewMessage(
                    body, entry.headers, dedupe_id=f"dead/{source_id}", origin=past, moved=True
                )
            )
        answer = await host.around.ask(Produce(target, tuple(letters), batch=True))
        if answer.status not in _STORED:
            log.warning("%d dead letters not stored at %s yet: %d", len(letters), target,
                        answer.status)  # fmt: skip
        return answer.status

    # ── and back ────────────────────────────────────────────────────────────────────────────────

    async def redrive(self, op: Redrive) -> Answer:
        """Send dead letters back; answered when all are, or after a moment with `redriving`: it
        goes on, also under the next owner."""
        host = self._host
        if op.queue in self.redriving:
            return refusal(409, "A redrive is under way", queue=op.queue)
        self.redriving.add(op.queue)
        task = Redriving(op.source, host.owner.last_dot, op.most)
        noted = await host.keep_note(REDRIVE_NOTE + op.queue, _msgpack.encode(task))
        if not noted:
            self.redriving.discard(op.queue)
            return refusal(503, "No quorum", 1, definite=False)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        progress = _Progress()
        host.around.spawn(self._redrive(op.queue, task, progress, done))
        await asyncio.wait({done}, timeout=_ANSWER_WITHIN_S)
        word = "redriven" if done.done() and not host.ended else "redriving"
        left = host.owner.delivery.length(op.queue)
        body = {
            "status": word, "queue": op.queue, "messages": progress.moved, "remaining": left
        }  # fmt: skip
        return Answer(200, _json.encode(body))

    def resume(self, notes: Mapping[str, bytes]) -> None:
        """What the last owner had noted and not finished."""
        owner = self._host.owner
        for key, value in notes.items():
            try:
                if key.startswith(BURY_NOTE) and value:
                    owner.exhaust(_burying.decode(value).letters)
                elif key.startswith(REDRIVE_NOTE) and value:
                    queue = key.removeprefix(REDRIVE_NOTE)
                    task = _redriving.decode(value)
                    self.redriving.add(queue)
                    self._host.around.spawn(self._redrive(queue, task, _Progress(), None))
            except msgspec.MsgspecError as e:
                log.error("partition %d: unreadable %s: %s", self._host.partition, key, e)

    async def _redrive(
        self,
        queue: str,
        task: Redriving,
        progress: _Progress,
        done: asyncio.Future[None] | None,
    ) -> None:
        host = self._host
        skipped: set[int] = set()
        while not host.ended and (task.most is None or progress.moved < task.most):
            moved = await self._next_letters(queue, task, progress, skipped)
            if moved is None:
                break
            if moved:
                progress.pause_s = _RETRY_S[0]
                continue
            await asyncio.sleep(progress.pause_s)
            progress.pause_s = next_pause_s(progress.pause_s, progress.refused)
        if not host.ended:
            await host.keep_note(REDRIVE_NOTE + queue, b"")
            self.redriving.discard(queue)
        if done is not None and not done.done():
            done.set_result(None)

    async def _next_letters(
        self, queue: str, task: Redriving, progress: _Progress, skipped: set[int]
    ) -> bool | None:
        """Send some back. False: not now. None: there are no more."""
        host = self._host
        delivery = host.owner.delivery
        most = _AT_ONCE if task.most is None else min(_AT_ONCE, task.most - progress.moved)
        found = delivery.browse(queue, len(skipped) + most)
        fresh = [e for e in found if e.dot not in skipped and e.dot <= task.upto]
        skipped.update(e.dot for e in found if e.dot > task.upto)
        batch = _together(fresh, queue)
        if not batch or len(skipped) > _SKIPPED_MOST:
            return None
        bodies = await host.reader.bodies(batch)
        if bodies is None:
            return False
        by_source: dict[str, list[tuple[Entry, NewMessage]]] = {}
        for entry, body in zip(batch, bodies, strict=True):
            origin = _origin(entry)
            if origin is None or task.source not in (None, origin.source):
                skipped.add(entry.dot)
                continue
            message = NewMessage(
                body,
                entry.headers,
                priority=origin.priority,
                dedupe_id=f"redrive/{message_id(host.partition, entry.dot)}",
                group_id=origin.group_id,
                moved=True,
            )
            by_source.setdefault(origin.source, []).append((entry, message))
        # One source that takes nothing now does not keep the others waiting.
        stored = [
            await self._send_back(its, letters, progress) for its, letters in by_source.items()
        ]
        return any(stored) or not stored

    async def _send_back(
        self, source: str, letters: Sequence[tuple[Entry, NewMessage]], progress: _Progress
    ) -> bool:
        host = self._host
        delivery = host.owner.delivery
        # A consumer may have taken one since it was looked at: it keeps it. What is under way is
        # not delivered meanwhile.
        taken = [
            (entry, message)
            for entry, message in letters
            if entry.state is State.READY and delivery.settle(entry.dot, None) is Verdict.DONE
        ]
        if not taken:
            return True
        stored = False
        try:
            messages = tuple(message for _, message in taken)
            answer = await host.around.ask(Produce(source, messages, batch=True))
            stored = answer.status in _STORED
            progress.refused = 0 if stored else answer.status
        finally:
            if not host.ended:
                if stored:
                    host.owner.remove([entry.dot for entry, _ in taken])
                    progress.moved += len(taken)
                else:
                    for entry, _ in taken:
                        delivery.unsettle(entry.dot, host.around.cluster_ms())
                host.after()
        return stored


class _Progress:
    """How many letters a redrive has sent back."""

    def __init__(self) -> None:
        self.moved = 0
        self.refused = 0
        """The status of what was refused last."""
        self.pause_s = _RETRY_S[0]


def next_pause_s(pause_s: float, status: int) -> float:
    """Of a move that was refused with that status, after that pause."""
    return _RETRY_S[0] if status == 503 else min(pause_s * 2, _RETRY_S[1])


def _together(entries: Iterable[Entry], queue: str) -> list[Entry]:
    """The first ones, if they are of that queue, as many as make a batch of bearable size."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        size += entry.body_bytes
        if batch and (len(batch) >= _AT_ONCE or size > _BYTES_AT_ONCE or entry.queue != queue):
            break
        batch.append(entry)
    return batch


def _origin(entry: Entry) -> Origin | None:
    """A dead letter's past; None for a message that was put here by somebody else."""
    if entry.origin is None:
        return None
    try:
        return _origins.decode(b"{" + entry.origin + b"}")
    except msgspec.MsgspecError:
        return None
