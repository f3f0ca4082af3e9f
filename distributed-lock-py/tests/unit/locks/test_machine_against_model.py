"""The machine and the naive model get the same commands and must agree after each one."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec.structs import replace

from lock_manager.core.locks import invariants, machine, snapshot
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    Cancel,
    ForceRelease,
    Keepalive,
    LeaderStarted,
    LockType,
    Release,
    ReleaseAll,
    Undelivered,
    decode_batch,
    encode_batch,
    fingerprint,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import (
    Acquired,
    AlreadyWaiting,
    Deadlock,
    Held,
    KindMismatch,
    LeaseLost,
    NotHeld,
    Queued,
    Released,
    ReleasedMany,
    Renewed,
    RequestReused,
    TimedOut,
)

from .naive_model import NaiveLocks

CLIENTS = ["ann", "bob", "cyd", "dan"]
LOCKS = ["a", "b", "c"]
clients = st.sampled_from(CLIENTS)
lock_names = st.sampled_from(LOCKS)
# Lock `c` is mostly a semaphore; now and then somebody mistakes it for a lock.
plain = st.tuples(
    st.sampled_from(["a", "a", "b", "b", "c"]),
    st.sampled_from(["exclusive", "shared"]),
    st.just(0),
    st.just(0),
)
semaphore = st.tuples(
    st.just("c"), st.just("semaphore"), st.integers(1, 3), st.sampled_from([3, 3, 3, 4])
)
ask = st.one_of(plain, plain, semaphore)
asks = st.one_of(
    ask.map(lambda one: (one,)),
    ask.map(lambda one: (one,)),
    st.lists(ask, min_size=2, max_size=3, unique_by=lambda one: one[0]).map(tuple),
)
requests = st.sampled_from(["", "", "", "r1", "r2"])
waits = st.sampled_from([0, 300, 5_000, 30_000, 30_000])
ttls = st.sampled_from([0, 0, 200, 2_000])


def sketch(reply: Any, births: dict[tuple[str, str], list[int]]) -> tuple[Any, ...]:
    """A machine's reply in the model's words. Tokens are checked elsewhere."""
    match reply:
        case Acquired():
            return ("acquired", tuple((g.lock_name, g.origin) for g in reply.locks))
        case Held():
            return ("held",)
        case TimedOut():
            return ("timeout",)
        case LeaseLost():
            return ("lost",)
        case KindMismatch():
            return ("mismatch", reply.lock_name)
        case AlreadyWaiting():
            return ("waiting",)
        case RequestReused():
            return ("reused",)
        case Released():
            return ("released",)
        case NotHeld():
            return ("not held",)
        case ReleasedMany():
            return ("released many", reply.count)
        case Renewed():
            return ("renewed", reply.locks, set(reply.lost))
        case Queued():
            return ("queued", reply.ticket)
    raise AssertionError(reply)


class MachineAgainstModel(RuleBasedStateMachine):
    ends_at_once = machine.ENDS_AT_ONCE

    def __init__(self) -> None:
        super().__init__()
        self.machine = LockMachine()
        self.model = NaiveLocks()
        self.index = 0
        self.at_ms = 0
        self.step_ms = 0
        self.tokens: set[int] = set()  # of grants, ever
        self.writer: snapshot.SnapshotWriter | None = None
        self.sent: list[Any] = []  # acquires with a request id
        # The model counts births of holds, the machine names them by their first token.
        self.origins: dict[int, int] = {}

    # ---- feeding both

    def apply(self, *commands: Any, delay: int = 0) -> list[Any]:
        self.index += 1
        self.at_ms += self.step_ms
        self.step_ms = 0
        self.model.resolved.clear()
        self.model.ended.clear()
        batch = Batch(self.at_ms, list(commands), delay)
        before = self.machine.table.token
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "ENDS_AT_ONCE", self.ends_at_once)
            outcomes = self.machine.apply(self.index, decode_batch(encode_batch(batch)))
            assert len(outcomes.answers) == len(commands)
            self.catch_up(outcomes, Batch(self.at_ms, [], delay))
        self.model.advance(self.at_ms, delay)
        self.outcomes, self.before = outcomes, before
        return outcomes.answers

    def catch_up(self, outcomes: Any, stamp: Batch) -> None:
        """What was over but too much for one entry ends with the next ones."""
        while outcomes.expired and (due := self.machine.next_due_ms()) is not None:
            if due > self.at_ms:
                return
            self.index += 1
            more = self.machine.apply(self.index, stamp)
            outcomes.resolutions += more.resolutions
            outcomes.expired += more.expired

    def compare(self, answer: Any, expected: Any) -> None:
        if isinstance(answer, Deadlock):
            assert expected[0] == "deadlock", expected
            self.check_cycle(answer.cycle, expected[1])
        else:
            self.same(answer, expected)

    def same(self, reply: Any, expected: Any) -> None:
        got = sketch(reply, {})
        if got[0] == expected[0] == "acquired":
            assert [lock for lock, _ in got[1]] == [lock for lock, _ in expected[1]]
            for (_, origin), (_, born) in zip(got[1], expected[1], strict=True):
                assert self.origins.setdefault(born, origin) == origin
        else:
            assert got == expected

    def check_cycle(self, cycle: tuple[str, ...], edges: set[tuple[str, str]]) -> None:
        assert len(set(cycle)) == len(cycle) > 1
        for one, next_one in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            assert (one, next_one) in edges

    def compare_rest(self) -> None:
        got = {t: r.reply for r in self.outcomes.resolutions for t in r.tickets}
        expected = dict(self.model.resolved)
        assert got.keys() == expected.keys()
        for ticket, reply in got.items():
            self.same(reply, expected[ticket])
        ended = {(e.lock_name, e.client_id, e.reaped) for e in self.outcomes.expired}
        assert ended == set(self.model.ended)
        # Guarantee 2: whatever was granted in this entry has a token above all before.
        fresh = {h.token for h in self.holds() if h.token not in self.tokens}
        assert all(token > self.before for token in fresh)
        self.tokens |= fresh

    def holds(self) -> list[Any]:
        return [h for lock in self.machine.table.locks.values() for h in lock.each_hold()]

    # ---- rules

    @initialize(leaders=st.integers(0, 1))
    def begin(self, leaders: int) -> None:
        for _ in range(leaders):
            self.leader_started()

    @rule(client=clients, asks=asks, wait=waits, ttl=ttls, request=requests)
    def acquire_anything(self, client: str, asks: Any, wait: int, ttl: int, request: str) -> None:
        self.acquire(client, asks, wait, ttl, request)

    def acquire(self, client: str, asks: Any, wait: int, ttl: int, request: str) -> None:
        wanted = tuple(Ask(name, LockType(kind), p, limit) for name, kind, p, limit in asks)
        command = Acquire(client, wanted, wait, ttl, request)
        command = replace(command, fingerprint=fingerprint(command))
        ticket = self.machine.next_ticket
        answer = self.apply(command)[0]
        expected = self.model.acquire(client, asks, wait, ttl, request, ticket)
        self.compare(answer, expected)
        self.compare_rest()
        if isinstance(answer, Deadlock) and request:
            self.model.answers[client, request][1] = ("deadlock", expected[1])

        if request:
            self.sent = [*self.sent[-3:], (client, asks, wait, ttl, request)]

    @rule(data=st.data())
    def retry(self, data: Any) -> None:
        if self.sent:
            self.acquire(*data.draw(st.sampled_from(self.sent)))

    @rule(client=clients, lock=lock_names, which=st.sampled_from("aacs"), request=requests)
    def release(self, client: str, lock: str, which: str, request: str) -> None:
        hold = self.machine.table.hold_of(lock, client)
        token = {"a": 0, "c": hold.token if hold else 999_999, "s": 999_999}[which]
        command = Release(client, lock, token, request)
        command = replace(command, fingerprint=fingerprint(command))
        answer = self.apply(command)[0]
        hold_after = self.model.held(lock, client)
        current = which == "c" and hold is not None and hold_after is not None
        self.compare(answer, self.model.release(client, lock, token, current, request))
        self.compare_rest()

    @rule(client=clients)
    def release_all(self, client: str) -> None:
        self.compare(self.apply(ReleaseAll(client))[0], self.model.release_all(client))
        self.compare_rest()

    @rule(client=clients, ttl=ttls)
    def keepalive(self, client: str, ttl: int) -> None:
        self.compare(self.apply(Keepalive(client, ttl))[0], self.model.keepalive(client, ttl))
        self.compare_rest()

    @rule(lock=lock_names, client=st.sampled_from(["", *CLIENTS]))
    def force_release(self, lock: str, client: str) -> None:
        answer = self.apply(ForceRelease(lock, "because", client))[0]
        self.compare(answer, self.model.force_release(lock, client))
        self.compare_rest()

    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.sampled_from([*self.machine.tickets, 999_999]))
        self.apply(Cancel(number))
        self.model.cancel(number)
        self.compare_rest()

    @rule(data=st.data())
    def undelivered(self, data: Any) -> None:
        holds = self.holds()
        if holds:
            hold = data.draw(st.sampled_from(holds))
            self.apply(Undelivered(hold.client_id, {hold.lock_name: hold.token}))
            self.model.undelivered(hold.client_id, [hold.lock_name])
            self.compare_rest()

    @rule()
    def leader_started(self) -> None:
        self.apply(LeaderStarted())
        self.model.leader_started()
        self.compare_rest()

    @rule(ms=st.sampled_from([1, 150, 400, 2_500, 10_000, 700_000]))
    def time_will_have_passed(self, ms: int) -> None:
        self.step_ms += ms

    @rule(delay=st.sampled_from([0, 0, 1_000]))
    def stamp(self, delay: int) -> None:
        self.apply(delay=delay)
        self.compare_rest()

    @rule()
    def time_to_the_next_deadline(self) -> None:
        due = self.machine.next_due_ms()
        if due is not None:
            assert due > self.machine.now_ms
            self.step_ms += max(0, due - self.at_ms)
            self.stamp(0)

    @precondition(lambda self: self.writer is None)
    @rule()
    def a_snapshot_begins(self) -> None:
        self.expected = snapshot.encode(self.machine)
        self.writer = snapshot.SnapshotWriter(self.machine)

    @precondition(lambda self: self.writer is not None)
    @rule()
    def a_snapshot_is_what_it_was_when_it_began(self) -> None:
        while self.writer.step():
            pass
        assert self.writer.data() == self.expected
        self.writer = None

    @rule()
    def restart_from_a_snapshot(self) -> None:
        self.writer = None
        data = snapshot.encode(self.machine)
        restored = snapshot.restore(data)
        assert snapshot.encode(restored) == data
        self.machine = restored

    # ---- after every rule

    @invariant()
    def machine_is_consistent(self) -> None:
        invariants.check(self.machine)

    @invariant()
    def tables_are_equal(self) -> None:
        got = {
            (h.lock_name, h.client_id, str(lock.type_of(h.weight)), h.ttl_ms, h.expires_ms)
            for lock in self.machine.table.locks.values()
            for h in lock.each_hold()
        }
        expected = {(h.lock, h.client, h.type, h.ttl, h.expires) for h in self.model.holdings}
        assert got == expected
        for name in LOCKS:
            lock = self.machine.table.locks.get(name)
            queue = [p.waiter.client_id for p in lock.places()] if lock else []
            assert queue == [wait.client for wait in self.model.line(name)]


class MachineThatLags(MachineAgainstModel):
    """As if masses of leases ended together: one entry ends one of them."""

    ends_at_once = 1


MachineAgainstModel.TestCase.settings = MachineThatLags.TestCase.settings = settings(
    max_examples=int(os.environ.get("MODEL_RUNS", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestMachineAgainstModel = MachineAgainstModel.TestCase
TestMachineThatLags = MachineThatLags.TestCase
