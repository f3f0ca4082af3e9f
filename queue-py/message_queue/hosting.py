"""One partition that this node owns: its `PartitionOwner` with clients, disk and clock."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, assert_never

import msgspec

from message_queue.api.rendering import Slice, delivery_receipt, message, messages
from message_queue.core.delivery.intake import repeats
from message_queue.core.delivery.lots import Spanned, Taken, receipts_of
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.messages import Spans
from message_queue.core.operations import (
    MAX_ANSWER_BYTES,
    Answer,
    ChangeRing,
    Configure,
    Consume,
    Direct,
    Extend,
    ListQueues,
    Nack,
    Operation,
    Peek,
    Produce,
    Purge,
    Redrive,
    Settle,
    SettleRuns,
    Show,
    refusal,
    unknown_outcome,
)
from message_queue.dead_letters import Mover
from message_queue.gathering import Gathering
from message_queue.memory import MessageMemory
from message_queue.metrics import Metrics
from message_queue.reading import ReadAhead, Reader
from message_queue.storage.log import Trouble
from message_queue.storage.store import Store

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 1.6
"""A stored answer takes milliseconds; later than this the quorum is gone."""
QUEUED_BYTES = 64 << 20
"""Bytes on their way to the disks, beyond which new messages are put off (429)."""
WAITERS = 10_000
"""Long polls of one partition at a time."""
_NOTHING = Answer(204)
Done = Callable[[Answer | None], None]
"""Takes the answer; None: not the owner any more, nothing was done."""
_json = msgspec.json.Encoder()


def _resolve(answered: asyncio.Future[Answer | None], answer: Answer | None) -> None:
    if not answered.done():  # else its client hung up
        answered.set_result(answer)


def _time_is_over(polled: asyncio.Future[list[Taken] | None]) -> None:
    if not polled.done():
        polled.set_result([])


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

    memory: MessageMemory

    def cluster_ms(self) -> int:
        """Cluster time."""

    def wall_ms(self) -> int:
        """The wall clock: for people only."""

    def may_serve(self, partition: int) -> bool:
        """This node holds the partition's lease."""

    def flush_soon(self, host: Host) -> None:
        """Propose what the host has gathered, when it is its turn."""

    def time_matters(self, host: Host) -> None:
        """Call `host.tick` from now on, until it says that nothing waits."""

    def report_damage(self, partition: int, lost: Spans) -> None:
        """Stored records turned out unreadable."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background."""

    async def ask(self, operation: Operation) -> Answer:
        """Have the owner of another partition do something."""


