"""One partition that this node owns: its `PartitionOwner` with clients, disk and clock."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, assert_never

import msgspec

from message_queue.api.rendering import message, messages
from message_queue.core.delivery.model import Entry, Receipt
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.ids import message_id, unpack_dot
from message_queue.core.messages import Spans
from message_queue.core.operations import (
    Answer,
    Configure,
    Consume,
    Extend,
    ListQueues,
    Nack,
    NewMessage,
    Operation,
    Peek,
    Produce,
    Purge,
    Redrive,
    Settle,
    Show,
    refusal,
    unknown_outcome,
)
from message_queue.metrics import Metrics
from message_queue.storage.log import Trouble
from message_queue.storage.store import Store

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 1.6
"""A stored answer takes milliseconds; later than this the quorum is gone."""
QUEUED_BYTES = 64 << 20
"""Bytes on their way to the disk, beyond which new messages are put off (429)."""
WAITERS = 10_000
"""Long polls of one partition at a time."""
_NOTHING = Answer(204)
_BURY_RETRY_S = (0.1, 5.0)
_json = msgspec.json.Encoder()


class Delivered:
    """An answer that leased messages; `undo` ends those leases as if nothing had been delivered."""

    __slots__ = ("_undo", "answer")

    def __init__(self, answer: Answer, undo: Callable[[], None] | None = None) -> None:
        self.answer = answer
        self._undo = undo

    @property
    def leased(self) -> bool:
        """Whether there is something to undo."""
        return self._undo is not None

    def undo(self) -> None:
        """The client never saw it."""
        if self._undo is not None:
            self._undo()
            self._undo = None


class Surroundings(Protocol):
    """What a host asks of the node."""

    def cluster_ms(self) -> int:
        """Cluster time."""

    def wall_ms(self) -> int:
        """The wall clock: for people only."""

    def may_serve(self, partition: int) -> bool:
        """This node holds the partition's lease."""

    def flush_soon(self, host: Host) -> None:
        """Propose what the host has gathered, when it is its turn."""

    def keep_bodies(self) -> bool:
        """Whether bodies may still be kept in memory."""

    def report_damage(self, partition: int, lost: Spans) -> None:
        """Stored records turned out unreadable."""

    def in_background(self, host: Host, entry: Entry) -> None:
        """Bury an exhausted message."""


