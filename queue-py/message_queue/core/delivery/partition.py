"""Delivery of one partition's messages by its owner.

Pure: the caller passes `now_ms` (cluster time), and reads what was decided from the return value
and from `drain`. The machine lives exactly as long as one ownership (epoch) of the partition: the
messages are rebuilt from the stored records at each takeover, leases and attempts that were
passed on with `restore_lease`.

Nothing here is durable by itself. `put` is called when a message is stored on a majority; an end
(ack, expiry, purge) first moves it to SETTLING, the caller makes that durable, then calls `gone`
(or `unsettle` if it was refused). So a message whose ack is in doubt is never handed out
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from message_queue.core.delivery.backlog import Purged
from message_queue.core.delivery.leases import Lease, postpone
from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.lots import Taken
from message_queue.core.delivery.model import (
    MAX_LEASE_MS,
    Ended,
    Entry,
    Receipt,
    Settings,
    Verdict,
    default_settings,
    parse_receipt,
)
from message_queue.core.delivery.queues import (
    MAX_IDLE_QUEUES,
    Group,
    Queue,
)
from message_queue.core.delivery.stored import MessageMeta, entry_of, waits_for_nothing
from message_queue.core.delivery.turns import Turns
from message_queue.core.ids import unpack_dot

Settled = tuple[int, int, Verdict]
"""(first, last, what became of them)"""


class PartitionDelivery(Turns):
    """The queues of one partition, at its owner, in one epoch. No operation costs more than
    O(log n) amortised, except `browse`, `configure` with a retention, and `purge` (O(messages in
    play)).

    A message is either *in play*, with an `Entry`, or waits in its queue's backlog."""

    # ── what is stored ──────────────────────────────────────────────────────────────────────────

    def put(self, entry: Entry, now_ms: int) -> None:
        """A message became durable (or was found at takeover: then in the order of dots)."""
        queue = self._queue(entry.queue)
        if entry.dot in self.entries or queue.backlog.has(entry.dot, entry.priority):
            return
        self.entries[entry.dot] = entry
        queue.used = True
        queue.bytes += entry.body_bytes
        if entry.body is not None:
            self.resident_bytes += entry.body_bytes
        queue.arrivals.append(entry)
        expires_ms = queue.expires_ms(entry)
        if expires_ms:
            self._timers.add(expires_ms, entry.dot)
        if entry.group is not None:
            group = queue.groups.get(entry.group)
            if group is None:
                group = queue.groups[entry.group] = Group()
            if group.head is not None:
                group.behind.append(entry)
                entry.state = State.BEHIND
                queue.counts[State.BEHIND] += 1
                return
            group.head = entry
        entry.state = self._state_on_arrival(entry, now_ms)
        queue.counts[entry.state] += 1
        if entry.state is State.READY:
            queue.line.push(entry)
            if queue.waiters:
                self._serve(queue, now_ms)

    def put_run(
        self, first: int, meta: MessageMeta, bodies: Sequence[bytes], keep: bool, now_ms: int
    ) -> None:
        """Messages with consecutive dots and one meta became durable; `keep`: there is room for
        their bodies in memory. Costs little more than one, if they are plain."""
        if waits_for_nothing(meta):
            queue = self._queue(meta.queue)
            if self._wait(queue, first, meta, bodies, keep):
                if queue.waiters:
                    self._serve(queue, now_ms)
                return
        for dot, body in enumerate(bodies, first):
            self.put(entry_of(dot, meta, body if keep else None, len(body)), now_ms)

    def gone_all(self, spans: Iterable[tuple[int, int]], now_ms: int) -> None:
        """`gone` for many: (first, last) of what follows each other."""
        entries, delivered = self.entries, self.delivered
        touched: dict[str, Queue] = {}
        for dot in self._gone_lots(spans, touched):
            entry = entries.get(dot)
            if entry is None:
                continue
            if entry.state is not State.SETTLING or entry.group is not None:
                self.gone(dot, now_ms)
                continue
            del entries[dot]
            queue = touched.get(entry.queue)
            if queue is None:
                queue = touched[entry.queue] = self._queues[entry.queue]
            queue.counts[State.SETTLING] -= 1
            queue.bytes -= entry.body_bytes
            if delivered.pop(dot, None) is not None:
                self.deliveries_changed += 1
            if entry.body is not None:
                self.resident_bytes -= entry.body_bytes
                entry.body = None
            entry.state = State.GONE
        for queue in touched.values():
            self._tidy(queue)

    def gone(self, dot: int, now_ms: int) -> Entry | None:
        """A message's end is durable: forget it. Returns what it was, None if nothing was held."""
        lot = self.lots.holding(dot)
        if lot is not None:
            self._apart(self._cut(lot, dot, dot))
        entry = self.entries.pop(dot, None)
        if entry is None:
            return None
        queue = self._queues[entry.queue]
        if entry.state is not State.SETTLING:
            self._move(queue, entry, State.SETTLING)
        self._move(queue, entry, State.GONE)
        queue.counts[State.GONE] = 0
        queue.bytes -= entry.body_bytes
        if entry.body is not None:
            self.resident_bytes -= entry.body_bytes
            entry.body = None
        if entry.group is not None:
            self._advance(queue, entry.group, entry, now_ms)
        self._tidy(queue)
        return entry

    def _tidy(self, queue: Queue) -> None:
        """Something of a queue is gone."""
        queue.tidy()
        if not queue.held and len(self._queues) > MAX_IDLE_QUEUES:
            queue.used = False
            self._drop_if_idle(queue)
        self._trim_timers()

    def restore_lease(self, lease: Lease, now_ms: int) -> None:
        """At takeover: the previous owner had delivered this message, or these."""
        if lease.epoch >= self.epoch or (lease.count > 1 and self._restore_lot(lease, now_ms)):
            return
        for dot in range(lease.dot, lease.dot + lease.count):
            self._restore_one(dot, lease, now_ms)

    def _restore_one(self, dot: int, lease: Lease, now_ms: int) -> None:
        entry = self._find(dot)
        if entry is None or entry.state is not State.READY:
            return
        queue = self._queues[entry.queue]
        entry.epoch, entry.attempt, entry.unseen = lease.epoch, lease.attempt, lease.unseen
        self.delivered[entry.dot] = entry
        entry.leased_ms = min(lease.leased_ms, now_ms)  # also when it is over: it may be extended
        if lease.due_ms > now_ms:
            due_ms = min(lease.due_ms, entry.leased_ms + MAX_LEASE_MS)
            self._lease_until(queue, entry, due_ms)
        elif queue.exhausted(entry):
            self._end(queue, entry, Ended.EXHAUSTED)

    def exhaust(self, dot: int, attempts: int) -> None:
        """At takeover: its last delivery was one too many already."""
        entry = self._find(dot)
        if entry is not None and entry.state in (State.READY, State.DELAYED, State.LEASED):
            entry.attempt = max(entry.attempt, attempts)
            self.delivered[dot] = entry  # so it was, and its next owner should know
            self.deliveries_changed += 1
            self._end(self._queues[entry.queue], entry, Ended.EXHAUSTED)

    def configure(self, queue_name: str, settings: Settings | None, now_ms: int) -> None:
        """New settings of a queue (None: back to the defaults)."""
        queue = self._queue(queue_name)
        queue.configured = settings is not None
        queue.settings = settings or default_settings(queue_name)
        if queue.settings.retention_ms is not None:
            for entry in queue.entries():
                if entry.state is not State.GONE:
                    self._timers.add(queue.expires_ms(entry), entry.dot)
        self._watch_retention(queue)
        self._drop_if_idle(queue)

    # ── what consumers ask ──────────────────────────────────────────────────────────────────────

    def take(
        self, queue_name: str, most: int, visibility_ms: int | None, now_ms: int
    ) -> list[Taken]:
        """Lease up to `most` messages; the queue's visibility when `visibility_ms` is None."""
        queue = self._queues.get(queue_name)
        if queue is None or queue.waiters:
            # Those who wait came first; a ready message would already be theirs.
            return []
        return self._take(queue, most, visibility_ms, now_ms)

    def release_all(self, spans: Iterable[tuple[int, int, Receipt]], now_ms: int) -> None:
        """`release` for many: (first, last, receipt) of what follows each other."""
        for dot, last, receipt in spans:
            while dot <= last:
                lot = self.lots.holding(dot)
                if lot is None:
                    self.release(dot, receipt, now_ms)
                    dot += 1
                    continue
                upto = min(last, lot.last)
                if not lot.settling and receipt == Receipt(lot.epoch, 1):
                    entries = self._apart(self._cut(lot, dot, upto))
                    for entry in entries:
                        entry.unseen = 1
                    self._ready_all(self._queues[lot.queue], entries, now_ms)
                dot = upto + 1

    def release(self, dot: int, receipt: Receipt, now_ms: int) -> Verdict:
        """Undo a delivery that never reached its consumer: it was no attempt."""
        entry = self._named(dot, receipt)
        if isinstance(entry, Verdict):
            return entry
        if entry.state is State.LEASED and receipt == Receipt(entry.epoch, entry.attempt):
            entry.unseen += 1
            self._ready(self._queues[entry.queue], entry, now_ms)
        return Verdict.DONE

    def settle(self, dot: int, receipt: Receipt | None) -> Verdict:
        """Begin to end a message for a consumer: DONE moves it to SETTLING."""
        entry = self._named(dot, receipt)
        if isinstance(entry, Verdict):
            return entry
        self._move(self._queues[entry.queue], entry, State.SETTLING)
        return Verdict.DONE

    def settle_span(self, first: int, last: int, text: str | None) -> list[Settled]:
        """`settle` for messages that follow each other, with one receipt, as its text: a verdict
        for each part of them that has one."""
        receipt = parse_receipt(text) if text is not None else None
        entries = self.entries
        found: list[Settled] = []
        dot = first
        while dot <= last:
            entry = entries.get(dot)
            if entry is None and (lot := self.lots.holding(dot)) is not None:
                upto = min(last, lot.last)
                found.append((dot, upto, self._settle_lot(lot, dot, upto, receipt)))
                dot = upto + 1
                continue
            if entry is not None and entry.state is State.LEASED:
                if self._overtaken(entry, receipt):
                    verdict = Verdict.OVERTAKEN
                else:
                    verdict = Verdict.DONE
                    self._move(self._queues[entry.queue], entry, State.SETTLING)
            else:
                verdict = self.settle(dot, receipt)
            found.append((dot, dot, verdict))
            dot += 1
        return found

    def unsettle_all(self, spans: Iterable[tuple[int, int]], now_ms: int) -> None:
        """`unsettle` for many: (first, last) of what follows each other."""
        for dot, last in spans:
            while dot <= last:
                lot = self.lots.holding(dot)
                if lot is None:
                    self.unsettle(dot, now_ms)
                    dot += 1
                    continue
                lot = self._cut(lot, dot, min(last, lot.last))
                dot += lot.count
                if not lot.settling:
                    continue
                if lot.due_ms <= now_ms:
                    self._ready_all(self._queues[lot.queue], self._apart(lot), now_ms)
                    continue
                lot.settling = False
                counts = self._queues[lot.queue].counts
                counts[State.SETTLING] -= lot.count
                counts[State.LEASED] += lot.count
                self.deliveries_changed += 1

    def unsettle(self, dot: int, now_ms: int) -> None:
        """The end was refused for certain: the message stands where it stood."""
        entry = self.entries.get(dot)
        if entry is None or entry.state is not State.SETTLING:
            return
        queue = self._queues[entry.queue]
        if entry.group is not None and queue.groups[entry.group].head is not entry:
            self._move(queue, entry, State.BEHIND)
            if expires_ms := queue.expires_ms(entry):
                self._timers.add(expires_ms, dot)
        elif entry.due_ms > now_ms and entry.attempt:
            self._lease_until(queue, entry, entry.due_ms)
        else:
            self._ready(queue, entry, now_ms)

    def nack(self, dot: int, receipt: Receipt | None, delay_ms: int, now_ms: int) -> Verdict:
        """Give a message back, to be delivered again after `delay_ms`."""
        entry = self._named(dot, receipt)
        if isinstance(entry, Verdict):
            return entry
        queue = self._queues[entry.queue]
        if entry.state is State.LEASED and queue.exhausted(entry):
            self._end(queue, entry, Ended.EXHAUSTED)
        elif entry.state in (State.LEASED, State.READY):
            if delay_ms > 0:
                self._delay_until(queue, entry, now_ms + delay_ms)
            elif entry.state is State.LEASED:
                self._ready(queue, entry, now_ms)
        return Verdict.DONE

    def extend(self, dot: int, receipt: Receipt | None, visibility_ms: int, now_ms: int) -> Verdict:
        """Let a lease end `visibility_ms` from now. A lease that ended while nobody else took
        the message is taken up again: its holder still is the only one."""
        entry = self._named(dot, receipt)
        if isinstance(entry, Verdict):
            return entry
        if entry.state not in (State.LEASED, State.READY) or not entry.seen:
            return Verdict.NOT_LEASED
        if now_ms + visibility_ms > entry.leased_ms + MAX_LEASE_MS:
            return Verdict.TOO_LONG
        if visibility_ms == 0:
            return self.nack(dot, receipt, 0, now_ms)
        self._lease_until(self._queues[entry.queue], entry, now_ms + visibility_ms)
        self._trim_timers()
        return Verdict.DONE

    def ready_only(self, dots: Iterable[int]) -> set[int]:
        """Those of the dots that are READY now."""
        return {
            dot
            for dot in dots
            if (entry := self.entries.get(dot)) is not None and entry.state is State.READY
        }

    def purge(self, queue_name: str) -> tuple[list[int], Purged | None]:
        """Move every message of a queue to SETTLING; returns those that were not already: in play,
        and waiting in the backlog (`purged` or `unpurge` follows)."""
        queue = self._queues.get(queue_name)
        if queue is None:
            return [], None
        ending = [e for e in queue.entries() if e.state not in (State.GONE, State.SETTLING)]
        for entry in ending:
            self._move(queue, entry, State.SETTLING)
        dots = [entry.dot for entry in ending]
        for lot in [lot for lot in self.lots if lot.queue == queue_name and not lot.settling]:
            self._settle_lot(lot, lot.first, lot.last, None)
            dots += range(lot.first, lot.last + 1)
        return dots, self._end_backlog(queue)

    def unpurge(self, purged: Purged, now_ms: int) -> None:
        """Their end was refused."""
        queue = self._queue(purged.queue)
        self._unpurge(queue, purged)
        self._serve(queue, now_ms)

    def forget_queue(self, queue_name: str, now_ms: int) -> None:
        """It was deleted: its settings too. What arrives later makes a new one."""
        self.configure(queue_name, None, now_ms)
        queue = self._queues.get(queue_name)
        if queue is not None and not queue.held:
            queue.used = False
            self._drop_if_idle(queue)

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def next_due_ms(self) -> int | None:
        """When `tick` next has something to do (or a little earlier); None: never."""
        due_ms = self._timers.next_ms()
        if not self._retained:
            return due_ms
        kept_ms = min(self._retained.values())
        return kept_ms if due_ms is None else min(due_ms, kept_ms)

    def tick(self, now_ms: int) -> None:
        """Let delays, leases and lifetimes end whose time has come."""
        for queue, expired in self._expired(now_ms):
            self._end(queue, expired, Ended.EXPIRED)
        while (dot := self._timers.pop(now_ms)) is not None:
            entry = self.entries.get(dot)
            if entry is None:
                lot = self.lots.holding(dot)
                if lot is not None and not lot.settling and lot.due_ms <= now_ms:
                    self._lease_over(lot, now_ms)
                continue
            queue = self._queues[entry.queue]
            match entry.state:
                case State.DELAYED if entry.due_ms <= now_ms:
                    self._ready(queue, entry, now_ms)
                case State.LEASED if entry.due_ms <= now_ms:
                    if queue.exhausted(entry):
                        self._end(queue, entry, Ended.EXHAUSTED)
                    else:
                        self._ready(queue, entry, now_ms)
                case State.READY | State.DELAYED | State.BEHIND:
                    if queue.expired(entry, now_ms):
                        self._end(queue, entry, Ended.EXPIRED)
                case _:
                    pass  # LEASED: its consumer may finish; SETTLING: already leaving.

    def postpone(self, by_ms: int) -> None:
        """See `leases.postpone`."""
        postpone(self.delivered.values(), self.lots, self._timers, by_ms)
        self.deliveries_changed += 1

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _state_on_arrival(self, entry: Entry, now_ms: int) -> State:
        if entry.ready_at_ms <= now_ms:
            return State.READY
        entry.due_ms = entry.ready_at_ms
        self._timers.add(entry.due_ms, entry.dot)
        return State.DELAYED

    def _advance(self, queue: Queue, name: str, left: Entry, now_ms: int) -> None:
        """A member of a group left: if it was the head, the next one's turn comes."""
        group = queue.groups[name]
        if group.head is not left:
            group.lost_one()
            return
        while group.behind:
            head = group.behind.popleft()
            if head.state is State.GONE:
                group.gone -= 1
                continue
            group.head = head
            if head.state is State.SETTLING:
                return
            if head.ready_at_ms > now_ms:
                self._delay_until(queue, head, head.ready_at_ms)
            else:
                self._ready(queue, head, now_ms)
            return
        del queue.groups[name]

    def _named(self, dot: int, receipt: Receipt | None) -> Entry | Verdict:
        """The message that a consumer means, or why it has no say about it."""
        lot = self.lots.holding(dot)
        if lot is not None:
            if lot.settling:
                return Verdict.SETTLING
            if self._stale(receipt, Receipt(lot.epoch, 1)):
                return Verdict.OVERTAKEN
        entry = self._find(dot)
        if entry is None:
            return Verdict.SETTLING if self.ending.has(*unpack_dot(dot)) else Verdict.UNKNOWN
        if entry.state is State.SETTLING:
            return Verdict.SETTLING
        return Verdict.OVERTAKEN if self._overtaken(entry, receipt) else entry

    def _overtaken(self, entry: Entry, receipt: Receipt | None) -> bool:
        """Whether a later delivery than the receipt's exists, or the receipt was never given. One
        of an earlier owner whose lease was forgotten is good while nobody else has the message."""
        return self._stale(receipt, Receipt(entry.epoch, entry.attempt))
