"""Who may hold what together, which tokens holds have, and how they end (guarantees 1, 2 and 4)."""

from __future__ import annotations

import pytest

from lock_manager.core.locks import snapshot, views
from lock_manager.core.locks.replies import (
    Acquired,
    Held,
    KindMismatch,
    LeaseLost,
    NotHeld,
    Released,
    ReleasedMany,
    Renewed,
)

from .driver import Driver

# ---- mutual exclusion


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


# ---- fencing tokens


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


# ---- snapshots: what was decided stays decided


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


@pytest.mark.parametrize("then", ["nothing", "renew again", "shorter", "release", "expire"])
def test_a_snapshot_that_is_being_written_has_leases_as_they_were_before_renewals(
    locks: Driver, then: str
) -> None:
    for name in ("a", "b", "c:s", "d:2/3"):
        locks.token("ann", name, ttl=3_000)
    locks.token("bob", "e", ttl=9_000)
    expected = snapshot.encode(locks.machine)
    writer = snapshot.SnapshotWriter(locks.machine)
    locks.pass_ms(1_000)
    assert locks.keepalive("ann").locks == 4
    match then:
        case "renew again":
            locks.pass_ms(500)
            assert locks.keepalive("ann").locks == 4
        case "shorter":
            assert locks.keepalive("ann", ttl=700).locks == 4
        case "release":
            assert isinstance(locks.release("ann", "b"), Released)
            locks.token("bob", "b", ttl=100)
        case "expire":
            locks.pass_ms(5_000)
    while writer.step():
        pass
    assert writer.data() == expected
    assert locks.machine.table.before_renewal is None
