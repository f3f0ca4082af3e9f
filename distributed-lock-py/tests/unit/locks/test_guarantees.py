"""The README's guarantees one by one, as tables of cases. The numbers are the guarantees'."""

from __future__ import annotations

import pytest

from lock_manager.core.locks import snapshot, views
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
    TooManyRequests,
)

from .driver import Driver


@pytest.fixture
def locks() -> Driver:
    driver = Driver()
    driver.new_leader()
    return driver


# ---- 1 mutual exclusion


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("a", "a", False),
        ("a", "a:s", False),
        ("a:s", "a", False),
        ("a:s", "a:s", True),
        ("a:2/3", "a:1/3", True),
        ("a:2/3", "a:2/3", False),
        ("a", "b", True),
    ],
)
def test_only_what_is_compatible_is_held_together(
    locks: Driver, first: str, second: str, together: bool
) -> None:
    locks.token("ann", first)
    reply = locks.acquire("bob", second, wait=0)
    assert isinstance(reply, Acquired if together else Held)


def test_a_try_names_the_holders(locks: Driver) -> None:
    token = locks.token("ann", "a", ttl=5_000)
    locks.pass_ms(1_000)
    reply = locks.acquire("bob", "a", wait=0)
    assert [
        (h.client_id, h.lock_type, h.fencing_token, h.expires_in_ms) for h in reply.holders
    ] == [("ann", "exclusive", token, 4_000)]
    assert locks.queue("a") == []


@pytest.mark.parametrize("other", ["a", "a:s", "a:1/4"])
def test_a_semaphore_is_no_lock_and_its_limit_is_fixed_while_held(
    locks: Driver, other: str
) -> None:
    locks.token("ann", "a:1/3")
    assert locks.acquire("bob", other) == KindMismatch("a", 3)
    locks.release("ann", "a")
    locks.token("bob", other)


# ---- 2 fencing tokens


def test_every_grant_has_a_higher_token_than_all_before(locks: Driver) -> None:
    tokens = [locks.token("ann", "a"), locks.token("bob", "b:s"), locks.token("cyd", "b:s")]
    locks.release("ann", "a")
    tokens.append(locks.token("ann", "a"))
    assert tokens == sorted(set(tokens))


def test_an_upgrade_has_a_new_token_and_what_keeps_or_reduces_a_hold_has_not(
    locks: Driver,
) -> None:
    shared = locks.token("ann", "a:s", ttl=1_000)
    assert locks.token("ann", "a:s", ttl=1_000) == shared
    locks.keepalive("ann")
    assert locks.token("ann", "a:s") == shared
    exclusive = locks.token("ann", "a")
    assert exclusive > shared
    assert locks.token("ann", "a:s") == exclusive


def test_a_token_is_valid_exactly_as_long_as_its_hold(locks: Driver) -> None:
    def valid(token: int) -> bool:
        return views.validate(locks.machine, "a", token)

    first = locks.token("ann", "a:s")
    second = locks.token("ann", "a")
    assert (valid(first), valid(second), valid(second + 1)) == (False, True, False)
    locks.release("ann", "a")
    assert not valid(second)


# ---- 4 and snapshots: what was decided stays decided


def test_a_restored_machine_goes_on_with_tokens_queues_leases_and_retries(locks: Driver) -> None:
    token = locks.token("ann", "a", ttl=3_000, request="r1")
    ticket = locks.ticket("bob", "a")
    locks.machine = snapshot.restore(snapshot.encode(locks.machine))
    retried = locks.acquire("ann", "a", ttl=3_000, request="r1")
    assert (retried.fencing_token, retried.expires_in_ms) == (token, 3_000)
    locks.pass_ms(3_000)
    assert locks.late[ticket].fencing_token == token + 1


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x93\x01\x02\x03"])
def test_damaged_snapshots_are_refused(data: bytes) -> None:
    with pytest.raises(snapshot.SnapshotError):
        snapshot.restore(data)


# ---- 5 exactly once


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


