"""A retry gets the first answer and changes nothing (guarantee 5)."""

from __future__ import annotations

import pytest

from lock_manager.core.locks.replies import (
    Acquired,
    Held,
    LeaseLost,
    Released,
    RequestReused,
    TimedOut,
    TooManyRequests,
)

from .driver import Driver


def test_a_retry_gets_the_first_answer_and_changes_nothing(locks: Driver) -> None:
    first = locks.acquire("ann", "a", request="r1", ttl=10_000)
    locks.pass_ms(4_000)
    again = locks.acquire("ann", "a", request="r1", ttl=10_000)
    assert again.fencing_token == first.fencing_token
    assert again.expires_in_ms == 6_000  # the present one: the lease was not counted anew


@pytest.mark.parametrize("how", ["release", "expiry", "force", "regained"])
def test_a_retry_of_a_grant_that_is_gone_says_so(locks: Driver, how: str) -> None:
    locks.acquire("ann", "a", request="r1", ttl=1_000)
    if how == "expiry":
        locks.pass_ms(1_000)
    elif how == "force":
        locks.force_release("a")
    else:
        locks.release("ann", "a")
    if how == "regained":
        locks.token("ann", "a")
    assert locks.acquire("ann", "a", request="r1", ttl=1_000) == LeaseLost(("a",))


def test_a_retry_of_a_shared_grant_is_still_good_after_its_upgrade(locks: Driver) -> None:
    first = locks.acquire("ann", "a:s", request="r1")
    locks.token("ann", "a")
    assert locks.acquire("ann", "a:s", request="r1") == first
    assert locks.acquire("bob", "a:s", wait=0).holders[0].lock_type == "exclusive"


def test_the_same_id_with_another_body_is_refused(locks: Driver) -> None:
    locks.acquire("ann", "a", request="r1")
    for other in (
        locks.acquire("ann", "b", request="r1"),
        locks.acquire("ann", "a", request="r1", wait=1),
        locks.release("ann", "a", request="r1"),
    ):
        assert other == RequestReused("r1")
    assert isinstance(locks.acquire("bob", "b", request="r1"), Acquired)


def test_a_retried_release_leaves_the_next_holder_alone(locks: Driver) -> None:
    locks.token("ann", "a")
    assert locks.release("ann", "a", request="r1") == Released("a", "ann")
    locks.token("bob", "a")
    assert locks.release("ann", "a", request="r1") == Released("a", "ann")
    assert locks.holders("a") == ["bob"]


def test_a_try_that_failed_stays_a_failure_when_it_is_retried(locks: Driver) -> None:
    locks.token("ann", "a")
    assert isinstance(locks.acquire("bob", "a", wait=0, request="r1"), Held)
    locks.release("ann", "a")
    assert isinstance(locks.acquire("bob", "a", wait=0, request="r1"), Held)
    assert locks.holders("a") == []


def test_a_timeout_stays_a_timeout_when_it_is_retried(locks: Driver) -> None:
    locks.token("ann", "a")
    locks.ticket("bob", "a", wait=500, request="r1")
    locks.pass_ms(500)
    locks.release("ann", "a")
    assert locks.acquire("bob", "a", wait=500, request="r1") == TimedOut("a")


def test_answers_are_forgotten_after_ten_minutes(locks: Driver) -> None:
    locks.acquire("ann", "a", request="r1")
    locks.release("ann", "a")
    locks.pass_ms(599_999)
    assert locks.acquire("ann", "a", request="r1") == LeaseLost(("a",))
    locks.pass_ms(1)
    assert isinstance(locks.acquire("ann", "a", request="r1"), Acquired)
    assert len(locks.machine.requests) == 1


def test_beyond_the_bound_new_request_ids_are_refused_and_old_ones_still_known(
    locks: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lock_manager.core.locks.requests.MOST", 1)
    first = locks.acquire("ann", "a", request="r1")
    assert locks.acquire("ann", "b", request="r2") == TooManyRequests()
    assert locks.release("ann", "a", request="r3") == TooManyRequests()
    assert locks.acquire("ann", "a", request="r1") == first
    assert isinstance(locks.acquire("ann", "b"), Acquired)