class Host:
    """Lives as long as the ownership. Everything runs on the event loop."""

    def __init__(
        self, owner: PartitionOwner, store: Store, around: Surroundings, metrics: Metrics
    ) -> None:
        self.owner = owner
        self.partition = owner.partition
        self.flying = 0
        """Batches proposed and not yet committed."""
        self.flushing = False
        """Stands in the node's list of those who propose next."""
        self.ended = False
        self._store = store
        self._around = around
        self._metrics = metrics
        self._token = 0
        self._asked: dict[int, asyncio.Future[Answer | None]] = {}
        self._polls: dict[int, asyncio.Future[list[Entry] | None]] = {}
        self._due: deque[tuple[float, int]] = deque()
        """(loop time, token) of everything in `_asked`, in order: one time limit for all."""

    # ── operations ──────────────────────────────────────────────────────────────────────────────

    async def perform(self, op: Operation) -> Answer | None:
        """Do it. None: not the owner any more and nothing was done."""
        around, owner = self._around, self.owner
        match op:
            case Produce():
                refused = self._cannot_store()
                if refused is not None:
                    return refused
                token = self._next_token()
                answer = owner.produce(token, op, around.cluster_ms(), around.wall_ms())
                return await self._stored(token, answer)
            case Settle():
                token = self._next_token()
                return await self._stored(token, owner.settle(token, op))
            case Nack():
                return self._now(owner.nack(op, around.cluster_ms()))
            case Extend():
                return self._now(owner.extend(op, around.cluster_ms()))
            case Configure():
                token = self._next_token()
                return await self._stored(token, owner.configure(token, op))
            case Purge(queue, delete):
                token = self._next_token()
                return await self._stored(token, owner.purge(token, queue, delete))
            case Show(queue):
                return self._show(queue)
            case Peek(queue, most):
                return await self._peek(owner.delivery.browse(queue, most))
            case Consume():
                delivered = await self.consume(op)
                return delivered.answer if delivered is not None else None
            case Redrive() | ListQueues():
                return refusal(400, "Not an operation on one partition")
            case _:
                assert_never(op)

    async def consume(self, op: Consume) -> Delivered | None:
        """Lease and render. Cancelling leaves nothing leased. None: not the owner any more."""
        delivery = self.owner.delivery
        taken = delivery.take(op.queue, op.most, op.visibility_ms, self._around.cluster_ms())
        self.after()
        if not taken:
            if not op.wait_ms:
                return Delivered(_NOTHING)
            waited = await self._wait(op)
            if waited is None:
                return None
            taken = waited
        if not taken:
            return Delivered(_NOTHING)
        self._metrics.delivered += len(taken)
        self._metrics.redelivered += sum(entry.attempt > 1 for entry in taken)
        receipts = [(entry.dot, Receipt(entry.epoch, entry.attempt)) for entry in taken]
        try:
            bodies = await self._bodies(taken)
        except asyncio.CancelledError:
            self._release(receipts)
            raise
        if bodies is None:
            self._release(receipts)
            return Delivered(refusal(503, "Message unreadable here", 1, definite=True))
        rendered = [
            message(self.partition, entry, body, receipt=True)
            for entry, body in zip(taken, bodies, strict=True)
        ]
        body = messages(rendered) if op.batch else rendered[0]
        return Delivered(Answer(200, body), lambda: self._release(receipts))

    async def _wait(self, op: Consume) -> list[Entry] | None:
        """Stand in line: messages, [] when the time is over, None when the ownership ended."""
        if len(self._polls) >= WAITERS:
            return []
        token = self._next_token()
        polled: asyncio.Future[list[Entry] | None] = asyncio.get_running_loop().create_future()
        self._polls[token] = polled
        self.owner.delivery.wait(token, op.queue, op.most, op.visibility_ms)
        try:
            async with asyncio.timeout(op.wait_ms / 1000):
                return await asyncio.shield(polled)
        except TimeoutError:
            # A grant may have come in the very moment the time was over.
            return (polled.result() or []) if polled.done() else []
        except asyncio.CancelledError:
            if polled.done() and (granted := polled.result()):
                self._release([(e.dot, Receipt(e.epoch, e.attempt)) for e in granted])
            raise
        finally:
            self._polls.pop(token, None)
            self.owner.delivery.cancel(token)
            polled.cancel()

    def _release(self, receipts: Sequence[tuple[int, Receipt]]) -> None:
        now_ms = self._around.cluster_ms()
        for dot, receipt in receipts:
            self.owner.delivery.release(dot, receipt, now_ms)
        self.after()

    def _cannot_store(self) -> Answer | None:
        trouble = self._store.trouble
        if trouble is Trouble.FULL:
            return refusal(507, str(trouble.value), 5)
        if trouble is Trouble.FAILING:
            return refusal(503, str(trouble.value), 1, definite=True)
        if self._store.queued_bytes > QUEUED_BYTES:
            return refusal(429, "Node is busy storing", 1)
        return None

    def _next_token(self) -> int:
        self._token += 1
        return self._token

    def _now(self, answer: Answer) -> Answer:
        self.after()
        return answer

    async def _stored(self, token: int, answer: Answer | None) -> Answer | None:
        """The answer, once what it speaks of is stored on a majority."""
        if answer is not None:
            self.after()
            return answer
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[Answer | None] = loop.create_future()
        self._asked[token] = asked
        self._due.append((loop.time() + ANSWER_WITHIN_S, token))
        self._around.flush_soon(self)
        try:
            return await asked
        finally:
            self._asked.pop(token, None)

    # ── what the owner decided ──────────────────────────────────────────────────────────────────

    def after(self) -> None:
        """Pass on what the owner decided since the last call."""
        owner = self.owner
        owner.collect(self._around.cluster_ms())
        if owner.finished:
            finished, owner.finished = owner.finished, []
            for token, answer in finished:
                asked = self._asked.get(token)
                if asked is not None and not asked.done():
                    asked.set_result(answer)
        if owner.grants:
            grants, owner.grants = owner.grants, []
            for grant in grants:
                polled = self._polls.pop(grant.token, None)
                if polled is not None and not polled.done():
                    polled.set_result(grant.entries)
                else:
                    self._release([(e.dot, Receipt(e.epoch, e.attempt)) for e in grant.entries])
        if owner.dead_letters:
            exhausted, owner.dead_letters = owner.dead_letters, []
            for entry in exhausted:
                self._around.in_background(self, entry)
        if owner.has_gathered:
            self._around.flush_soon(self)

    def tick(self, loop_s: float) -> None:
        """Let time pass: leases, delays, lifetimes, and answers that are overdue."""
        while self._due and self._due[0][0] <= loop_s:
            _, token = self._due.popleft()
            asked = self._asked.get(token)
            if asked is not None and not asked.done():
                asked.set_result(unknown_outcome("No quorum"))
        now_ms = self._around.cluster_ms()
        # Without the lease another node may deliver already: time must not hand out anything.
        if self.owner.due(now_ms) and self._around.may_serve(self.partition):
            self.owner.tick(now_ms)
            self.after()

    def end(self, clean: bool) -> None:
        """The ownership ended."""
        self.ended = True
        self.owner.lost(clean)
        self.after()
        for polled in self._polls.values():
            if not polled.done():
                polled.set_result(None)

    # ── bodies ──────────────────────────────────────────────────────────────────────────────────

    async def _bodies(self, entries: Sequence[Entry]) -> list[bytes] | None:
        """The bodies, read back where they are only on disk. None: one is unreadable here."""
        absent = [unpack_dot(entry.dot) for entry in entries if entry.body is None]
        if not absent:
            return [entry.body for entry in entries if entry.body is not None]
        found, damaged = await self._store.read(self.partition, absent)
        if len(found) + len(damaged) < len(absent):
            # Committed by the others before this node's own disk had it.
            await self._store.flushed()
            found, damaged = await self._store.read(self.partition, absent)
        if damaged:
            self._around.report_damage(self.partition, tuple((e, s, s) for e, s in damaged))
        by_dot = {(epoch, seq): body for epoch, seq, _, body in found}
        bodies = []
        for entry in entries:
            body = entry.body if entry.body is not None else by_dot.get(unpack_dot(entry.dot))
            if body is None:
                return None
            bodies.append(body)
        return bodies

    # ── figures ─────────────────────────────────────────────────────────────────────────────────

    def _show(self, queue: str) -> Answer:
        if not self.owner.delivery.exists(queue):
            settings = self.owner.delivery.settings(queue)
            return refusal(404, "No such queue", queue=queue, settings=settings)
        return Answer(200, _json.encode(self.figures(queue)))

    def figures(self, queue: str) -> dict[str, object]:
        """A queue as `GET /queues` shows it."""
        counts = self.owner.delivery.counts(queue)
        now_ms = self._around.cluster_ms()
        age_ms = max(0, now_ms - counts.oldest_ms) if counts.oldest_ms is not None else None
        return {
            "queue": queue,
            "ready": counts.ready,
            "in_flight": counts.in_flight,
            "delayed": counts.delayed,
            "oldest_age_ms": age_ms,
            "bytes": counts.bytes,
            "waiting_consumers": counts.waiters,
            "partition": self.partition,
            "settings": self.owner.delivery.settings(queue),
        }

    async def _peek(self, entries: list[Entry]) -> Answer:
        bodies = await self._bodies(entries)
        if bodies is None:
            return refusal(503, "Message unreadable here", 1, definite=True)
        return Answer(
            200,
            messages(
                [
                    message(self.partition, entry, body, receipt=False)
                    for entry, body in zip(entries, bodies, strict=True)
                ]
            ),
        )

    # ── dead letters ────────────────────────────────────────────────────────────────────────────

    async def bury(self, entry: Entry, produce: Callable[[Operation], Awaitable[Answer]]) -> None:
        """Store an exhausted message at its dead letter queue, then end it here. Tried until done,
        or until the ownership ends; the dedupe id makes a repetition harmless."""
        retry_s = _BURY_RETRY_S[0]
        source = message_id(self.partition, entry.dot)
        origin = _json.encode(
            {"source_id": source, "source": entry.queue, "reason": "max_deliveries"}
        )[1:-1]
        while not self.ended:
            target = self.owner.delivery.settings(entry.queue).dead_letter
            bodies = await self._bodies([entry])
            if bodies is not None and target is not None:
                letter = NewMessage(
                    bodies[0], entry.headers, dedupe_id=f"dead/{source}", origin=origin
                )
                answer = await produce(Produce(target, (letter,)))
                if answer.status in (200, 201):
                    break
                log.warning("dead letter %s not stored yet: %s", source, answer.status)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _BURY_RETRY_S[1])
        if not self.ended:
            self._metrics.dead_lettered += 1
            self.owner.remove([entry.dot])
            self.after()
