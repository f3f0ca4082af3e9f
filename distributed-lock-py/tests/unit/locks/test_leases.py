"""Leases end in cluster time, neither sooner nor later (guarantee 8)."""

from __future__ import annotations

from lock_manager.core.locks.replies import (
    Held,
    Renewed,
)

from .driver import Driver


def test_a_lease_ends_when_its_time_has_passed_and_the_next_is_let_in(locks: Driver) -> None:
    locks.token("ann", "a", ttl=2_000)
    ticket = locks.ticket("bob", "a", ttl=1_000)
    locks.pass_ms(1_999)
    assert locks.holders("a") == ["ann"]
    locks.pass_ms(1)
    assert locks.late[ticket].expires_in_ms == 1_000  # counted from the grant
    assert [(e.client_id, e.reaped) for e in locks.outcomes.expired] == [("ann", False)]


def test_keepalive_counts_leases_anew_and_leaves_other_holds_alone(locks: Driver) -> None:
    locks.token("ann", "a", ttl=2_000)
    locks.token("ann", "b")
    locks.pass_ms(1_500)
    assert locks.keepalive("ann") == Renewed(1)
    locks.pass_ms(1_500)
    assert locks.keepalive("ann", ttl=9_000) == Renewed(1)
    locks.pass_ms(8_999)
    assert locks.holders("a") == ["ann"]
    locks.pass_ms(1)
    assert (locks.holders("a"), locks.holders("b")) == ([], ["ann"])
    assert locks.keepalive("nobody") == Renewed(0)


def test_a_keepalive_may_make_leases_end_sooner(locks: Driver) -> None:
    locks.token("ann", "a", ttl=5_000)
    ticket = locks.ticket("bob", "a")
    assert locks.keepalive("ann", ttl=700) == Renewed(1)
    assert locks.machine.next_due_ms() == locks.machine.now_ms + 700
    locks.pass_ms(699)
    assert ticket not in locks.late
    locks.pass_ms(1)
    assert locks.late[ticket].client_id == "bob"


def test_a_keepalive_that_comes_too_late_does_not_revive_a_lease(locks: Driver) -> None:
    locks.token("ann", "a", ttl=1_000)
    locks.token("ann", "b", ttl=9_000)
    locks.now += 1_000  # no stamp in between: the keepalive's own entry carries the time
    assert locks.keepalive("ann") == Renewed(1, ("a",))
    assert locks.keepalive("ann") == Renewed(1, ("a",))
    locks.token("ann", "c")
    assert locks.keepalive("ann") == Renewed(1)


def test_time_in_the_log_never_goes_back(locks: Driver) -> None:
    locks.token("ann", "a", ttl=1_000)
    locks.pass_ms(900)
    locks.now -= 500
    locks.pass_ms(0)
    assert locks.machine.now_ms == 900
    locks.now = 1_000
    locks.pass_ms(0)
    assert locks.holders("a") == []


def test_a_lock_whose_lease_expired_stays_free_for_the_lock_delay(locks: Driver) -> None:
    locks.delay_ms = 500
    locks.token("ann", "a", ttl=1_000)
    ticket = locks.ticket("bob", "a")
    locks.pass_ms(1_000)
    assert (locks.holders("a"), locks.queue("a")) == ([], ["bob"])
    assert isinstance(locks.acquire("cyd", "a", wait=0), Held)
    locks.pass_ms(499)
    assert ticket not in locks.late
    locks.pass_ms(1)
    assert locks.holders("a") == ["bob"]


def test_a_release_is_not_delayed(locks: Driver) -> None:
    locks.delay_ms = 500
    locks.token("ann", "a", ttl=1_000)
    locks.release("ann", "a")
    locks.token("bob", "a")