class Host:
    """Lives as long as the ownership. Everything runs on the event loop."""

    def __init__(
        self, owner: PartitionOwner, store: Store, around: Surroundings, metrics: Metrics
    ) -> None:
        self.owner = owner
        self.partition = owner.partition
        self.batches: deque[int] = deque()
        """The last seq of each batch that is proposed and not yet committed."""
        self.flushing = False
        """Stands in the node's list of those who propose next."""
        self.gathering = Gathering()
        self.ended = False
        self.store = store
        self.around = around
        self.metrics = metrics
        self.mover = Mover(self)
        self.reader = Reader(owner, store, around.report_damage)
        self._ahead = ReadAhead(self.reader, around.memory, around.spawn)
        self._loop = asyncio.get_running_loop()
        self._token = 0
        self._asked: dict[int, tuple[Done, float]] = {}
        """Who waits for something to be stored, and since when (loop time), the oldest first."""
        self._polls: dict[int, asyncio.Future[list[Taken] | None]] = {}

    # ── operations ──────────────────────────────────────────────────────────────────────────────

    async def perform(self, op: Operation) -> Answer | None:
        """Do it. None: not the owner any more and nothing was done."""
        owner = self.owner
        match op:
            case Produce() | Settle() | SettleRuns() | Nack() | Extend() | Configure() | Purge():
                answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
                self.begin(op, partial(_resolve, answered))
                return await answered
            case Show(queue):
                return self._show(queue)
            case Peek(queue, most):
                return await self._peek(owner.delivery.browse(queue, most))
            case Consume():
                delivered = await self.consume(op)
                return delivered.answer if delivered is not None else None
            case Redrive():
                return await self.mover.redrive(op)
            case ListQueues():
                return Answer(200, _json.encode([self.figures(q) for q in self.names()]))
            case ChangeRing():
                return None  # no queue's owner decides that
            case _:
                assert_never(op)

    def begin(self, op: Direct | Configure | Purge, done: Done) -> None:
        """Do it and call `done` once, maybe at once: no task and no future for what is asked most.
        What is stored first is answered when it is, or after `ANSWER_WITHIN_S`."""
        around, owner = self.around, self.owner
        answer: Answer | None
        token = self._token = self._token + 1
        match op:
            case Produce():
                now_ms = around.cluster_ms()
                answer = self._cannot_store()
                if answer is None or repeats(op, owner.window, now_ms):
                    answer = owner.produce(token, op, now_ms, around.wall_ms())
            case Settle() | SettleRuns():
                answer = owner.settle(token, op)
            case Nack():
                answer = owner.nack(op, around.cluster_ms())
            case Extend():
                answer = owner.extend(op, around.cluster_ms())
            case Configure():
                answer = owner.configure(token, op)
            case Purge(queue, delete):
                answer = owner.purge(token, queue, delete)
            case _:
                assert_never(op)
        if answer is not None:
            self.after()
            done(answer)
            return
        self._wait_for(token, done)

    def _wait_for(self, token: int, done: Done) -> None:
        self._asked[token] = (done, self._loop.time())
        self.around.flush_soon(self)
        self.around.time_matters(self)

    async def keep_note(self, key: str, value: bytes) -> bool:
        """Store something for the next owner. False: perhaps not stored."""
        answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        token = self._next_token()
        self.owner.keep_note(token, key, value)
        self._wait_for(token, partial(_resolve, answered))
        answer = await answered
        return answer is not None and answer.status == 200

    async def consume(self, op: Consume) -> Delivered | None:
        """Lease and render. Cancelling leaves nothing leased. None: not the owner any more."""
        delivery = self.owner.delivery
        if op.most > 1 and not delivery.at_hand(op.queue):
            await self._ahead.wait(op.queue)
            if self.ended or not self.around.may_serve(self.partition):
                return None
        taken = delivery.take(op.queue, op.most, op.visibility_ms, self.around.cluster_ms())
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
        # As of now: should it go back later, another delivery may have come since.
        spans = receipts_of(taken)
        try:
            slices = await self.reader.slices(taken)
        except asyncio.CancelledError:
            self._release(spans)
            raise
        if slices is None:
            self._release(spans)
            return Delivered(refusal(503, "Message unreadable here", 1, definite=True))
        return self._delivered(op, taken, spans, slices)

    def consume_now(self, op: Consume) -> Delivered | None:
        """What can be leased without waiting for anything; None: nothing was done. Not tried while
        bodies come from disk: there it would be in vain."""
        if not (self.reader.at_hand and self.owner.delivery.at_hand(op.queue)):
            return None
        taken = self.owner.delivery.take(
            op.queue, op.most, op.visibility_ms, self.around.cluster_ms()
        )
        if not taken:
            self.after()
            return None
        spans = receipts_of(taken)
        slices = self.reader.slices_now(taken)
        if slices is None:
            self._release(spans)
            return None
        self.after()
        return self._delivered(op, taken, spans, slices)

    def _delivered(
        self, op: Consume, taken: list[Taken], spans: Spanned, slices: list[Slice]
    ) -> Delivered:
        count, receipt = 1, ""
        first = taken[0]
        if op.batch:
            count = sum([last - first + 1 for first, last, _ in spans])
            body = messages(self.partition, slices, receipt=True)
            receipt = delivery_receipt(self.partition, slices)
        elif isinstance(first, Entry):
            body = message(self.partition, first, slices[0].bodies[0], receipt=True)
        else:
            raise AssertionError("one message, and a lot of them")
        self.metrics.delivered += count
        again = [last - first + 1 for first, last, name in spans if name.attempt > 1]
        self.metrics.redelivered += sum(again)
        if count > 1:
            self._ahead.soon(op.queue)
        answer = Answer(200, body, messages=count, receipt=receipt)
        return Delivered(answer, lambda: self._release(spans))

    async def _wait(self, op: Consume) -> list[Taken] | None:
        """Stand in line: messages, [] when the time is over, None when the ownership ended."""
        if len(self._polls) >= WAITERS:
            return []
        token = self._next_token()
        polled: asyncio.Future[list[Taken] | None] = self._loop.create_future()
        self._polls[token] = polled
        self.owner.delivery.wait(token, op.queue, op.most, op.visibility_ms)
        timer = self._loop.call_later(op.wait_ms / 1000, _time_is_over, polled)
        try:
            return await polled
        except asyncio.CancelledError:
            # A grant may have come in the very moment in which the client went away.
            if not polled.cancelled() and (granted := polled.result()):
                self._release(receipts_of(granted))
            raise
        finally:
            timer.cancel()
            self._polls.pop(token, None)
            self.owner.delivery.cancel(token)

    def _release(self, spans: Spanned) -> None:
        """What this owner leased reached nobody."""
        self.owner.delivery.release_all(spans, self.around.cluster_ms())
        self.after()

    def _cannot_store(self) -> Answer | None:
        trouble = self.store.trouble
        if trouble is Trouble.FULL:
            return refusal(507, str(trouble.value), 5)
        if trouble is Trouble.FAILING:
            return refusal(503, str(trouble.value), 1, definite=True)
        if self.around.memory.full:
            return refusal(429, "Node's memory is full of messages", 5)
        if self.store.queued_bytes + self.owner.storing_bytes > QUEUED_BYTES:
            return refusal(429, "Node is busy storing", 1)
        return None

    def _next_token(self) -> int:
        self._token += 1
        return self._token

    # ── what the owner decided ──────────────────────────────────────────────────────────────────

    def after(self) -> None:
        """Pass on what the owner decided since the last call."""
        owner = self.owner
        owner.collect(self.around.cluster_ms())
        if owner.finished:
            finished, owner.finished = owner.finished, []
            now_s = self._loop.time()
            observe = self.metrics.stored_ms.observe
            for token, answer in finished:
                asked = self._asked.pop(token, None)
                if asked is not None:
                    done, began_s = asked
                    observe((now_s - began_s) * 1000)
                    if answer is not None and answer.status == 201:
                        self.metrics.produced += answer.messages
                    done(answer)
        if owner.grants:
            grants, owner.grants = owner.grants, []
            # A commit may come in late (this process was stopped): without the lease a successor
            # may have delivered the message, and its consumer acked it, in the meantime.
            serving = self.around.may_serve(self.partition)
            for grant in grants:
                polled = self._polls.pop(grant.token, None)
                if polled is not None and not polled.done() and serving:
                    polled.set_result(grant.entries)
                else:
                    if polled is not None and not polled.done():
                        polled.set_result(None)
                    self._release(receipts_of(grant.entries))
        if owner.dead_letters:
            exhausted, owner.dead_letters = owner.dead_letters, []
            self.mover.bury(exhausted)
        if owner.has_gathered:
            self.around.flush_soon(self)
        if owner.timed:
            self.around.time_matters(self)

    def committed(self, upto: int, now_ms: int) -> None:
        """Records up to this seq are stored on a majority: answer, and deliver if that is ours."""
        owner = self.owner
        owner.keep_bodies = self.around.memory.keep_bodies
        if not self.around.may_serve(self.partition):
            # Stored, but handed over meanwhile (or about to be): the successor delivers it.
            owner.delivery.paused = True
            self.around.time_matters(self)
        while self.batches and self.batches[0] <= upto:
            self.batches.popleft()
        owner.committed(upto, now_ms)
        self.after()

    def tick(self, loop_s: float, now_ms: int) -> float | None:
        """Let time pass: leases, delays, lifetimes, and answers that are overdue. In how many
        seconds something is due again; None when nothing waits for a moment."""
        while (overdue := self._overdue(loop_s)) is not None:
            self.metrics.stored_ms.observe(ANSWER_WITHIN_S * 1000)
            overdue(unknown_outcome("No quorum"))
        delivery = self.owner.delivery
        # Without the lease another node may deliver already: time must not hand out anything.
        if (delivery.paused or self.owner.due(now_ms)) and self.around.may_serve(self.partition):
            if delivery.paused:
                delivery.resume(now_ms)
            self.owner.tick(now_ms)
            self.after()
        if delivery.paused:
            return 0.0
        next_ms = self.owner.next_due_ms()
        own_s = (next_ms - now_ms) / 1000 if next_ms is not None else None
        if not self._asked:
            return own_s
        answer_s = next(iter(self._asked.values()))[1] + ANSWER_WITHIN_S - loop_s
        return answer_s if own_s is None else min(answer_s, own_s)

    def _overdue(self, loop_s: float) -> Done | None:
        for token, (done, began_s) in self._asked.items():
            if began_s + ANSWER_WITHIN_S > loop_s:
                return None
            del self._asked[token]
            return done
        return None

    def end(self, clean: bool) -> None:
        """The ownership ended."""
        self.ended = True
        self.owner.lost(clean)
        self.after()
        for polled in self._polls.values():
            if not polled.done():
                polled.set_result(None)

    # ── figures ─────────────────────────────────────────────────────────────────────────────────

    def _show(self, queue: str) -> Answer:
        if not self.owner.delivery.exists(queue):
            settings = self.owner.delivery.settings(queue)
            return refusal(404, "No such queue", queue=queue, settings=settings)
        return Answer(200, _json.encode(self.figures(queue)))

    def names(self) -> list[str]:
        """The queues that are known here."""
        return self.owner.delivery.queue_names()

    def figures(self, queue: str) -> dict[str, object]:
        """A queue as `GET /queues` shows it."""
        counts = self.owner.delivery.counts(queue)
        now_ms = self.around.cluster_ms()
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
        size = 0
        for at, entry in enumerate(entries):
            size += entry.body_bytes
            if at and size > MAX_ANSWER_BYTES:
                entries = entries[:at]
                break
        slices = await self.reader.slices(entries)
        if slices is None:
            return refusal(503, "Message unreadable here", 1, definite=True)
        return Answer(200, messages(self.partition, slices, receipt=False))
