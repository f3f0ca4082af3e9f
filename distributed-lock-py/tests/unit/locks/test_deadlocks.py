"""No deadlock survives its birth (guarantee 7)."""

from __future__ import annotations

import pytest

from lock_manager.core.locks import views
from lock_manager.core.locks.replies import (
    Deadlock,
    Held,
    Queued,
)

from .driver import Driver


@pytest.mark.parametrize(
    ("held", "waiting", "closing", "cycle"),
    [
        # Two clients, two locks.
        ("ann a, bob b", "ann b", "bob a", "bob ann"),
        # A ring of three.
        ("ann a, bob b, cyd c", "ann b, bob c", "cyd a", "cyd ann bob"),
        # Two upgraders.
        ("ann a:s, bob a:s", "ann a", "bob a", "bob ann"),
        # Through an earlier waiter: bob waits behind cyd's exclusive wait, not for a holder.
        ("ann a:s, bob b", "cyd a, cyd2 b", "bob a:s", ""),
        ("ann a:s, cyd b", "cyd a, bob a:s", "ann b", "ann cyd"),
        ("ann a:s, bob b, eve c", "eve a, ann b", "bob c", "bob eve ann"),
        # The requester holds nothing, but somebody waits behind it.
        ("xen a, bob b", "ann a, bob a", "ann b", "ann bob"),
        # Through several locks at once.
        ("ann a, bob b", "bob a c:s, cyd c", "ann b", "ann bob"),
        ("ann a, bob c", "cyd a b, bob b", "ann c", "ann bob cyd"),
        # A semaphore is full, and everybody in it waits.
        ("ann s:1/2, bob s:1/2, cyd a, dan b", "ann a, bob b, cyd s:1/2", "dan s:1/2", "dan bob"),
        # One permit's holder can go on: no deadlock.
        ("ann s:1/2, bob s:1/2, cyd a", "ann a", "cyd s:1/2", ""),
        # A wait for somebody who runs is no deadlock.
        ("ann a, bob b", "", "ann b", ""),
    ],
)
def test_an_acquire_that_would_close_a_cycle_is_refused_and_names_it(
    locks: Driver, held: str, waiting: str, closing: str, cycle: str
) -> None:
    for who, *what in map(str.split, held.split(", ")):
        locks.token(who, *what)
    for who, *what in map(str.split, filter(None, waiting.split(", "))):
        locks.ticket(who, *what)
    who, *what = closing.split()
    before = {lock: locks.queue(lock) for lock in "abcs"}
    reply = locks.acquire(who, *what)
    if cycle:
        assert reply == Deadlock(tuple(cycle.split()))
        assert {lock: locks.queue(lock) for lock in "abcs"} == before
    else:
        assert isinstance(reply, Queued)


def test_a_try_never_is_a_deadlock(locks: Driver) -> None:
    locks.token("ann", "a")
    locks.token("bob", "b")
    locks.ticket("ann", "b")
    assert isinstance(locks.acquire("bob", "a", wait=0), Held)


def test_the_wait_graph_names_holders_and_earlier_incompatible_waiters(locks: Driver) -> None:
    locks.token("ann", "a:s")
    locks.ticket("bob", "a")
    locks.ticket("cyd", "a:s")
    edges, complete = views.wait_graph(locks.machine, 100)
    assert [(e.waiter, e.blocker) for e in edges] == [("bob", "ann"), ("cyd", "bob")]
    assert complete
    assert views.wait_graph(locks.machine, 1) == (edges[:1], False)


def test_a_thousand_waiters_and_a_long_chain_are_searched_quickly(locks: Driver) -> None:
    locks.token("c0", "l0")
    for i in range(1, 300):
        locks.machine.apply(0, _batch(f"c{i}", f"l{i}"))
        assert locks.machine.apply(0, _batch(f"c{i}", f"l{i - 1}")).answers
    reply = locks.acquire("c0", "l299")
    assert isinstance(reply, Deadlock)
    assert len(reply.cycle) == 300


def _batch(client: str, lock: str):  # type: ignore[no-untyped-def]
    from lock_manager.core.locks.commands import Acquire, Ask, Batch

    return Batch(1, [Acquire(client, (Ask(lock),), 10_000)])
