"""What a transition does: the actions that the TABLE names, and what they work on.

`controller.py` decides which event happened; everything that an event changes is here.
"""

from collections import OrderedDict, deque
from collections.abc import Callable

from mesi_cache.core.cache.line import NEVER, Call, Change, Line, Request, Session
from mesi_cache.core.cache.slots import Slots, slots
from mesi_cache.core.cache.table import READABLE, TABLE, Do, Event, State
from mesi_cache.core.counts import Counts
from mesi_cache.core.messages import (
    Backup,
    Fetch,
    FetchAck,
    GetM,
    GetS,
    Grant,
    Inv,
    InvAck,
    Message,
    Put,
)
from mesi_cache.core.numbers import first_number
from mesi_cache.core.placement import Placement
from mesi_cache.core.records import ABSENT, Outcome, Record
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Changed, Found, Missing, Step, Transition


def usable_ms(duration_ms: float) -> float:
    """How much of a duration granted elsewhere to count on: clocks may drift by up to 1 %, and what
    is taken off besides covers the time between looking at the clock and answering."""
    return 0.99 * duration_ms - 20.0


class Requester:
    """One node's lines. Invariant: `lines` holds at most `capacity` of them, least recent first."""

    def __init__(
        self,
        settings: Settings,
        placement: Placement,
        epoch: int,
        counts: Counts,
        incarnations: dict[str, int],
    ) -> None:
        """`incarnations` is the machine's own record of its peers."""
        self._incarnations = incarnations
        self._settings = settings
        self._placement = placement
        self._counts = counts
        self.lines: Slots = slots(settings.policy, settings.capacity)  # those that hold a slot
        self.table: dict[str, Line] = {}  # every line that is not simply I
        self.sessions: dict[str, Session] = {}
        # Changes without an answer, oldest first. (A plain dict's first key is slow to find once
        # many before it have gone.)
        self._unresolved: OrderedDict[int, Call] = OrderedDict()
        self._next_token = 1
        # Both increase over restarts: they begin with the durable start counter.
        self._next_request = first_number(epoch) + 1
        self._next_operation = first_number(epoch) + 1
        # Intervals are the same for all, so these are in order of time.
        self._deadlines: deque[Call] = deque()
        self._resends: deque[tuple[float, str, Event, int]] = deque()

    def _arm(self, step: Step, line: Line, event: Event, ref: int) -> None:
        self._resends.append((step.now_ms + self._settings.resend_ms, line.key, event, ref))

    def _answer_read(self, step: Step, call: Call, answer: Found | Missing) -> None:
        call.done = True
        if call.missed or isinstance(answer, Missing):
            self._counts.misses += 1
        else:
            self._counts.hits += 1
        step.answers.append((call.token, answer))

    def _resolve(self, step: Step, call: Call, outcome: Outcome) -> None:
        """The one answer to a change, wherever the news came from first."""
        self._unresolved.pop(call.operation_id, None)
        if not call.done:
            call.done = True
            call.operation = None  # its value may be large, and the deadline queue keeps the call
            step.answers.append((call.token, Changed(outcome)))

    def _fire(self, step: Step, line: Line, event: Event, message: Message | None) -> None:
        row = TABLE.get((line.state, event))
        if row is None:
            self._counts.ignored += 1
            return
        before = line.state
        line.state, actions = row
        for do in actions:
            _DOES[do](self, step, line, before, message)
        if line.state is not before:
            origin = message.origin if isinstance(message, Inv | Fetch) else ""
            step.notes.append(Transition(line.key, before, line.state, event, origin))

    def _do_send_request(self, step: Step, line: Line, before: State, _: Message | None) -> None:
        call = None
        if line.state is not State.IS_D:
            call = line.waiting.popleft()
            call.sent = True
            if before is State.S:
                self._counts.upgrades += 1
        line.request = Request(self._next_request, call, step.now_ms, self._next_token)
        self._next_request += 1
        self._send_request(step, line)
        self._arm(step, line, Event.LOAD, line.request.id)

    def _send_request(self, step: Step, line: Line) -> None:
        request = line.request
        if request is None:
            return
        message: Message
        if request.call is None:
            message = GetS(line.key, request.id)
        else:
            call = request.call
            assert call.operation is not None  # noqa: S101 - an answered call ends its request
            message = GetM(
                line.key,
                request.id,
                self._incarnations.get(line.home, 0),
                call.operation_id,
                self._floor(),
                call.operation,
                call.once,
            )
        step.send.append((line.home, message))

    def _do_resend(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        self._send_request(step, line)  # the timer that watches the request goes on by itself

    def _send_backup(self, step: Step, line: Line, change: Change) -> None:
        record = change.record
        step.send.append((line.home, Backup(
            line.key, line.number, change.call.operation_id, self._floor(), record.value,
            record.version, record.expires_ms, change.outcome,
        )))  # fmt: skip

    def _floor(self) -> int:
        return next(iter(self._unresolved), self._next_operation)

    def _do_send_put(self, step: Step, line: Line, before: State, _: Message | None) -> None:
        if before is State.M:
            self._counts.writebacks += 1
        self._send_put_again(step, line)

    def _send_put_again(self, step: Step, line: Line) -> None:
        kind = {State.MI_A: "M", State.EI_A: "E"}.get(line.state, "S")
        step.send.append((line.home, Put(line.key, line.number, kind)))  # type: ignore[arg-type]  # one of the three
        self._arm(step, line, Event.EVICT, line.number)

    def _do_kill(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        if line.request is not None and isinstance(message, Inv | Fetch):
            line.request.killed = max(line.request.killed, message.number)
            line.request.cutoff_token = min(line.request.cutoff_token, self._next_token)

    def _do_drop(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        """The copy goes, and its slot. Changes under way go back to the head of the queue: asked
        for again under the same operation ids, they happen once whichever way they get through."""
        if isinstance(message, Inv | Fetch):
            self._counts.invalidations_received += 1
        self.lines.remove(line)
        line.session.lines -= 1
        line.put_until_ms = max(line.until_ms, line.session.until_ms)
        line.record, line.until_ms, line.stop_ms = ABSENT, 0.0, NEVER
        if line.changes:
            again = [
                c
                for change in line.changes
                for c in (change.call, *(f for f, _ in change.followers))
            ]
            self._counts.refetches += len(again)
            line.changes.clear()
            line.waiting.extendleft(reversed(again))

    def _do_ack_inv(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        if isinstance(message, Inv):
            step.send.append((line.home, InvAck(line.key, message.number)))

    def _do_ack_gone(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        if isinstance(message, Fetch):
            step.send.append((line.home, FetchAck(line.key, message.number, False)))

    def _do_ack_kept(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        if isinstance(message, Fetch):
            if before is State.M:
                self._counts.writebacks += 1
            line.number = message.number
            step.send.append((line.home, FetchAck(line.key, message.number, True)))

    def _do_install(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        # The check against killed numbers stands in _data_event, in this same turn: nothing can
        # come between it and these lines.
        request = line.request
        if request is None or not isinstance(message, Grant):
            return
        if before not in READABLE:
            while len(self.lines) >= self._settings.capacity:
                victim = self.lines.victim()
                self._counts.evictions += 1
                self._fire(step, victim, Event.EVICT, None)
            self.lines.add(line)
            if not line.session.lines:
                # The first of them brings its own lease, so there is nothing to renew yet.
                line.session.renew_sent = max(line.session.renew_sent, request.first_ms)
            line.session.lines += 1
        line.record = Record(message.value, message.version, message.expires_ms)
        line.number = message.number
        line.until_ms = request.first_ms + usable_ms(message.lease_ms)
        line.stop_ms = NEVER
        if message.ttl_left_ms:
            line.stop_ms = request.first_ms + usable_ms(message.ttl_left_ms)

    def _do_serve_once(
        self, step: Step, line: Line, before: State, message: Message | None
    ) -> None:
        """Data that was true while these readers waited, but may not be kept. Whoever joined after
        it was known to be dead gets a new fetch: for him it may be an old value."""
        request = line.request
        if request is None or not isinstance(message, Grant) or message.value is None:
            return
        self._counts.use_once += 1
        until_ms = request.first_ms + usable_ms(message.lease_ms)
        if message.ttl_left_ms:
            until_ms = min(until_ms, request.first_ms + usable_ms(message.ttl_left_ms))
        for call in line.waiting:
            entitled = call.token < request.first_token or (
                call.token < request.cutoff_token and call.joined_ms < until_ms
            )
            if call.operation is None and not call.done and entitled:
                self._answer_read(
                    step,
                    call,
                    Found(message.value, message.version, "I", False, message.expires_ms),
                )

    def _do_serve_none(
        self, step: Step, line: Line, before: State, message: Message | None
    ) -> None:
        """No copy was granted, so the home tells nobody when the key comes into being: the answer
        is good only for those who waited before the question was sent."""
        request = line.request
        if request is None:
            return
        for call in line.waiting:
            if call.operation is None and not call.done and call.token < request.first_token:
                self._answer_read(step, call, Missing())

    def _do_settle(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        line.request = None

    def _do_write(self, step: Step, line: Line, before: State, message: Message | None) -> None:
        change = line.changes.popleft()
        line.record, line.stop_ms = change.record, change.stop_ms

    def _session(self, home: str) -> Session:
        session = self.sessions.get(home)
        if session is None:
            session = self.sessions[home] = Session(self._incarnations.get(home, 0))
        return session


_Action = Callable[[Requester, Step, Line, State, Message | None], None]
_DOES: dict[Do, _Action] = {
    Do.SEND_GETS: Requester._do_send_request,
    Do.SEND_GETM: Requester._do_send_request,
    Do.SEND_PUT: Requester._do_send_put,
    Do.RESEND: Requester._do_resend,
    Do.KILL: Requester._do_kill,
    Do.DROP: Requester._do_drop,
    Do.ACK_INV: Requester._do_ack_inv,
    Do.ACK_GONE: Requester._do_ack_gone,
    Do.ACK_KEPT: Requester._do_ack_kept,
    Do.INSTALL: Requester._do_install,
    Do.SERVE_ONCE: Requester._do_serve_once,
    Do.SERVE_NONE: Requester._do_serve_none,
    Do.SETTLE: Requester._do_settle,
    Do.WRITE: Requester._do_write,
}
