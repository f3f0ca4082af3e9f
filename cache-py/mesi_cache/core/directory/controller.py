"""The home: keeps the truth about its keys and serialises what happens to each (a blocking
directory). Only requests wait; acknowledgements, puts, backups and renewals are dealt with at once,
or the home could wait for an owner whose news it does not take in.

Theory of operation. `_start` takes the next request of an entry, classifies it against the entry
into an event, and the TABLE says what happens. Whoever holds a copy that is in the way is told, and
answers, or its lease is waited out; then the same request is looked at again.
"""

import heapq
from collections import OrderedDict

from mesi_cache.core.counts import Counts
from mesi_cache.core.directory.applied import Applied
from mesi_cache.core.directory.entry import Asked, Copy, Entry
from mesi_cache.core.directory.retries import Retries
from mesi_cache.core.directory.table import BUSY, STABLE, TABLE, Do, Event, State
from mesi_cache.core.messages import (
    Backup,
    BackupAck,
    BackupRefused,
    Fetch,
    FetchAck,
    GetM,
    GetS,
    Grant,
    Inv,
    InvAck,
    Put,
    PutAck,
    Renew,
    RenewAck,
)
from mesi_cache.core.numbers import first_number
from mesi_cache.core.records import ABSENT, Claim, Record, evaluate, expired
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Logged, Step

NEVER = float("inf")


