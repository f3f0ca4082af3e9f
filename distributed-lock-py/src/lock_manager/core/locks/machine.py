"""The replicated lock machine: the same batches in the same order give the same state and the same
answers on every node.

`apply(index, batch)` is the only way to change it. First cluster time moves to the batch's stamp
and everything that this ends is ended: waits before leases, so that nobody is let in after its
`wait_ms`. Then come the commands, and after each one whoever may now be let in is let in, within
the same log entry: handing a lock over costs no second entry and no polling.

The guarantees that are numbered in comments are those of the README.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import assert_never

from lock_manager.core.locks.commands import (
    Acquire,
    Batch,
    Cancel,
    Command,
    ForceRelease,
    Keepalive,
    LeaderStarted,
    Release,
    ReleaseAll,
    Undelivered,
    why_malformed,
)
from lock_manager.core.locks.deadlock import find_cycle
from lock_manager.core.locks.replies import (
    Acquired,
    AlreadyWaiting,
    Deadlock,
    Done,
    Expired,
    Granted,
    Held,
    KindMismatch,
    LeaseLost,
    Malformed,
    NotHeld,
    Outcomes,
    Queued,
    Released,
    ReleasedMany,
    Renewed,
    Reply,
    RequestReused,
    Resolution,
    TimedOut,
    TooManyRequests,
)
from lock_manager.core.locks.requests import RETAIN_MS, Remembered, Requests, request_key
from lock_manager.core.locks.state import Hold, Ticket, Waiter, weight_of
from lock_manager.core.locks.table import GRACE_MS, LockTable
from lock_manager.core.locks.timers import Timers

# Leases that one log entry ends (some 7 µs each), and remembered answers that it forgets. What is
# over beyond that follows with the next entries, so that a mass that ends together stops nobody.
ENDS_AT_ONCE = 1_000
FORGET_AT_ONCE = 20_000


class LockMachine:
    def __init__(self) -> None:
        self.applied_index = 0
        self.table = LockTable()
        self.requests = Requests()
        self.next_ticket = 1
        self.epoch = 0  # leaders so far
        # Every request that waits; those whose connection was known longest ago come first.
        self.tickets: OrderedDict[int, Ticket] = OrderedDict()
        self.deadlines: Timers[Ticket] = Timers()
        # (when, epoch): tickets of earlier epochs are given up then.
        self.sweeps: deque[tuple[int, int]] = deque()
        # (until, client, lock): what `keepalive` reports as lost; oldest first.
        self.lost: deque[tuple[int, str, str]] = deque()
        self._out = Outcomes([], [], [])
        self._lock_delay_ms = 0  # of the batch that is being applied

    @property
    def now_ms(self) -> int:
        """Cluster time of the last applied batch."""
        return self.table.now_ms

    def next_due_ms(self) -> int | None:
        """Cluster time before which nothing ends by itself; None: nothing will. A leader proposes
        a stamp when it is reached."""
        dues = (
            self.deadlines.next_ms(),
            self.table.ends.next_ms(),
            self.table.delays.next_ms(),
            self.sweeps[0][0] if self.sweeps and self.tickets else None,
        )
        return min((due for due in dues if due is not None), default=None)

    def apply(self, index: int, batch: Batch) -> Outcomes:
        """Apply the log's entry `index` (each once, in order). Total: no batch makes it fail."""
        self._out = out = Outcomes([], [], [])
        self._lock_delay_ms = batch.lock_delay_ms
        self._advance(batch.at_ms)
        for command in batch.commands:
            if self._lagging:
                self._end_what_is_over(command)
            out.answers.append(self._dispatch(command))
            if not self.table.is_tidy:
                self._let_in()
        self.applied_index = index
        return out

    def _dispatch(self, command: Command) -> Reply | Queued:
        match command:
            case Acquire():
                return self._acquire(command)
            case Release():
                return self._release(command)
            case ReleaseAll():
                return self._release_all(command)
            case Keepalive():
                return self._keepalive(command)
            case Cancel():
                return self._cancel(command)
            case Undelivered():
                return self._undelivered(command)
            case ForceRelease():
                return self._force_release(command)
            case LeaderStarted():
                return self._leader_started()
            case _:
                assert_never(command)

    # --------------------------------------------------------------------------------------- time

    @property
    def _lagging(self) -> bool:
        """Whether there are holds whose time is over and that were not ended yet: too many are over
        at once. Who touches one finds it gone all the same."""
        due = self.table.ends.next_ms()
        return due is not None and due <= self.now_ms

    def _advance(self, at_ms: int) -> None:
        table = self.table
        if at_ms > table.now_ms:
            table.now_ms = at_ms
        elif not self._lagging:
            return
        now = table.now_ms
        self.requests.forget_until(now, FORGET_AT_ONCE)
        self._forget_lost(now, FORGET_AT_ONCE)
        for ticket in self.deadlines.take_due(now):
            waiter = table.waiters[ticket.waiter_id]
            self._end_ticket(ticket, TimedOut(waiter.asks[0].lock_name))
        while self.sweeps and self.sweeps[0][0] <= now:
            self._give_up_before(self.sweeps.popleft()[1])
        for hold in table.ends.take_due(now, ENDS_AT_ONCE):
            self._end(hold)
        for lock in table.delays.take_due(now, ENDS_AT_ONCE):
            table.end_delay(lock)
        self._let_in()

    def _end(self, hold: Hold) -> None:
        """The hold's time is over: its lease, or the wait for somebody who claims it."""
        reaped = not 0 < hold.expires_ms <= self.now_ms
        self._out.expired.append(Expired(hold.lock_name, hold.client_id, hold.token, reaped))
        if reaped:
            self._drop(hold)
        else:
            self._lose(hold, self._lock_delay_ms)

    def _end_what_is_over(self, command: Command) -> None:
        """Before a command looks at them: holds of its client, and on the locks that it names."""
        match command:
            case Acquire(client_id=client_id, asks=asks):
                self._end_over((client_id,), [ask.lock_name for ask in asks])
            case Release(client_id=client_id, lock_name=lock_name):
                self._end_over((client_id,), (lock_name,))
            case ReleaseAll(client_id=client_id) | Keepalive(client_id=client_id):
                self._end_over((client_id,))
            case ForceRelease(lock_name=lock_name):
                self._end_over((), (lock_name,))
            case Cancel() | Undelivered() | LeaderStarted():
                pass
            case _:
                assert_never(command)

    def _end_over(self, clients: Iterable[str], locks: Iterable[str] = ()) -> bool:
        """Ends what is over of these clients and locks; whether there was anything."""
        table = self.table
        ended = False
        for one in (*map(table.clients.get, clients), *map(table.locks.get, locks)):
            over = [] if one is None else [hold for hold in one.each_hold() if table.is_over(hold)]
            for hold in sorted(over, key=lambda hold: (hold.due_ms, hold.order)):
                self._end(hold)
                ended = True
        return ended

    def _give_up_before(self, epoch: int) -> None:
        while self.tickets:
            ticket = next(iter(self.tickets.values()))
            if ticket.epoch >= epoch:
                return
            self._end_ticket(ticket, None)

    def _lose(self, hold: Hold, delay_ms: int = 0) -> None:
        """The client's hold ends without its doing: `keepalive` will tell."""
        until = self.table.now_ms + RETAIN_MS
        client = self.table.client(hold.client_id)
        if client.lost is None:
            client.lost = {}
        client.lost[hold.lock_name] = until
        self.lost.append((until, hold.client_id, hold.lock_name))
        self._drop(hold, delay_ms)

    def _forget_lost(self, now_ms: int, most: int) -> None:
        while self.lost and self.lost[0][0] <= now_ms and most:
            until, client_id, lock_name = self.lost.popleft()
            client = self.table.clients.get(client_id)
            if client is not None and client.lost and client.lost.get(lock_name) == until:
                most -= 1  # rows that mean nothing any more do not count: no snapshot has them
                del client.lost[lock_name]
                if not client.lost:
                    client.lost = None
                    self.table.tidy_client(client_id)

    # ------------------------------------------------------------------------------------ acquire

    def _acquire(self, command: Acquire) -> Reply | Queued:
        key = request_key(command.client_id, command.request_id)
        if key:
            known = self.requests.get(key)
            if known is not None:
                return self._again(command, known)
            if self.requests.full:
                return TooManyRequests()
        problem = why_malformed(command.asks)
        if problem:
            return Malformed(problem)
        client = self.table.clients.get(command.client_id)
        if client is not None and client.lost:
            client.lost = None
            self.table.tidy_client(command.client_id)
        answer = self._decide(command, key)
        if key:
            if isinstance(answer, Queued):
                self.requests.waits(key, command.fingerprint, answer.ticket)
            else:
                self.requests.answered(key, command.fingerprint, answer, self.now_ms)
        return answer

    def _decide(self, command: Acquire, key: str) -> Reply | Queued:
        table, client_id, asks = self.table, command.client_id, command.asks
        if len(asks) == 1 and asks[0].lock_name not in table.locks:  # nearly every request
            granted_one = table.grant_free(client_id, asks[0], command.ttl_ms)
            token = granted_one.fencing_token
            return Acquired(client_id, (granted_one,), token, command.ttl_ms or None)
        kept = 0
        for ask in asks:
            lock = table.locks.get(ask.lock_name)
            if lock is None:
                continue
            if lock.limit != ask.limit and (lock.holders or lock.waited_for):
                return KindMismatch(ask.lock_name, lock.limit)
            hold = lock.hold_of(client_id)
            kept += hold is not None and hold.weight == weight_of(ask)
        if kept < len(asks):
            for ask in asks:
                waiter = table.waiter_of(client_id, ask.lock_name)
                if waiter is not None:
                    return self._wait_too(command, key, waiter, ask.lock_name)
            if not all(table.fits_now(client_id, ask) for ask in asks):
                return self._wait(command, key)
        # Free, or held already: then the same tokens are told again (and a lease counted anew).
        granted = table.grant(client_id, asks, command.ttl_ms, told=1)
        return self._acquired(client_id, granted)

    def _acquired(self, client_id: str, granted: tuple[Granted, ...]) -> Acquired:
        expires = [
            hold.expires_ms - self.now_ms
            for hold in (self.table.hold_of(g.lock_name, client_id) for g in granted)
            if hold is not None and hold.ttl_ms
        ]
        token = max([g.fencing_token for g in granted])
        return Acquired(client_id, granted, token, min(expires) if expires else None)

    def _wait(self, command: Acquire, key: str) -> Reply | Queued:
        table = self.table
        if not command.wait_ms:
            return self._held(command)
        waiter = Waiter(
            self.next_ticket,
            command.client_id,
            command.asks,
            self.now_ms,
            command.ttl_ms,
            {},
        )
        table.enqueue(waiter)
        while cycle := find_cycle(table, command.client_id):
            if not (self._lagging and self._end_over(cycle)):
                table.dequeue(waiter)
                return Deadlock(cycle)
        return self._issue_ticket(waiter, key, command.wait_ms)

    def _wait_too(
        self, command: Acquire, key: str, waiter: Waiter, lock_name: str
    ) -> Reply | Queued:
        """Two waits of one client for one lock are one (guarantee 6)."""
        if not command.wait_ms:
            return self._held(command)
        if waiter.asks != command.asks:
            return AlreadyWaiting(lock_name)
        return self._issue_ticket(waiter, key, command.wait_ms)

    def _issue_ticket(self, waiter: Waiter, key: str, wait_ms: int) -> Queued:
        number = self.next_ticket
        self.next_ticket += 1
        ticket = Ticket(number, waiter.waiter_id, key, self.now_ms + wait_ms, self.epoch)
        waiter.tickets[number] = None
        self.tickets[number] = ticket
        self.deadlines.watch(ticket)
        return Queued(number)

    def _held(self, command: Acquire) -> Held:
        table = self.table
        for ask in command.asks:
            if not table.fits_now(command.client_id, ask):
                lock = table.locks[ask.lock_name]
                return Held(ask.lock_name, tuple(table.holders(lock, self.now_ms)))
        # Every lock would do, but the client already waits for one of them.
        return Held(command.asks[0].lock_name)

    def _again(self, command: Acquire, known: Remembered) -> Reply | Queued:
        """A retry gets the first answer and changes nothing (guarantee 5)."""
        if known.fingerprint != command.fingerprint:
            return RequestReused(command.request_id)
        if known.reply is None:
            ticket = self.tickets[known.ticket]
            ticket.epoch = self.epoch
            self.tickets.move_to_end(known.ticket)
            return Queued(known.ticket)
        reply = known.reply
        if not isinstance(reply, Acquired):
            return reply
        holds = [self.table.hold_of(g.lock_name, reply.client_id) for g in reply.locks]
        lost = tuple(
            granted.lock_name
            for granted, hold in zip(reply.locks, holds, strict=True)
            if hold is None or hold.origin != granted.origin
        )
        if lost:
            return LeaseLost(lost)
        for hold in holds:
            if hold is not None:
                self.table.claim(hold)
        return self._acquired(reply.client_id, reply.locks)

    # ------------------------------------------------------------------------------------ waiting

    def _let_in(self) -> None:
        while (waiter := self.table.take_grantable()) is not None:
            tickets = [self.tickets[number] for number in waiter.tickets]
            heard = any(ticket.epoch == self.epoch for ticket in tickets)
            self.table.dequeue(waiter)
            granted = self.table.grant(
                waiter.client_id, waiter.asks, waiter.ttl_ms, told=1 if heard else 0
            )
            self._resolve(tickets, self._acquired(waiter.client_id, granted))

    def _resolve(self, tickets: list[Ticket], reply: Reply) -> None:
        for ticket in tickets:
            self._drop_ticket(ticket)
            if ticket.request_key:
                self.requests.resolved(ticket.request_key, reply, self.now_ms)
        self._out.resolutions.append(
            Resolution(tuple([ticket.ticket_id for ticket in tickets]), reply)
        )

    def _end_ticket(self, ticket: Ticket, reply: Reply | None) -> None:
        """One request waits no longer; with it goes the place, if nobody else has it. Without a
        reply, the request is forgotten (guarantee 9)."""
        waiter = self.table.waiters[ticket.waiter_id]
        del waiter.tickets[ticket.ticket_id]
        if reply is not None:
            self._resolve([ticket], reply)
        else:
            self._drop_ticket(ticket)
            if ticket.request_key:
                self.requests.withdrawn(ticket.request_key)
        if not waiter.tickets:
            self.table.dequeue(waiter)

    def _drop_ticket(self, ticket: Ticket) -> None:
        del self.tickets[ticket.ticket_id]
        self.deadlines.forget(ticket)

    def _drop(self, hold: Hold, delay_ms: int = 0) -> None:
        """End a hold. A conversion that waited on it has nothing to convert any more."""
        waiter = self.table.waiter_of(hold.client_id, hold.lock_name)
        if waiter is not None:
            self.table.dequeue(waiter)
            tickets = [self.tickets[number] for number in waiter.tickets]
            self._resolve(tickets, LeaseLost((hold.lock_name,)))
        self.table.drop(hold, delay_ms)

    # ------------------------------------------------------------------------- the other commands

    def _release(self, command: Release) -> Reply:
        key = request_key(command.client_id, command.request_id)
        if key:
            known = self.requests.get(key)
            if known is not None:
                if known.fingerprint != command.fingerprint or known.reply is None:
                    return RequestReused(command.request_id)
                return known.reply
            if self.requests.full:
                return TooManyRequests()
        hold = self.table.hold_of(command.lock_name, command.client_id)
        reply: Reply
        if hold is None or command.fencing_token not in (0, hold.token):
            reply = NotHeld(command.lock_name, command.client_id)
        else:
            self._drop(hold)
            reply = Released(command.lock_name, command.client_id)
        if key:
            self.requests.answered(key, command.fingerprint, reply, self.now_ms)
        return reply

    def _release_all(self, command: ReleaseAll) -> Reply:
        client = self.table.clients.get(command.client_id)
        # By age, because the order of the client's own index does not survive a snapshot.
        holds = sorted(client.each_hold(), key=lambda hold: hold.order) if client else []
        for hold in holds:
            self._drop(hold)
        return ReleasedMany(len(holds))

    def _keepalive(self, command: Keepalive) -> Reply:
        client = self.table.clients.get(command.client_id)
        if client is None:
            return Renewed(0)
        # A lease that ended is gone already: time moved before this command (guarantee 8).
        renewed = self.table.renew_all(client, command.ttl_ms)
        return Renewed(renewed, tuple(client.lost or ()))

    def _cancel(self, command: Cancel) -> Reply:
        ticket = self.tickets.get(command.ticket)
        if ticket is not None:
            self._end_ticket(ticket, None)
        return Done()

    def _undelivered(self, command: Undelivered) -> Reply:
        for lock_name, token in command.fencing_tokens.items():
            hold = self.table.hold_of(lock_name, command.client_id)
            if hold is not None and hold.token == token:
                self.table.disclaim(hold)
        return Done()

    def _force_release(self, command: ForceRelease) -> Reply:
        lock = self.table.locks.get(command.lock_name)
        holds = list(lock.each_hold()) if lock is not None else []
        chosen = [h for h in holds if command.client_id in ("", h.client_id)]
        for hold in chosen:
            self._lose(hold)
        return ReleasedMany(len(chosen))

    def _leader_started(self) -> Reply:
        self.epoch += 1
        if self.tickets:
            self.sweeps.append((self.now_ms + GRACE_MS, self.epoch))
        return Done()
