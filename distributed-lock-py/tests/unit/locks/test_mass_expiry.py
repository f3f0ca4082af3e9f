"""Leases that end by the thousand at one instant: a bounded part of them an entry, and nobody sees
a hold whose time is over."""

from __future__ import annotations

import pytest

from lock_manager.core.locks import invariants, machine, snapshot, views
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    Command,
    Keepalive,
    Release,
    ReleaseAll,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import (
    Acquired,
    LeaseLost,
    NotHeld,
    Outcomes,
    Queued,
    ReleasedMany,
    Renewed,
)

MANY = 40
AT_ONCE = 4


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    monkeypatch.setattr(machine, "ENDS_AT_ONCE", AT_ONCE)
    return Crowd()


class Crowd:
    """Clients c0, c1 … hold locks l0, l1 … until cluster time 1000; w0, w1 … wait for them."""

    def __init__(self) -> None:
        self.machine = LockMachine()
        self.index = 0
        self.apply(0, *(self.leased(i) for i in range(MANY)))
        outcomes = self.apply(1, *(Acquire(f"w{i}", (Ask(f"l{i}"),), 60_000) for i in range(MANY)))
        self.tickets = [one.ticket for one in outcomes.answers if isinstance(one, Queued)]

    @staticmethod
    def leased(i: int) -> Acquire:
        return Acquire(f"c{i}", (Ask(f"l{i}"),), 0, 1_000, "r1", b"f")

    def apply(self, at_ms: int, *commands: Command) -> Outcomes:
        self.index += 1
        outcomes = self.machine.apply(self.index, Batch(at_ms, list(commands)))
        invariants.check(self.machine, lagging=len(outcomes.expired) >= AT_ONCE)
        return outcomes


def test_an_entry_ends_a_bounded_number_in_order_and_hands_those_over(crowd: Crowd) -> None:
    ended, told = [], []
    while (due := crowd.machine.next_due_ms()) is not None and due <= 1_000:
        outcomes = crowd.apply(1_000)
        assert len(outcomes.expired) == AT_ONCE
        ended += [one.lock_name for one in outcomes.expired]
        told += [ticket for one in outcomes.resolutions for ticket in one.tickets]
        assert all(isinstance(one.reply, Acquired) for one in outcomes.resolutions)
    assert ended == [f"l{i}" for i in range(MANY)]
    assert told == crowd.tickets


def test_who_is_named_by_a_command_is_ended_before_it(crowd: Crowd) -> None:
    last = MANY - 1
    tokens = [hold.token for hold in crowd.machine.table.locks[f"l{last}"].each_hold()]
    assert views.validate(crowd.machine, f"l{last}", tokens[0])
    outcomes = crowd.apply(
        1_000,
        Keepalive(f"c{last}"),
        Release(f"c{last - 1}", f"l{last - 1}"),
        ReleaseAll(f"c{last - 2}"),
        crowd.leased(last - 3),
        Acquire(f"c{last - 4}", (Ask(f"l{last - 4}"),), 5_000),
        Acquire("somebody", (Ask(f"l{last - 5}"),), 5_000),
    )
    renewed, released, all_released, retried, again, behind = outcomes.answers
    assert renewed == Renewed(0, (f"l{last}",))
    assert isinstance(released, NotHeld)
    assert all_released == ReleasedMany(0)
    assert retried == LeaseLost((f"l{last - 3}",))
    # Those who waited come first.
    assert isinstance(again, Queued)
    assert isinstance(behind, Queued)
    granted = [one.reply.client_id for one in outcomes.resolutions]
    assert granted == [f"w{i}" for i in (0, 1, 2, 3, *range(last, last - 6, -1))]


def test_a_token_whose_time_is_over_is_not_valid(crowd: Crowd) -> None:
    last = crowd.machine.table.locks[f"l{MANY - 1}"]
    (token,) = (hold.token for hold in last.each_hold())
    crowd.apply(1_000)
    assert not views.validate(crowd.machine, last.name, token)


def test_a_deadlock_is_not_named_through_a_hold_that_is_over(crowd: Crowd) -> None:
    last = MANY - 1
    crowd.apply(2, Acquire("ann", (Ask("own"),)), Acquire("bob", (Ask("x"),)))
    crowd.apply(3, Acquire(f"c{last}", (Ask("own"),), 60_000))
    crowd.apply(4, Acquire("bob", (Ask(f"l{last}"),), 60_000))
    # ann would wait for bob, bob for c39, c39 for ann: but c39's lease is over.
    outcomes = crowd.apply(1_000, Acquire("ann", (Ask("x"),), 5_000))
    assert isinstance(outcomes.answers[0], Queued)


def test_a_machine_restored_in_between_goes_on_alike(crowd: Crowd) -> None:
    crowd.apply(1_000)
    twin = snapshot.restore(snapshot.encode(crowd.machine))
    for at_ms in (1_000, 1_000, 1_005, 1_005):
        crowd.index += 1
        batch = Batch(at_ms, [Keepalive(f"c{MANY - 1}")])
        assert crowd.machine.apply(crowd.index, batch) == twin.apply(crowd.index, batch)
    assert snapshot.encode(crowd.machine) == snapshot.encode(twin)
