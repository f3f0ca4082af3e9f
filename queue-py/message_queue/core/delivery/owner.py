"""A partition at its owner: turns operations into records to store, and stored records into
answers.

```
operation ──▶ produce/settle/…  ──▶ drafts ──gather──▶ (the replication proposes and stores) ─┐
                    │                                                                         │
                    └─▶ an Answer at once                   answers ◀── committed(upto) ◀─────┘
```

Pure. Whoever asks gives a `token`; the answer comes back at once or later in `finished`. An answer
of None means: not the owner any more, nothing was done, ask elsewhere. Lives for one epoch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from message_queue.core.delivery import settling, stored
from message_queue.core.delivery.answers import created, returned
from message_queue.core.delivery.backlog import Purged, Shelf, ShelfPart
from message_queue.core.delivery.dedupe import DedupeWindow, Mark
from message_queue.core.delivery.intake import Metas, count_new, take_in
from message_queue.core.delivery.leases import decode_leases, encode_leases
from message_queue.core.delivery.lots import Grant
from message_queue.core.delivery.model import (
    Ended,
    Entry,
    Settings,
    parse_receipt,
)
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.pending import (
    Configuring,
    Pending,
    Settling,
    Storing,
    joined,
    singly,
    unpacked,
)
from message_queue.core.delivery.stored import DedupeMark, MessageMeta
from message_queue.core.ids import message_id, pack_dot
from message_queue.core.operations import (
    Answer,
    Configure,
    Extend,
    Nack,
    Produce,
    Settle,
    SettleRuns,
    refusal,
    unknown_outcome,
)
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.drafts import AckDraft, Draft, SetDraft

SETTINGS_KEY = "queue/"
NOTE_KEY = "note/"
MARK_BYTES = 500
"""About what an id in the dedupe window takes in memory (measured)."""
_json = msgspec.json.Encoder()
_settings_decoder = msgspec.json.Decoder(Settings)
Finished = tuple[int, Answer | None]


class PartitionOwner:
    """`covers(dot)`: whether the replication's context covers it (then it was issued). `shelf`:
    what the disk knows of messages that are not in memory; None: all of them are."""

    def __init__(
        self,
        partition: int,
        epoch: int,
        covers: Callable[[int], bool],
        shelf: Shelf | None = None,
    ) -> None:
        self.partition = partition
        self.epoch = epoch
        self.delivery = PartitionDelivery(epoch, shelf)
        self.keep_bodies = True
        """Whether what is stored now keeps its body in memory; else it is on disk only."""
        self.finished: list[Finished] = []
        self.grants: list[Grant] = []
        self.dead_letters: list[Entry] = []
        """Exhausted messages: to be stored at their dead letter queue, then `remove`d."""
        self._covers = covers
        self._metas = Metas()
        self._drafts: list[Draft] = []
        self._gathered: list[Pending] = []
        self._pending: deque[Pending] = deque()
        """Proposed, in the order of `last`."""
        self.window = DedupeWindow()
        """Ids that were used, by messages that are stored or about to be."""
        self._storing: Counter[str] = Counter()
        """Messages gathered or pending, by queue (for `max_length`)."""
        self.gathered_bytes = 0
        """Bodies that wait to be proposed."""
        self.storing_bytes = 0
        """Bodies gathered or pending; the node's backpressure."""
        self._assigned = 0
        self._upto = 0
        self._leases_sent = 0

    # ── takeover ────────────────────────────────────────────────────────────────────────────────

    def restore(
        self,
        held: Iterable[tuple[int, bytes, int]],
        settings: Mapping[str, bytes],
        leases: bytes,
        now_ms: int,
    ) -> list[str]:
        """Rebuild from what is stored: (dot, meta, body_bytes) in the order of dots, settings by
        key, and the last owner's leases. Returns what could not be read, as sentences."""
        unreadable = self.restore_settings(settings, now_ms)
        unreadable += self.restore_messages(held, now_ms)
        self.restore_leases(leases, now_ms)
        return unreadable

    def restore_settings(self, settings: Mapping[str, bytes], now_ms: int) -> list[str]:
        """First: what the queues are like."""
        unreadable: list[str] = []
        for key, value in settings.items():
            name = key.removeprefix(SETTINGS_KEY)
            if name == key:
                continue
            try:
                self.delivery.configure(name, _settings_decoder.decode(value), now_ms)
            except msgspec.MsgspecError as e:
                unreadable.append(f"settings of {name}: {e}")
        return unreadable

    def restore_messages(self, held: Iterable[tuple[int, bytes, int]], now_ms: int) -> list[str]:
        """Then: what they hold. May be called for one part after the other."""
        unreadable: list[str] = []
        for dot, raw, body_bytes in held:
            try:
                meta = stored.decode(raw)
            except msgspec.MsgspecError as e:
                unreadable.append(f"message {message_id(self.partition, dot)}: {e}")
                continue
            match meta:
                case MessageMeta():
                    entry = stored.entry_of(dot, meta, None, body_bytes)
                    self.delivery.put(entry, now_ms)
                case DedupeMark(queue, dedupe_id, back, until_ms, moved):
                    self.window.add((queue, dedupe_id, moved), Mark(dot - back, dot, until_ms))
        return unreadable

    def restore_part(self, part: ShelfPart, now_ms: int) -> list[str]:
        """`restore_messages` for messages that the shelf knows: those that merely wait are not
        even looked at one by one."""
        for queue, priority, bits, body_bytes in part.plain:
            self.delivery.shelve(queue, part.base, bits, priority, body_bytes)
        return self.restore_messages(part.others, now_ms)

    def restore_leases(self, leases: bytes, now_ms: int) -> None:
        """Last: who was given what."""
        self.window.sort()
        for lease in decode_leases(leases):
            self.delivery.restore_lease(lease, now_ms)
        self._events(now_ms)

    # ── operations ──────────────────────────────────────────────────────────────────────────────

    def produce(self, token: int, op: Produce, now_ms: int, wall_ms: int) -> Answer | None:
        """Store messages. An answer at once only when they are refused."""
        queue = op.queue
        limit = self.delivery.settings(queue).max_length
        if limit is not None:
            held = self.delivery.length(queue) + self._storing[queue]
            new = len(op.messages)
            if held + new > limit:
                # What repeats an earlier produce takes no room: it is there already.
                new = count_new(op, self.window, now_ms)
            if new and held + new > limit:
                return refusal(429, "Queue is full", 1, queue=queue, max_length=limit)
        intake = take_in(op, self.window, self._metas, now_ms, wall_ms)
        self._drafts += intake.drafts
        self._storing[queue] += intake.messages
        body_bytes = sum(new.body_bytes for new in intake.new)
        self.gathered_bytes += body_bytes
        self.storing_bytes += body_bytes
        self._gathered.append(
            Storing(
                token=token,
                drafts=len(intake.drafts),
                seqs=intake.messages + len(intake.marks),
                queue=queue,
                batch=op.batch,
                pieces=intake.pieces,
                new=intake.new,
                messages=intake.messages,
                marks=intake.marks,
            )
        )
        return None

    def settle(self, token: int, op: Settle | SettleRuns) -> Answer | None:
        """Acknowledge. The answer's body is a `Results`, or a `SettledRuns`."""
        if isinstance(op, Settle):
            answer, ending = settling.settle(self.delivery, op, self._covers)
        else:
            answer, ending = settling.settle_runs(self.delivery, op, self._covers)
        if not ending:
            return answer
        self._end(token, ending, answer)
        return None

    def nack(self, op: Nack, now_ms: int) -> Answer:
        """Give back."""
        receipt = parse_receipt(op.receipt) if op.receipt is not None else None
        if op.unseen and receipt is not None:
            verdict = self.delivery.release(op.dot, receipt, now_ms)
        else:
            verdict = self.delivery.nack(op.dot, receipt, op.delay_ms, now_ms)
        self._events(now_ms)
        return returned(self.partition, op.dot, verdict, "returned")

    def extend(self, op: Extend, now_ms: int) -> Answer:
        """Lengthen a lease."""
        receipt = parse_receipt(op.receipt) if op.receipt is not None else None
        verdict = self.delivery.extend(op.dot, receipt, op.visibility_ms, now_ms)
        self._events(now_ms)
        return returned(self.partition, op.dot, verdict, "extended")

    def configure(self, token: int, op: Configure) -> Answer | None:
        """Change settings: those named in `changes`, the others stay."""
        before = self.delivery.settings(op.queue)
        changes = msgspec.json.decode(op.changes, type=dict[str, object])
        try:
            after = msgspec.convert({**msgspec.structs.asdict(before), **changes}, Settings)
        except msgspec.ValidationError as e:
            return refusal(400, "Invalid field", detail=str(e))
        self._drafts.append(SetDraft(SETTINGS_KEY + op.queue, _json.encode(after)))
        self._gathered.append(Configuring(token, 1, 1, queue=op.queue, settings=after))
        return None

    def purge(self, token: int, queue: str, delete: bool) -> Answer | None:
        """End every message of a queue and clear its dedupe window; `delete`: its settings too."""
        dots, waiting = self.delivery.purge(queue)
        purged = len(dots) + (waiting.messages if waiting is not None else 0)
        # A message that is on its way to the disks stays, and so does its mark.
        dots += self.window.purge(queue, pack_dot(self.epoch, self._upto))
        word = "deleted" if delete else "purged"
        answer = Answer(200, _json.encode({"status": word, "queue": queue, "messages": purged}))
        if not delete:
            if not dots and waiting is None:
                return answer
            self._end(token, singly(dots), answer, waiting)
            return None
        self._end(0, singly(dots), None, waiting)
        self._drafts.append(SetDraft(SETTINGS_KEY + queue, b""))
        self._gathered.append(Configuring(token, 1, 1, queue=queue, answer=answer))
        return None

    def remove(self, dots: Sequence[int], note: str | None = None) -> None:
        """End messages that are already SETTLING (they are stored at their target), and with them
        the note about their move."""
        self._end(0, singly(dots), None)
        if note is not None:
            self.keep_note(0, note, b"")

    def keep_note(self, token: int, key: str, value: bytes) -> None:
        """Remember something about the partition for the next owner; empty: forget it."""
        self._drafts.append(SetDraft(key, value))
        self._gathered.append(Settling(token, 1, 1, answer=Answer(200)))

    def exhaust(self, letters: Iterable[tuple[int, int]]) -> None:
        """At takeover: the last owner was about to move these (dot, attempts) to their dead letter
        queue. They come out of `dead_letters`."""
        for dot, attempts in letters:
            self.delivery.exhaust(dot, attempts)

    @property
    def assigned(self) -> int:
        """The last seq that a batch was given."""
        return self._assigned

    @property
    def last_dot(self) -> int:
        """No message that is stored here has a higher dot."""
        return pack_dot(self.epoch, self._assigned)

    def tick(self, now_ms: int) -> None:
        """Let time end what it ends."""
        self.delivery.tick(now_ms)
        self._events(now_ms)
        closed = [dot for dot in self.window.expire(now_ms) if dot]
        if closed:
            self._end(0, singly(closed), None)

    def due(self, now_ms: int) -> bool:
        """Whether `tick` has something to do. O(1)."""
        next_ms = self.next_due_ms()
        return next_ms is not None and next_ms <= now_ms

    def next_due_ms(self) -> int | None:
        """When `tick` next has something to do (or a little earlier); None: never. O(1)."""
        moments = (self.delivery.next_due_ms(), self.window.next_ms())
        return min((ms for ms in moments if ms is not None), default=None)

    @property
    def memory_bytes(self) -> int:
        """About what messages in play, and ids in the dedupe window, take in memory. O(1)."""
        return self.delivery.memory_bytes + MARK_BYTES * len(self.window)

    @property
    def timed(self) -> bool:
        """Whether anything waits for a moment. O(1)."""
        return self.delivery.next_due_ms() is not None or len(self.window) > 0

    def collect(self, now_ms: int) -> None:
        """Take over what the delivery machine decided; call after using `delivery` directly."""
        self._events(now_ms)

    def postpone(self, by_ms: int) -> None:
        """Cluster time jumped ahead by so much: leases end as much later."""
        self.delivery.postpone(by_ms)

    def leases(self) -> bytes | None:
        """The leases as a successor should know them; None if nothing changed since last asked."""
        if self.delivery.deliveries_changed == self._leases_sent:
            return None
        self._leases_sent = self.delivery.deliveries_changed
        return encode_leases(self.delivery.delivered.values(), self.delivery.lots)

    # ── storing ─────────────────────────────────────────────────────────────────────────────────

    def gather(self, max_bytes: int) -> tuple[tuple[Draft, ...], list[Pending]]:
        """What waits to be proposed, as one batch: all of it, or about as much as fits into
        `max_bytes` (at least one operation)."""
        drafts, gathered = self._drafts, self._gathered
        if self.gathered_bytes <= max_bytes:
            self._drafts, self._gathered, self.gathered_bytes = [], [], 0
            return tuple(drafts), gathered
        size = at = count = 0
        for pending in gathered:
            its = sum(new.body_bytes for new in pending.new) if isinstance(pending, Storing) else 0
            if count and size + its > max_bytes:
                break
            size += its
            at += pending.drafts
            count += 1
        self._drafts, self._gathered = drafts[at:], gathered[count:]
        self.gathered_bytes -= size
        return tuple(drafts[:at]), gathered[:count]

    @property
    def in_flight(self) -> int:
        """Operations proposed and not yet stored on a majority."""
        return len(self._pending)

    @property
    def gathered(self) -> int:
        """Operations that wait to be proposed."""
        return len(self._gathered)

    @property
    def has_gathered(self) -> bool:
        """Whether `gather` would give anything."""
        return bool(self._gathered)

    def proposed(self, gathered: list[Pending], first: int, now_ms: int) -> None:
        """The batch got the seqs from `first` on (0: it had no drafts)."""
        at = first or self._assigned + 1
        for pending in gathered:
            if isinstance(pending, Storing):
                pending.first = at
                for offset, message, mark in pending.marks:
                    mark.mark_dot = pack_dot(self.epoch, at + offset)
                    mark.message_dot = pack_dot(self.epoch, at + message)
            at += pending.seqs
            pending.last = at - 1
            self._pending.append(pending)
        self._assigned = at - 1
        self.committed(self._upto, now_ms)

    def refused(self, gathered: list[Pending], now_ms: int) -> None:
        """Not proposed: this node is not the owner. Everyone may ask elsewhere."""
        for pending in gathered:
            self._undo(pending, now_ms)
            self._finish(pending.token, None)

    def committed(self, upto: int, now_ms: int) -> None:
        """Records up to this seq are stored on a majority."""
        self._upto = upto
        pending = self._pending
        while pending and pending[0].last <= upto:
            item = pending.popleft()
            match item:
                case Storing():
                    self._stored(item, now_ms)
                case Settling(spans=spans, answer=answer, purged=purged):
                    self.delivery.gone_all(spans, now_ms)
                    if purged is not None:
                        self.delivery.purged(purged)
                    if answer is not None:
                        self._finish(item.token, answer)
                case Configuring(queue=queue, settings=settings):
                    if settings is None:
                        self.delivery.forget_queue(queue, now_ms)
                        self._finish(item.token, item.answer)
                    else:
                        self.delivery.configure(queue, settings, now_ms)
                        body = _json.encode({"queue": queue, "settings": settings})
                        self._finish(item.token, Answer(200, body))
        self._events(now_ms)

    def lost(self, clean: bool) -> list[int]:
        """The ownership ended. Finishes everything; returns the tokens of those in long polls."""
        for pending in self._gathered:
            self._finish(pending.token, None)
        for pending in self._pending:
            answer = None if clean else unknown_outcome("Owner changed before the answer")
            self._finish(pending.token, answer)
        self._gathered.clear()
        self.gathered_bytes = 0
        self._pending.clear()
        return self.delivery.waiting()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _end(
        self,
        token: int,
        messages: list[tuple[int, int]],
        answer: Answer | None,
        purged: Purged | None = None,
    ) -> None:
        own = joined(messages)
        spans = unpacked(own)
        if purged is not None:
            ending = purged.all()
            ending.update(DotSet(spans))
            spans = ending.spans()
        self._drafts.append(AckDraft(spans))
        self._gathered.append(Settling(token, 1, 1, spans=own, answer=answer, purged=purged))

    def _stored(self, item: Storing, now_ms: int) -> None:
        self._storing[item.queue] -= item.messages
        if not self._storing[item.queue]:
            del self._storing[item.queue]
        first = pack_dot(self.epoch, item.first)
        for new in item.new:
            self.storing_bytes -= new.body_bytes
            self.delivery.put_run(
                first + new.offset, new.meta, new.bodies, self.keep_bodies, now_ms
            )
        if not item.token:
            return
        dots = [p.message_dot if isinstance(p, Mark) else first + p for p in item.pieces]
        self._finish(item.token, created(self.partition, item, dots))

    def _undo(self, pending: Pending, now_ms: int) -> None:
        match pending:
            case Storing(queue=queue, new=new, marks=marks):
                self._storing[queue] -= pending.messages
                self.storing_bytes -= sum(run.body_bytes for run in new)
                for _, _, mark in marks:
                    mark.until_ms = 0  # closed: the id is free again
            case Settling(spans=spans, purged=purged):
                self.delivery.unsettle_all(spans, now_ms)
                if purged is not None:
                    self.delivery.unpurge(purged, now_ms)
            case _:
                pass  # settings take effect at `committed` only

    def _finish(self, token: int, answer: Answer | None) -> None:
        if token:
            self.finished.append((token, answer))

    def _events(self, now_ms: int) -> None:
        grants, endings = self.delivery.drain()
        if grants:
            self.grants += grants
        if endings:
            expired = [e.entry.dot for e in endings if e.reason is Ended.EXPIRED]
            if expired:
                self._end(0, singly(expired), None)
            self.dead_letters += [e.entry for e in endings if e.reason is Ended.EXHAUSTED]
