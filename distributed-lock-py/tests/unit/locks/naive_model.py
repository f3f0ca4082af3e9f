"""The lock service as one would explain it at a whiteboard: lists, loops, no index, no weights.

Written against the guarantees in README.md and not against the machine's code; the property test
drives both with the same commands and compares. It predicts everything but the numbers of tokens
and tickets, and which cycle of several is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RETAIN, GRACE = 600_000, 10_000

Ask = tuple[str, str, int, int]  # lock name, type, permits, limit


@dataclass
class Holding:
    lock: str
    client: str
    type: str
    permits: int
    limit: int
    born: int  # counts grants; conversions keep it
    told: int = 1
    ttl: int = 0
    expires: int = 0
    reap: int = 0


@dataclass
class Wait:
    client: str
    asks: tuple[Ask, ...]
    ttl: int
    converts: set[str]  # locks that the client held when it came
    tickets: list[Any] = field(default_factory=list)  # [number, request key, deadline, epoch]


class NaiveLocks:
    def __init__(self) -> None:
        self.now = 0
        self.epoch = 0
        self.births = 0
        self.holdings: list[Holding] = []  # in order of first grant
        self.waits: list[Wait] = []  # in order of arrival
        self.delays: dict[str, int] = {}
        self.lost: dict[tuple[str, str], int] = {}
        self.answers: dict[tuple[str, str], Any] = {}  # [body, answer or None, forget at]
        self.sweeps: list[tuple[int, int]] = []
        self.resolved: list[tuple[Any, Any]] = []  # (ticket number, answer)
        self.ended: list[tuple[str, str, bool]] = []  # (lock, client, reaped)

    # ------------------------------------------------------------------------------ looking up

    def held(self, lock: str, client: str) -> Holding | None:
        found = [h for h in self.holdings if (h.lock, h.client) == (lock, client)]
        return found[0] if found else None

    def line(self, lock: str) -> list[Wait]:
        there = [w for w in self.waits if any(a[0] == lock for a in w.asks)]
        return [w for w in there if lock in w.converts] + [
            w for w in there if lock not in w.converts
        ]

    @staticmethod
    def ask_for(wait: Wait, lock: str) -> Ask:
        return next(a for a in wait.asks if a[0] == lock)

    def compatible(self, claims: list[tuple[str, str, int]], limit: int) -> bool:
        """claims: (client, type, permits); several of one client count as its largest."""
        most: dict[str, tuple[str, int]] = {}
        for client, type_, permits in claims:
            old = most.get(client, ("", 0))
            if type_ == "semaphore":
                most[client] = (type_, max(old[1], permits))
            elif old[0] != "exclusive":
                most[client] = (type_, 0)
        if limit:
            return sum(permits for _, permits in most.values()) <= limit
        exclusive = [client for client, (type_, _) in most.items() if type_ == "exclusive"]
        return not exclusive or len(most) == 1

    def claims(self, lock: str, before: Wait | None, without: set[str]) -> list[Any]:
        claims = [
            (h.client, h.type, h.permits)
            for h in self.holdings
            if h.lock == lock and h.client not in without
        ]
        for wait in self.line(lock):
            if wait is before:
                break
            if wait.client not in without:
                ask = self.ask_for(wait, lock)
                claims.append((wait.client, ask[1], ask[2]))
        return claims

    def satisfied(self, client: str, ask: Ask, before: Wait | None, without: set[str]) -> bool:
        hold = self.held(ask[0], client)
        if hold and (hold.type == ask[1] if not ask[3] else hold.permits >= ask[2]):
            return True
        if hold and hold.type == "exclusive":
            return True
        claims = self.claims(ask[0], before, without)
        return self.compatible([*claims, (client, ask[1], ask[2])], ask[3])

    def may_enter(self, wait: Wait) -> bool:
        for ask in wait.asks:
            if not self.satisfied(wait.client, ask, wait, set()):
                return False
            hold = self.held(ask[0], wait.client)
            grows = hold is None or (hold.type, hold.permits) != (ask[1], ask[2])
            shrinks = hold is not None and (
                hold.type == "exclusive" or (ask[3] and hold.permits > ask[2])
            )
            if grows and not shrinks and ask[0] in self.delays:
                return False
        return True

    # ------------------------------------------------------------------------------- deadlocks

    def stuck(self) -> set[str]:
        """Clients that remain when whoever can go on has been taken away."""
        without: set[str] = set()
        everybody = {h.client for h in self.holdings} | {w.client for w in self.waits}
        while True:
            free = {
                client
                for client in everybody - without
                if all(
                    self.satisfied(client, ask, wait, without)
                    for wait in self.waits
                    if wait.client == client
                    for ask in wait.asks
                )
            }
            if not free:
                return everybody - without
            without |= free

    def blocks(self, waiter: str, other: str) -> bool:
        for wait in self.waits:
            if wait.client != waiter:
                continue
            for ask in wait.asks:
                if self.satisfied(waiter, ask, wait, set()):
                    continue
                claims = self.claims(ask[0], wait, set())
                for client, type_, permits in claims:
                    pair = [(client, type_, permits), (waiter, ask[1], ask[2])]
                    if client == other and (ask[3] or not self.compatible(pair, 0)):
                        return True
        return False

    # -------------------------------------------------------------------------------- commands

    def acquire(
        self, client: str, asks: tuple[Ask, ...], wait: int, ttl: int, request: str, ticket: int
    ) -> Any:
        """`ticket`: the number to use if it has to wait. Answers are tuples, told apart by their
        first element."""
        body = (asks, wait, ttl)
        if request and (client, request) in self.answers:
            return self.retry(client, request, body)
        for key in [key for key in self.lost if key[0] == client]:
            del self.lost[key]
        answer = self.decide(client, asks, wait, ttl, request, ticket)
        if request:
            waiting = answer[0] == "queued"
            self.answers[client, request] = [
                body,
                None if waiting else answer,
                None if waiting else self.now + RETAIN,
            ]
        self.let_in()
        return answer

    def retry(self, client: str, request: str, body: Any) -> Any:
        known = self.answers[client, request]
        if known[0] != body:
            return ("reused",)
        if known[1] is None:
            for wait in self.waits:
                for ticket in wait.tickets:
                    if wait.client == client and ticket[1] == request:
                        ticket[3] = self.epoch
                        return ("queued", ticket[0])
        if known[1][0] != "acquired":
            return known[1]
        holds = [(born, self.held(lock, client)) for lock, born in known[1][1]]
        if any(hold is None or hold.born != born for born, hold in holds):
            return ("lost",)
        for _, hold in holds:
            hold.told, hold.reap = hold.told + 1, 0
        return known[1]

    def decide(
        self, client: str, asks: tuple[Ask, ...], wait: int, ttl: int, request: str, ticket: int
    ) -> Any:
        for lock, _, _, limit in asks:
            used = [h.limit for h in self.holdings if h.lock == lock]
            used += [self.ask_for(w, lock)[3] for w in self.line(lock)]
            if used and used[0] != limit:
                return ("mismatch", lock)
        kept = [self.held(a[0], client) for a in asks]
        same = all(
            h is not None and (h.type, h.permits) == (a[1], a[2])
            for h, a in zip(kept, asks, strict=True)
        )
        probe = Wait(client, asks, ttl, {a[0] for a in asks if self.held(a[0], client)})
        if not same:
            mine = [
                w
                for a in asks
                for w in self.waits
                if w.client == client and any(b[0] == a[0] for b in w.asks)
            ]
            if mine:
                if not wait:
                    return ("held",)
                if mine[0].asks != asks:
                    return ("waiting",)
                mine[0].tickets.append([ticket, request, self.now + wait, self.epoch])
                return ("queued", ticket)
            self.waits.append(probe)
            enters = self.may_enter(probe)
            if not enters and wait and client in self.stuck():
                cycle_edges = {
                    (a, b)
                    for a in self.stuck()
                    for b in self.stuck()
                    if a != b and self.blocks(a, b)
                }
                self.waits.remove(probe)
                return ("deadlock", cycle_edges)
            if not enters and wait:
                probe.tickets.append([ticket, request, self.now + wait, self.epoch])
                return ("queued", ticket)
            self.waits.remove(probe)
            if not enters:
                return ("held",)
        return self.give(client, asks, ttl, told=1)

    def give(self, client: str, asks: tuple[Ask, ...], ttl: int, told: int) -> Any:
        born = []
        for lock, type_, permits, limit in asks:
            hold = self.held(lock, client)
            if hold is None:
                self.births += 1
                hold = Holding(lock, client, type_, permits, limit, self.births, told)
                hold.reap = 0 if told else self.now + GRACE
                self.holdings.append(hold)
            else:
                hold.type, hold.permits = type_, permits
                hold.told += told
                hold.reap = 0 if hold.told else hold.reap
            if ttl:
                hold.ttl, hold.expires = ttl, self.now + ttl
            born.append((lock, hold.born))
        return ("acquired", tuple(born))

    def let_in(self) -> None:
        while ready := [w for w in self.waits if self.may_enter(w)]:
            wait = ready[0]
            self.waits.remove(wait)
            told = int(any(t[3] == self.epoch for t in wait.tickets))
            answer = self.give(wait.client, wait.asks, wait.ttl, told)
            for ticket in wait.tickets:
                self.resolve(wait, ticket, answer)

    def resolve(self, wait: Wait, ticket: Any, answer: Any) -> None:
        self.resolved.append((ticket[0], answer))
        if ticket[1]:
            known = self.answers[wait.client, ticket[1]]
            known[1], known[2] = answer, self.now + RETAIN

    def drop(self, hold: Holding) -> None:
        for wait in list(self.waits):
            if wait.client == hold.client and any(a[0] == hold.lock for a in wait.asks):
                self.waits.remove(wait)
                for ticket in wait.tickets:
                    self.resolve(wait, ticket, ("lost",))
        self.holdings.remove(hold)

    def release(self, client: str, lock: str, token: int, current: bool, request: str) -> Any:
        """`token` 0: any; `current`: whether that token is of the client's present hold."""
        body = ("release", lock, token)
        if request and (client, request) in self.answers:
            known = self.answers[client, request]
            return known[1] if known[0] == body and known[1] else ("reused",)
        hold = self.held(lock, client)
        answer: Any = ("not held",)
        if hold is not None and (current or not token):
            self.drop(hold)
            answer = ("released",)
        if request:
            self.answers[client, request] = [body, answer, self.now + RETAIN]
        self.let_in()
        return answer

    def release_all(self, client: str) -> Any:
        mine = [h for h in self.holdings if h.client == client]
        for hold in mine:
            self.drop(hold)
        self.let_in()
        return ("released many", len(mine))

    def keepalive(self, client: str, ttl: int) -> Any:
        leased = [h for h in self.holdings if h.client == client and h.ttl]
        for hold in leased:
            hold.ttl = ttl or hold.ttl
            hold.expires = self.now + hold.ttl
        return ("renewed", len(leased), {lock for c, lock in self.lost if c == client})

    def lose(self, hold: Holding) -> None:
        self.lost[hold.client, hold.lock] = self.now + RETAIN
        self.drop(hold)

    def force_release(self, lock: str, client: str) -> Any:
        chosen = [h for h in self.holdings if h.lock == lock and client in ("", h.client)]
        for hold in chosen:
            self.lose(hold)
        self.let_in()
        return ("released many", len(chosen))

    def undelivered(self, client: str, locks: list[str]) -> None:
        for lock in locks:
            hold = self.held(lock, client)
            if hold is not None and hold.told:
                hold.told -= 1
                hold.reap = 0 if hold.told else self.now + GRACE

    def end_tickets(self, ended: Any, answer: Any) -> None:
        """Take away the tickets for which `ended(ticket)`; without an answer they are forgotten."""
        for wait in list(self.waits):
            for ticket in list(wait.tickets):
                if ended(ticket):
                    wait.tickets.remove(ticket)
                    if answer:
                        self.resolve(wait, ticket, answer)
                    elif ticket[1]:
                        del self.answers[wait.client, ticket[1]]
            if not wait.tickets:
                self.waits.remove(wait)

    def cancel(self, number: int) -> None:
        self.end_tickets(lambda ticket: ticket[0] == number, None)
        self.let_in()

    def leader_started(self) -> None:
        self.epoch += 1
        if self.waits:
            self.sweeps.append((self.now + GRACE, self.epoch))

    def advance(self, now: int, delay: int) -> None:
        if now <= self.now:
            return
        self.now = now
        self.answers = {k: a for k, a in self.answers.items() if a[2] is None or a[2] > now}
        self.lost = {k: until for k, until in self.lost.items() if until > now}
        self.end_tickets(lambda ticket: ticket[2] <= now, ("timeout",))
        for _, epoch in [s for s in self.sweeps if s[0] <= now]:
            self.end_tickets(lambda ticket, epoch=epoch: ticket[3] < epoch, None)
        self.sweeps = [s for s in self.sweeps if s[0] > now]
        for hold in list(self.holdings):
            if 0 < hold.expires <= now:
                self.ended.append((hold.lock, hold.client, False))
                self.lose(hold)
                if delay:
                    self.delays[hold.lock] = now + delay
            elif 0 < hold.reap <= now:
                self.ended.append((hold.lock, hold.client, True))
                self.drop(hold)
        self.delays = {lock: at for lock, at in self.delays.items() if at > now}
        self.let_in()
