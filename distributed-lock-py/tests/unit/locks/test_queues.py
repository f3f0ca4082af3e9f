"""Waiters stand in line, and nobody dead stays in it (guarantees 6 and 9)."""

from __future__ import annotations

from lock_manager.core.locks import views
from lock_manager.core.locks.replies import (
    Acquired,
    AlreadyWaiting,
    Held,
    Queued,
    TimedOut,
)

from .driver import Driver

# ---- fairness


def test_locks_are_handed_over_in_the_order_of_asking(locks: Driver) -> None:
    locks.token("ann", "a")
    tickets = [locks.ticket(client, "a") for client in ("bob", "cyd", "dan")]
    for holder, ticket in zip(("ann", "bob", "cyd"), tickets, strict=True):
        assert ticket not in locks.late
        locks.release(holder, "a")
        assert isinstance(locks.late[ticket], Acquired)


def test_neighbouring_sharers_enter_together_and_none_overtakes_an_exclusive(
    locks: Driver,
) -> None:
    locks.token("ann", "a")
    for client, lock in (("b", "a:s"), ("c", "a:s"), ("d", "a"), ("e", "a:s")):
        locks.ticket(client, lock)
    locks.release("ann", "a")
    assert (locks.holders("a"), locks.queue("a")) == (["b", "c"], ["d", "e"])
    assert isinstance(locks.acquire("f", "a:s", wait=0), Held)
    locks.release("b", "a")
    locks.release("c", "a")
    assert locks.holders("a") == ["d"]


def test_a_small_semaphore_request_does_not_overtake_a_large_one(locks: Driver) -> None:
    locks.token("ann", "a:2/3")
    locks.ticket("bob", "a:3/3")
    locks.ticket("cyd", "a:1/3")
    locks.release("ann", "a")
    assert (locks.holders("a"), locks.queue("a")) == (["bob"], ["cyd"])


def test_a_waiter_that_leaves_lets_those_behind_it_in(locks: Driver) -> None:
    locks.token("ann", "a:s")
    ticket = locks.ticket("bob", "a")
    locks.ticket("cyd", "a:s")
    locks.cancel(ticket)
    assert locks.holders("a") == ["ann", "cyd"]


def test_two_waits_of_one_client_for_one_lock_are_one(locks: Driver) -> None:
    locks.token("ann", "a")
    tickets = [locks.ticket("bob", "a"), locks.ticket("bob", "a")]
    locks.ticket("cyd", "a")
    assert locks.queue("a") == ["bob", "cyd"]
    locks.release("ann", "a")
    assert locks.late[tickets[0]] == locks.late[tickets[1]]
    locks.release("bob", "a")
    assert locks.holders("a") == ["cyd"]


def test_a_second_wait_of_another_kind_is_refused(locks: Driver) -> None:
    locks.token("ann", "a")
    locks.ticket("bob", "a")
    assert locks.acquire("bob", "a:s") == AlreadyWaiting("a")
    assert locks.acquire("bob", "a", "b") == AlreadyWaiting("a")


# ---- nobody dead holds for ever


def test_a_waiter_times_out_rather_than_being_granted_late(locks: Driver) -> None:
    locks.token("ann", "a", ttl=1_000)
    ticket = locks.ticket("bob", "a", wait=900)
    locks.pass_ms(5_000)  # both are over by this one stamp, and the wait was over first
    assert locks.late[ticket] == TimedOut("a")
    assert locks.holders("a") == []


def test_a_cancelled_waiter_is_gone_and_its_request_id_forgotten(locks: Driver) -> None:
    locks.token("ann", "a")
    ticket = locks.ticket("bob", "a", request="r1")
    locks.cancel(ticket)
    assert locks.queue("a") == []
    locks.release("ann", "a")
    assert isinstance(locks.acquire("bob", "a", wait=7, request="r1"), Acquired)


def test_after_a_new_leader_waiters_stay_ten_seconds_for_their_retry(locks: Driver) -> None:
    locks.token("ann", "a")
    ticket = locks.ticket("bob", "a", wait=60_000, request="r1")
    locks.ticket("cyd", "a", wait=60_000)
    locks.new_leader()
    locks.pass_ms(9_999)
    assert locks.queue("a") == ["bob", "cyd"]
    assert locks.acquire("bob", "a", wait=60_000, request="r1") == Queued(ticket)
    locks.pass_ms(1)
    assert locks.queue("a") == ["bob"]
    locks.pass_ms(20_000)
    assert locks.queue("a") == ["bob"]


def test_a_grant_to_a_waiter_of_an_earlier_leader_is_reaped_unless_claimed(locks: Driver) -> None:
    locks.token("ann", "a")
    locks.token("ann", "b")
    locks.ticket("bob", "a", wait=60_000, request="r1")
    locks.ticket("cyd", "b", wait=60_000, request="r1")
    locks.new_leader()
    locks.release_all("ann")
    assert isinstance(locks.acquire("bob", "a", wait=60_000, request="r1"), Acquired)
    locks.pass_ms(10_000)
    assert (locks.holders("a"), locks.holders("b")) == (["bob"], [])
    assert [(e.client_id, e.reaped) for e in locks.outcomes.expired] == [("cyd", True)]


def test_a_grant_that_reached_nobody_is_reaped_unless_claimed(locks: Driver) -> None:
    lost = locks.acquire("ann", "a", request="r1")
    locks.undelivered(lost)
    locks.pass_ms(9_999)
    assert locks.holders("a") == ["ann"]
    claimed = locks.acquire("ann", "a", request="r1")
    assert claimed.fencing_token == lost.fencing_token
    locks.pass_ms(60_000)
    assert locks.holders("a") == ["ann"]
    locks.undelivered(claimed)  # the retry's client hung up too: now nobody was told
    locks.pass_ms(10_000)
    assert locks.holders("a") == []


def test_a_holder_that_was_told_once_is_never_reaped(locks: Driver) -> None:
    told = locks.acquire("ann", "a")
    locks.undelivered(locks.acquire("ann", "a"))  # a second answer got lost
    locks.pass_ms(3_600_000)
    assert locks.holders("a") == ["ann"]
    assert views.validate(locks.machine, "a", told.fencing_token)