# ---- 6 fairness


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


# ---- conversion


def test_an_upgrade_waits_for_the_other_sharers_and_goes_before_all_others(
    locks: Driver,
) -> None:
    locks.token("ann", "a:s")
    locks.token("bob", "a:s")
    locks.ticket("cyd", "a")
    ticket = locks.ticket("ann", "a")
    assert locks.queue("a") == ["ann", "cyd"]
    locks.release("bob", "a")
    assert isinstance(locks.late[ticket], Acquired)
    assert (locks.holders("a"), locks.queue("a")) == (["ann"], ["cyd"])


def test_a_downgrade_is_immediate_and_wakes_sharers(locks: Driver) -> None:
    locks.token("ann", "a")
    locks.ticket("bob", "a:s")
    locks.token("ann", "a:s")
    assert locks.holders("a") == ["ann", "bob"]


def test_an_upgrade_whose_hold_is_gone_is_told_so(locks: Driver) -> None:
    locks.token("ann", "a:s", ttl=1_000)
    locks.token("bob", "a:s")
    ticket = locks.ticket("ann", "a")
    locks.pass_ms(1_000)
    assert locks.late[ticket] == LeaseLost(("a",))
    assert locks.queue("a") == []


# ---- several locks at once


def test_several_locks_are_taken_together_or_not_at_all(locks: Driver) -> None:
    locks.token("ann", "b")
    assert isinstance(locks.acquire("bob", "a", "b", wait=0), Held)
    ticket = locks.ticket("bob", "a", "b")
    assert locks.holders("a") == []
    assert isinstance(locks.acquire("cyd", "a", wait=0), Held)  # it queues on all its locks
    locks.release("ann", "b")
    grant = locks.late[ticket]
    assert [one.lock_name for one in grant.locks] == ["a", "b"]
    assert {one.fencing_token for one in grant.locks} == {grant.fencing_token}


# ---- 7 deadlocks


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


# ---- 8 leases


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


# ---- 9 nobody dead holds for ever


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


# ---- the rest of the table


def test_release_refuses_what_the_client_does_not_hold(locks: Driver) -> None:
    token = locks.token("ann", "a")
    for reply in (
        locks.release("bob", "a"),
        locks.release("ann", "b"),
        locks.release("ann", "a", token=token + 1),
    ):
        assert isinstance(reply, NotHeld)
    assert locks.release("ann", "a", token=token) == Released("a", "ann")


def test_release_all_counts_and_leaves_waits_alone(locks: Driver) -> None:
    for lock in ("a", "b:s", "c:1/2"):
        locks.token("ann", lock)
    locks.token("bob", "d")
    locks.ticket("ann", "d")
    assert locks.release_all("ann") == ReleasedMany(3)
    assert locks.release_all("ann") == ReleasedMany(0)
    assert locks.queue("d") == ["ann"]


def test_force_release_frees_one_holder_or_all_and_they_learn_of_it(locks: Driver) -> None:
    for client in ("ann", "bob", "cyd"):
        locks.token(client, "a:s", ttl=9_000)
    assert locks.force_release("a", "bob") == ReleasedMany(1)
    assert locks.holders("a") == ["ann", "cyd"]
    assert locks.force_release("a") == ReleasedMany(2)
    assert locks.force_release("nowhere") == ReleasedMany(0)
    assert locks.keepalive("ann") == Renewed(0, ("a",))


def test_views_show_an_unknown_lock_as_free(locks: Driver) -> None:
    assert views.lock(locks.machine, "x", 0) == views.LockView("x", [], [])
    locks.token("ann", "a:2/3")
    locks.ticket("bob", "a:2/3")
    locks.pass_ms(250)
    shown, complete = views.locks(locks.machine, locks.now, 10)
    assert complete
    waiter = shown[0].waiters[0]
    assert (waiter.client_id, waiter.position, waiter.waiting_ms, waiter.permits) == (
        "bob",
        1,
        250,
        2,
    )
    assert shown[0].limit == 3