class Directory:
    """The entries of the keys whose home this member is."""

    def __init__(
        self,
        settings: Settings,
        epoch: int,
        counts: Counts,
        incarnations: dict[str, int],
        names: dict[str, str],
        applied: Applied,
        retries: Retries,
        grants_from_ms: float,
    ) -> None:
        """`incarnations` and `names` are the machine's own records of its peers. `grants_from_ms`:
        when the last lease of an earlier epoch is over (0: there was none)."""
        self._settings = settings
        self._counts = counts
        self._incarnations = incarnations
        self._names = names
        self.applied = applied
        self.retries = retries
        self.grants_from_ms = grants_from_ms
        self.entries: dict[str, Entry] = {}
        self._number = first_number(epoch)  # of the latest transaction
        self._session_until: dict[str, float] = {}  # member -> until when a renewal may reach
        # Invalidations and fetches that a member has not acknowledged, whether or not somebody
        # still waits for it: they outlive their transaction, until the member has applied them.
        self.unacked: dict[str, dict[str, Inv | Fetch]] = {}
        self._held: OrderedDict[tuple[str, str], Asked] = OrderedDict()  # until grants_from_ms
        self._timers: list[tuple[float, int, str]] = []  # (when, entry number, key)

    # --- requests -----------------------------------------------------------------------------

    def on_request(self, step: Step, source: str, incarnation: int, message: GetS | GetM) -> None:
        asked = Asked(source, incarnation, message)
        if step.now_ms < self.grants_from_ms:
            held = self._held.get((source, message.key))
            if held is not None and held.message.request > message.request:
                return  # delayed: its sender has long asked anew
            if len(self._held) < self._settings.max_held or held is not None:
                self._held[source, message.key] = asked  # a newer request replaces the older
            return
        self._queue(step, asked)

    def _queue(self, step: Step, asked: Asked) -> None:
        source, message = asked.source, asked.message
        if asked.incarnation != self._incarnations.get(source):
            return
        if isinstance(message, GetM):
            self.applied.note_floor(source, message.floor)
        entry = self.entries.get(message.key)
        if entry is None:
            entry = self.entries[message.key] = Entry(message.key)
        copy = entry.copies.get(source)
        if copy is not None and copy.incarnation == asked.incarnation:
            if message.request < copy.request:
                return  # delayed: its sender has long had a newer answer
            if message.request == copy.request:
                self._grant_again(step, entry, asked, copy)
                return
        for other in (entry.current, entry.queue.get(source)):
            theirs = other is not None and other.source == source
            if other is not None and theirs and other.message.request >= message.request:
                return
        entry.queue[source] = asked
        self._advance(step, entry)

    def _advance(self, step: Step, entry: Entry) -> None:
        """Begin queued requests until one has to wait for something."""
        while entry.state not in BUSY:
            entry.current = None
            if not entry.queue:
                break
            source = next(iter(entry.queue))
            entry.current = entry.queue.pop(source)
            self._start(step, entry, entry.current)
        self._tidy(entry)

    def _start(self, step: Step, entry: Entry, asked: Asked) -> None:
        """Classify `asked` against the entry, and fire."""
        message = asked.message
        if isinstance(message, GetM):
            outcome = self.applied.outcome(asked.source, message.operation_id)
            if outcome is not None:
                asked.result = (outcome, None)
                self._answer(step, entry, asked)
                return
            if self.applied.forgotten(asked.source, message.operation_id):
                return
            if message.once is not None:
                outcome = self.retries.outcome(message.once, step.wall_ms)
                if outcome is not None:
                    self.applied.add(asked.source, message.operation_id, outcome)
                    asked.result = (outcome, None)
                    self._answer(step, entry, asked)
                    return
        self._purge(step, entry)
        self._fire(step, entry, self._classify(step, entry, asked))

    def _classify(self, step: Step, entry: Entry, asked: Asked) -> Event:
        message = asked.message
        if entry.state is State.N:
            return Event.ASK
        if entry.state is State.EM and asked.source in entry.copies:
            return Event.RETURN
        if expired(entry.record, step.wall_ms):
            asked.result = None  # what it was going to do, it was going to do to the old value
            return Event.OUTDATED
        if entry.state is State.EM:
            # What the request will find or do is open until the owner has given up.
            return Event.READ if isinstance(message, GetS) else Event.CHANGE
        if isinstance(message, GetS):
            return Event.READ if entry.record.value is not None else Event.READ_NONE
        asked.result = evaluate(message.operation, entry.record, step.wall_ms)
        record = asked.result[1]
        if record is None:
            return Event.NO_CHANGE
        if record.value is None or isinstance(message.operation, Claim):
            return Event.ERASE  # no copy is left of it
        alone = entry.state is State.S and set(entry.copies) == {asked.source}
        return Event.CHANGE_ALONE if alone else Event.CHANGE

    # --- what else members say ----------------------------------------------------------------

    def on_inv_ack(self, step: Step, source: str, ack: InvAck) -> None:
        self._acknowledged(source, ack.key, ack.number)
        entry = self.entries.get(ack.key)
        if entry is not None and entry.state is State.BUSY_INV and ack.number == entry.number:
            self._cleared(step, entry, source, kept=False)

    def on_fetch_ack(self, step: Step, source: str, ack: FetchAck) -> None:
        self._acknowledged(source, ack.key, ack.number)
        entry = self.entries.get(ack.key)
        if entry is not None and entry.state is State.BUSY_FETCH and ack.number == entry.number:
            self._cleared(step, entry, source, kept=ack.kept)

    def on_put(self, step: Step, source: str, put: Put) -> None:
        entry = self.entries.get(put.key)
        copy = entry.copies.get(source) if entry is not None else None
        # A put of an older copy than the member's current one was overtaken by its new request.
        if entry is not None and copy is not None and put.number >= copy.number:
            if entry.state in BUSY and source in entry.waits:
                self._acknowledged(source, put.key, entry.number)
                self._cleared(step, entry, source, kept=False)
            else:
                self._remove(step, entry, source)
                self._tidy(entry)
        step.send.append((source, PutAck(put.key, put.number)))

    def on_backup(self, step: Step, source: str, backup: Backup) -> None:
        self.applied.note_floor(source, backup.floor)
        key, number, operation_id = backup.key, backup.number, backup.operation_id
        outcome = self.applied.outcome(source, operation_id)
        if outcome is not None:
            step.send.append((source, BackupAck(key, number, operation_id, outcome)))
            return
        entry = self.entries.get(key)
        copy = entry.copies.get(source) if entry is not None else None
        owns = entry is not None and (entry.state, Event.BACKUP) in TABLE
        if (
            entry is None
            or not owns
            or copy is None
            or copy.number != number
            or self.applied.forgotten(source, operation_id)
            or backup.version <= entry.record.version
        ):
            step.send.append((source, BackupRefused(key, number, operation_id)))
            return
        if backup.version != entry.record.version + 1:
            return  # one before it is still on its way, or lost and will be sent again
        entry.record = Record(backup.value, backup.version, backup.expires_ms)
        self.applied.add(source, operation_id, backup.outcome)
        step.log.append(
            Logged(key, entry.record, source, operation_id, backup.floor, backup.outcome)
        )
        step.send.append((source, BackupAck(key, number, operation_id, backup.outcome)))

    def on_renew(self, step: Step, source: str, renew: Renew) -> None:
        pending = list(self.unacked.get(source, {}).values())
        lease_ms, most = self._settings.lease_ms, self._settings.max_pending
        self._session_until[source] = step.now_ms + lease_ms
        ack = RenewAck(renew.request, lease_ms, tuple(pending[:most]), len(pending) <= most)
        step.send.append((source, ack))

    def member_restarted(self, step: Step, source: str) -> None:
        """`source` begins another incarnation: it holds nothing. Its copies are dropped where they
        are met (`_purge`); only those that somebody waits for are looked for now."""
        self.unacked.pop(source, None)
        for _, number, key in list(self._timers):
            entry = self.entries.get(key)
            if entry is not None and entry.number == number and source in entry.waits:
                self._cleared(step, entry, source, kept=False)

    def loaded(self, step: Step, key: str, record: Record | None) -> None:
        """The store's answer to `Step.load` (None: it has no such key)."""
        entry = self.entries.get(key)
        if entry is not None and entry.state is State.BUSY_LOAD:
            entry.record = record or ABSENT
            self._fire(step, entry, Event.LOADED)
            self._advance(step, entry)

    def load_failed(self, step: Step, key: str) -> None:
        """The store does not answer. Whoever still waits asks again; nothing is kept meanwhile, so
        a store that stays away costs no memory."""
        entry = self.entries.get(key)
        if entry is not None and entry.state is State.BUSY_LOAD:
            entry.current = None
            entry.queue.clear()
            self._fire(step, entry, Event.LOAD_FAILED)
            self._tidy(entry)

    # --- time ---------------------------------------------------------------------------------

    def tick(self, step: Step) -> None:
        if self._held and step.now_ms >= self.grants_from_ms:
            held, self._held = self._held, OrderedDict()
            for asked in held.values():
                self._queue(step, asked)
        while self._timers and self._timers[0][0] <= step.now_ms:
            _, number, key = heapq.heappop(self._timers)
            entry = self.entries.get(key)
            if entry is not None and entry.state in BUSY and entry.number == number:
                self._overdue(step, entry)

    def next_tick_ms(self) -> float:
        if self._held:
            return self.grants_from_ms
        return self._timers[0][0] if self._timers else NEVER

    def _overdue(self, step: Step, entry: Entry) -> None:
        """Ask those again who have not answered; go on without those whose lease is over."""
        number = entry.number
        for source, until_ms in list(entry.waits.items()):
            if step.now_ms < until_ms:
                message = self.unacked.get(source, {}).get(entry.key)
                if message is not None:
                    step.send.append((source, message))
                continue
            # It can show its copy no longer, but it may still have it, and a renewal must not bring
            # it back to life. A fetch that would let it keep a copy is worth nothing now.
            self._counts.lease_waits += 1
            self._tell(
                step,
                entry,
                source,
                Inv(entry.key, self._next_number(), self._name(self._settings.me)),
            )
            self._cleared(step, entry, source, kept=False)
        if entry.waits and entry.number == number:
            self._arm(step, entry)

    def _arm(self, step: Step, entry: Entry) -> None:
        at_ms = min(step.now_ms + self._settings.resend_ms, min(entry.waits.values()))
        heapq.heappush(self._timers, (at_ms, entry.number, entry.key))

    # --- firing the table ---------------------------------------------------------------------

    def _fire(self, step: Step, entry: Entry, event: Event) -> None:
        row = TABLE.get((entry.state, event))
        if row is None:
            self._counts.ignored += 1
            return
        entry.state, actions = row
        for do in actions:
            self._do(step, entry, do)

    def _do(self, step: Step, entry: Entry, do: Do) -> None:
        asked = entry.current
        if asked is None:
            return
        match do:
            case Do.LOAD:
                step.load.append(entry.key)
            case Do.RESUME:
                self._start(step, entry, asked)
            case Do.GRANT_S:
                self._grant(step, entry, asked, "S")
            case Do.GRANT_E:
                self._grant(step, entry, asked, "E")
            case Do.GRANT_M:
                entry.copies.clear()  # the requester's own shared copy, if any, becomes this one
                self._grant(step, entry, asked, "M")
            case Do.ANSWER:
                self._answer(step, entry, asked)
            case Do.LOG:
                self._log(step, entry, asked)
            case Do.LOG_DEADLINE:
                entry.record = Record(None, entry.record.version + 1)
                step.log.append(Logged(entry.key, entry.record))
            case Do.INVALIDATE:
                self._invalidate(step, entry, asked)
            case Do.FETCH_KEEP:
                self._fetch(step, entry, asked, keep=True)
            case Do.FETCH_DROP:
                self._fetch(step, entry, asked, keep=False)
            case Do.FORGET:
                entry.copies.pop(asked.source, None)

    def _log(self, step: Step, entry: Entry, asked: Asked) -> None:
        """What was done becomes the value and is not done again. Without effect, it is logged only
        if it has a name: a retry under that name may come long after a restart."""
        message = asked.message
        if asked.result is None or isinstance(message, GetS):
            return
        outcome, record = asked.result
        self.applied.add(asked.source, message.operation_id, outcome)
        if record is None and message.once is None:
            return
        entry.record = record or entry.record
        until_ms = self.retries.add(message.once, step.wall_ms, outcome) if message.once else 0
        step.log.append(Logged(
            entry.key, record, asked.source, message.operation_id, message.floor, outcome,
            message.once, until_ms,
        ))  # fmt: skip

    def _grant(self, step: Step, entry: Entry, asked: Asked, state: str) -> None:
        until_ms = step.now_ms + self._settings.lease_ms
        copy = Copy(self._next_number(), until_ms, asked.incarnation, asked.message.request, state)
        entry.copies[asked.source] = copy
        self._send_grant(step, entry, asked, copy)

    def _grant_again(self, step: Step, entry: Entry, asked: Asked, copy: Copy) -> None:
        """The grant may have been lost. The cache counts its lease from the first attempt of the
        request, so sending it again prolongs nothing."""
        if isinstance(asked.message, GetM):
            outcome = self.applied.outcome(asked.source, asked.message.operation_id)
            if outcome is None:
                return  # its sender has its answer and waits no longer
            asked.result = (outcome, None)
        if entry.record.value is not None:
            self._send_grant(step, entry, asked, copy)

    def _send_grant(self, step: Step, entry: Entry, asked: Asked, copy: Copy) -> None:
        record = entry.record
        left_ms = max(1, record.expires_ms - int(step.wall_ms)) if record.expires_ms else 0
        step.send.append((asked.source, Grant(
            entry.key, asked.message.request, copy.number, copy.state,  # type: ignore[arg-type]  # one of the three
            record.value, record.version, self._settings.lease_ms, record.expires_ms, left_ms,
            asked.result[0] if asked.result else None,
        )))  # fmt: skip

    def _answer(self, step: Step, entry: Entry, asked: Asked) -> None:
        outcome = asked.result[0] if asked.result else None
        step.send.append((asked.source, Grant(
            entry.key, asked.message.request, self._number, "I", None, 0, 0, outcome=outcome
        )))  # fmt: skip

    # --- clearing copies away -----------------------------------------------------------------

    def _invalidate(self, step: Step, entry: Entry, asked: Asked) -> None:
        """Every sharer but a requester that will become the owner; a delete leaves no copy at all,
        and neither does a deadline."""
        entry.number = self._next_number()
        deletes = asked.result is None or asked.result[1] is None or asked.result[1].value is None
        for source, copy in entry.copies.items():
            if source != asked.source or deletes:
                self._counts.invalidations_sent += 1
                self._wait_for(step, entry, source, copy)
                self._tell(
                    step, entry, source, Inv(entry.key, entry.number, self._name(asked.source))
                )
        self._arm(step, entry)

    def _fetch(self, step: Step, entry: Entry, asked: Asked, *, keep: bool) -> None:
        entry.number = self._next_number()
        for source, copy in entry.copies.items():
            self._counts.invalidations_sent += not keep
            self._wait_for(step, entry, source, copy)
            self._tell(
                step, entry, source, Fetch(entry.key, entry.number, keep, self._name(asked.source))
            )
        self._arm(step, entry)

    def _wait_for(self, step: Step, entry: Entry, source: str, copy: Copy) -> None:
        entry.waits[source] = max(copy.until_ms, self._session_until.get(source, 0.0))

    def _tell(self, step: Step, entry: Entry, source: str, message: Inv | Fetch) -> None:
        self.unacked.setdefault(source, {})[entry.key] = message
        step.send.append((source, message))

    def _acknowledged(self, source: str, key: str, number: int) -> None:
        unacked = self.unacked.get(source)
        message = unacked.get(key) if unacked else None
        if unacked and message is not None and message.number <= number:
            del unacked[key]

    def _cleared(self, step: Step, entry: Entry, source: str, *, kept: bool) -> None:
        """`source` no longer stands in the way of the transaction under way."""
        if source not in entry.waits:
            return
        del entry.waits[source]
        if kept:
            entry.copies[source].number = entry.number
            entry.copies[source].state = "S"
        else:
            entry.copies.pop(source, None)
        if not entry.waits:
            self._fire(step, entry, Event.SHARED if entry.copies else Event.FREE)
            self._advance(step, entry)

    def _purge(self, step: Step, entry: Entry) -> None:
        """Drop copies of members that have restarted since."""
        for source, copy in list(entry.copies.items()):
            if copy.incarnation != self._incarnations.get(source):
                self._remove(step, entry, source)

    def _remove(self, step: Step, entry: Entry, source: str) -> None:
        entry.copies.pop(source, None)
        if not entry.copies and entry.state in STABLE and entry.state is not State.U:
            self._fire(step, entry, Event.GONE)

    def _tidy(self, entry: Entry) -> None:
        """Nobody holds it and nobody asks: the store has it."""
        if entry.state in (State.U, State.N) and not entry.queue:
            self.entries.pop(entry.key, None)

    def _name(self, member: str) -> str:
        return self._names.get(member, member)

    def _next_number(self) -> int:
        self._number += 1
        return self._number
