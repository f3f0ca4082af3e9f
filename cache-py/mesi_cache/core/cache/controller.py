"""The requester: answers clients from its lines, asks the homes for what it lacks.

Theory of operation. Every client call joins the queue of its line; `_pump` answers what the line's
state allows and starts at most one request for the rest. Every message that arrives is classified
by its number (is it older than what we hold? is its data dead?) into an event, and the TABLE says
what the event does. Nothing here waits: what must come later comes in as a message or a tick.
"""

from collections import deque

from mesi_cache.core.cache.line import NEVER, Call, Change, Line, Request, Session
from mesi_cache.core.cache.requester import Requester, usable_ms
from mesi_cache.core.cache.table import LETTER, OWNING, PUTTING, READABLE, TABLE, Event, State
from mesi_cache.core.messages import (
    BackupAck,
    BackupRefused,
    Fetch,
    FetchAck,
    Grant,
    Inv,
    InvAck,
    Message,
    PutAck,
    Renew,
    RenewAck,
)
from mesi_cache.core.records import Cas, Claim, Incr, Once, Operation, Write, evaluate
from mesi_cache.core.step import Found, Step, Unavailable


class Cache(Requester):
    """One node's cache: client calls and messages in, a `Step` of effects out."""

    def lookup(self, key: str, now_ms: float) -> Line | None:
        """The line of `key` if it can be shown now: the whole of a hit. Touches the LRU order."""
        line = self.lines.get(key)
        if line is None or not line.alive(now_ms):
            return None
        self.lines.touch(key)
        self._counts.reads += 1
        self._counts.hits += 1
        return line

    def submit(
        self, step: Step, key: str, operation: Operation | None, once: Once | None = None
    ) -> int:
        """Begin a read (`operation` None) or change; its answer comes under the token returned.
        A change with a name of the client's own (`once`) is always the home's to do."""
        token = self._next_token
        self._next_token += 1
        operation_id = 0
        if operation is not None:
            operation_id = self._next_operation
            self._next_operation += 1
            self._counts.writes += not isinstance(operation, Claim)
        else:
            self._counts.reads += 1
        now_ms = step.now_ms
        deadline_ms = now_ms + self._settings.call_ms
        call = Call(token, key, operation, operation_id, now_ms, deadline_ms, once)
        if operation_id:
            self._unresolved[operation_id] = call
        line = self.table.get(key)
        if line is None:
            home = self._placement.home(key)
            line = self.table[key] = Line(key, home, self._session(home))
        call.missed = line.state not in READABLE
        line.waiting.append(call)
        if line.state in READABLE:
            self.lines.touch(key)
        self._pump(step, line)
        if not call.done:
            self._deadlines.append(call)
        return token

    def on_grant(self, step: Step, home: str, grant: Grant) -> None:
        line = self.table.get(grant.key)
        if line is None or line.home != home or line.request is None:
            return  # nobody waits for it
        request = line.request
        if request.id != grant.request:
            return  # the answer to an older attempt
        if request.call is not None and grant.outcome is not None:
            self._resolve(step, request.call, grant.outcome)
        self._event(step, line, self._data_event(step, line, request, grant), grant)

    def _data_event(self, step: Step, line: Line, request: Request, grant: Grant) -> Event:
        if grant.state == "I":
            # A change that took effect without leaving us a copy has ended any copy we had.
            done = grant.outcome is not None and grant.outcome.status == "done"
            return Event.DATA_DEAD if done else Event.DATA_NONE
        if grant.value is None or grant.number <= request.killed:
            return Event.DATA_DEAD
        until_ms = request.first_ms + usable_ms(grant.lease_ms)
        if grant.ttl_left_ms:
            until_ms = min(until_ms, request.first_ms + usable_ms(grant.ttl_left_ms))
        if step.now_ms >= until_ms:
            return Event.DATA_DEAD
        match grant.state:
            case "S":
                return Event.DATA_S
            case "E":
                return Event.DATA_E
            case "M":
                return Event.DATA_M

    def on_inv(self, step: Step, home: str, inv: Inv) -> None:
        line = self._line_of(inv.key, home)
        if line is None:
            self._counts.ignored += 1
            return
        if line.state in READABLE and line.number > inv.number:
            step.send.append((home, InvAck(inv.key, inv.number)))  # late: we hold newer data
            return
        self._event(step, line, Event.INV, inv)

    def on_fetch(self, step: Step, home: str, fetch: Fetch) -> None:
        line = self._line_of(fetch.key, home)
        if line is None:
            self._counts.ignored += 1
            return
        kept = line.number == fetch.number and fetch.keep
        if line.state in READABLE and (line.number > fetch.number or kept):
            # Late or repeated. It left a copy exactly if that copy is still the one we hold.
            step.send.append((home, FetchAck(fetch.key, fetch.number, kept)))
            return
        # A change on its way may yet be logged, which would make the copy left here an old one.
        keep = fetch.keep and not line.changes
        self._event(step, line, Event.FETCH_KEEP if keep else Event.FETCH_DROP, fetch)

    def on_put_ack(self, step: Step, home: str, ack: PutAck) -> None:
        line = self.table.get(ack.key)
        if line is not None and line.state in PUTTING and line.number == ack.number:
            self._event(step, line, Event.PUT_ACK, ack)

    def on_backup_ack(self, step: Step, home: str, ack: BackupAck) -> None:
        line = self.table.get(ack.key)
        if line is not None and line.state in OWNING and line.number == ack.number:
            # The home logs in order, so an acknowledgement covers all changes before it.
            while any(c.call.operation_id == ack.operation_id for c in line.changes):
                self._commit(step, line)
        call = self._unresolved.get(ack.operation_id)
        if call is not None and call.key == ack.key:
            self._resolve(step, call, ack.outcome)
        if line is not None:
            if line.request is not None and line.request.call is call is not None:
                # Asked for anew while its first way succeeded after all: a grant is still possible,
                # but nobody needs it.
                self._fire(step, line, Event.GIVE_UP, None)
            self._pump(step, line)

    def _commit(self, step: Step, line: Line) -> None:
        change = line.changes[0]
        erased = change.record.value is None
        self._fire(step, line, Event.COMMIT, None)
        self._resolve(step, change.call, change.outcome)
        for call, outcome in change.followers:
            self._resolve(step, call, outcome)
        if erased:
            self._fire(step, line, Event.ERASED, None)

    def on_backup_refused(self, step: Step, home: str, refused: BackupRefused) -> None:
        line = self.table.get(refused.key)
        if line is None or line.state not in OWNING or line.number != refused.number:
            return
        if any(change.call.operation_id == refused.operation_id for change in line.changes):
            self._event(step, line, Event.REFUSED, refused)

    def on_renew_ack(self, step: Step, home: str, epoch: int, ack: RenewAck) -> None:
        session = self._session(home)
        sent_ms = session.renewing.pop(ack.request, None)
        if sent_ms is None or session.epoch != epoch:
            return
        # Before anything lives longer, everything that was lost on the way must have been applied:
        # else a cut of the one direction home -> here would keep an old copy alive for ever.
        for message in ack.pending:
            match message:
                case Inv():
                    self.on_inv(step, home, message)
                case Fetch(key, number, _, origin):
                    # The home may be done waiting for it, so the copy that it would have left is
                    # not among those whose lease this message prolongs.
                    self.on_fetch(step, home, Fetch(key, number, False, origin))
        if not ack.complete:
            self._renew(step, home, session)
            return
        session.until_ms = max(session.until_ms, sent_ms + usable_ms(ack.lease_ms))
        waiting, session.waiting = session.waiting, {}
        for key in waiting:
            line = self.table.get(key)
            if line is not None:
                self._pump(step, line)

    def home_restarted(self, step: Step, home: str, epoch: int) -> None:
        """`home` begins another epoch: what it granted before is void."""
        old = self._session(home)
        if old.epoch == epoch:
            return
        self.sessions[home] = Session(epoch)
        for line in [line for line in self.table.values() if line.home == home]:
            if (line.state, Event.LOST) in TABLE:
                self._fire(step, line, Event.LOST, None)
            line.session = self.sessions[home]
            self._pump(step, line)

    def surrender(self, step: Step, most: int) -> None:
        """Put back the `most` least recently used lines."""
        for line in list(self.lines.in_order())[:most]:
            self._fire(step, line, Event.EVICT, None)

    def tick(self, step: Step) -> None:
        now_ms = step.now_ms
        while self._deadlines and (
            self._deadlines[0].done or self._deadlines[0].deadline_ms <= now_ms
        ):
            self._expire(step, self._deadlines.popleft())
        while self._resends and self._resends[0][0] <= now_ms:
            _, key, event, ref = self._resends.popleft()
            line = self.table.get(key)
            if line is not None:
                self._resend(step, line, event, ref)
        for home, session in self.sessions.items():
            if self._renew_at_ms(session) <= now_ms:
                self._renew(step, home, session)

    def next_tick_ms(self) -> float:
        """When `tick` has something to do next, at the latest."""
        deadlines, at_ms = self._deadlines, NEVER
        while deadlines and deadlines[0].done:
            deadlines.popleft()
        if deadlines:
            at_ms = deadlines[0].deadline_ms
        if self._resends and self._resends[0][0] < at_ms:
            at_ms = self._resends[0][0]
        for session in self.sessions.values():
            if session.lines or session.waiting:
                renew_ms = self._renew_at_ms(session)
                at_ms = renew_ms if renew_ms < at_ms else at_ms
        return at_ms

    def _expire(self, step: Step, call: Call) -> None:
        if call.done:
            return
        call.done = True
        self._unresolved.pop(call.operation_id, None)
        if call.operation is None:
            self._counts.misses += 1
        definite = call.operation is None or not call.sent
        step.answers.append((call.token, Unavailable(definite, "The key's home does not answer")))
        line = self.table.get(call.key)
        if line is None:
            return
        while line.waiting and line.waiting[0].done:
            line.waiting.popleft()
        request = line.request
        if request is not None:
            unwanted = not line.waiting if request.call is None else request.call is call
            if unwanted:
                self._fire(step, line, Event.GIVE_UP, None)
        self._pump(step, line)

    def _resend(self, step: Step, line: Line, event: Event, ref: int) -> None:
        """Send again what `ref` names, if it is still unanswered."""
        match event:
            case Event.LOAD if line.request is not None and line.request.id == ref:
                self._send_request(step, line)
                self._arm(step, line, Event.LOAD, ref)
            case Event.EVICT if line.state in PUTTING and line.number == ref:
                if step.now_ms >= line.put_until_ms:
                    self._event(step, line, Event.GIVE_UP, None)  # the home will not wait for it
                else:
                    self._send_put_again(step, line)
            case Event.COMMIT if line.changes and line.changes[0].call.operation_id == ref:
                for change in line.changes:
                    self._send_backup(step, line, change)
                self._arm(step, line, Event.COMMIT, ref)
            case Event.COMMIT if line.changes:
                # The one that was watched is logged; watch the oldest that is not.
                self._arm(step, line, Event.COMMIT, line.changes[0].call.operation_id)
            case _:
                pass

    def _renew_at_ms(self, session: Session) -> float:
        if session.waiting:
            return session.renew_sent + self._settings.resend_ms
        return session.renew_sent + self._settings.lease_ms / 3 if session.lines else NEVER

    def _renew(self, step: Step, home: str, session: Session) -> None:
        session.renew_sent = step.now_ms
        session.renewing[self._next_request] = step.now_ms
        while len(session.renewing) > 8:
            del session.renewing[next(iter(session.renewing))]
        step.send.append((home, Renew(self._next_request)))
        self._next_request += 1

    def _pump(self, step: Step, line: Line) -> None:
        """Answer whom the line's state allows; start what the first of the others needs."""
        waiting = line.waiting
        while waiting:
            call = waiting[0]
            if call.done:
                waiting.popleft()
            elif line.state is State.I:
                self._mark_missed(line)
                self._fire(step, line, Event.STORE if call.operation else Event.LOAD, None)
            elif line.state not in READABLE:
                break
            elif step.now_ms >= line.stop_ms and (line.state in OWNING or line.state is State.S):
                if line.changes:
                    break  # they end first
                self._fire(step, line, Event.PASSED, None)
            elif call.once is not None and line.state in OWNING:
                if line.changes:
                    break  # they end first
                self._fire(step, line, Event.ASK_HOME, None)
            elif line.state is State.SM_D:
                if not line.alive(step.now_ms):
                    break
                line.waiting = waiting = self._serve_reads(step, line, waiting)
                break
            elif call.operation is not None and line.state is State.S:
                self._fire(step, line, Event.STORE, None)
            elif not line.alive(step.now_ms):
                self._wait_for_renewal(step, line)
                break
            elif call.operation is None:
                waiting.popleft()
                self._found(step, call, line)
            elif line.changes and self._ended(step, line.changes[-1]):
                break  # a change that ends the line is on its way; it comes back here afterwards
            else:
                self._change(step, line, waiting.popleft())
        if line.state is State.I and not waiting:
            self.table.pop(line.key, None)

    def _serve_reads(self, step: Step, line: Line, waiting: deque[Call]) -> deque[Call]:
        kept: deque[Call] = deque()
        for call in waiting:
            if call.operation is not None:
                kept.append(call)
            elif not call.done:
                self._found(step, call, line)
        return kept

    def _mark_missed(self, line: Line) -> None:
        for call in line.waiting:
            call.missed = True

    def _ended(self, step: Step, change: Change) -> bool:
        return change.record.value is None or step.now_ms >= change.stop_ms

    def _change(self, step: Step, line: Line, call: Call) -> None:
        """An owner's change: worked out here, answered and readable once the home has logged it."""
        assert call.operation is not None  # noqa: S101 - for the type checker; _pump saw to it
        last = line.changes[-1] if line.changes else None
        base = last.record if last else line.record
        outcome, record = evaluate(call.operation, base, step.wall_ms)
        if record is None:
            if last:
                last.followers.append((call, outcome))
            else:
                self._resolve(step, call, outcome)
            return
        stop_ms = NEVER
        match call.operation:
            case Write(ttl_ms=ttl_ms) | Cas(ttl_ms=ttl_ms) if ttl_ms:
                stop_ms = step.now_ms + usable_ms(ttl_ms)
            case Incr():  # keeps the deadline
                stop_ms = last.stop_ms if last else line.stop_ms
            case _:
                pass
        change = Change(call, outcome, record, stop_ms)
        call.sent = True
        line.changes.append(change)
        self._send_backup(step, line, change)
        if last is None:
            self._arm(step, line, Event.COMMIT, call.operation_id)

    def _found(self, step: Step, call: Call, line: Line) -> None:
        record, letter = line.record, LETTER[line.state]
        assert record.value is not None  # noqa: S101 - a slot never holds an absent value
        self._answer_read(
            step,
            call,
            Found(record.value, record.version, letter, not call.missed, record.expires_ms),
        )

    def _wait_for_renewal(self, step: Step, line: Line) -> None:
        session = line.session
        session.waiting[line.key] = None
        if step.now_ms >= session.renew_sent + self._settings.resend_ms:
            self._renew(step, line.home, session)

    def _event(self, step: Step, line: Line, event: Event, message: Message | None) -> None:
        self._fire(step, line, event, message)
        self._pump(step, line)

    def _line_of(self, key: str, home: str) -> Line | None:
        """The line of `key`, or a passing one in I: what its home asks of it is answered all the
        same. None: `home` is not the key's home."""
        line = self.table.get(key)
        if line is None:
            if self._placement.home(key) != home:
                return None
            return Line(key, home, self._session(home))
        return line if line.home == home else None
