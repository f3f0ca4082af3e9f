"""The delivery machine, one rule at a time (the property test mixes them)."""

from __future__ import annotations

from typing import Any

from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.lots import singly
from message_queue.core.delivery.model import MAX_LEASE_MS, Entry, Receipt, Settings, Verdict
from message_queue.core.delivery.partition import PartitionDelivery

EPOCH = 3


def machine(*dots: int, **fields: Any) -> PartitionDelivery:
    sut = PartitionDelivery(EPOCH)
    for dot in dots:
        put(sut, dot, **fields)
    return sut


def put(sut: PartitionDelivery, dot: int, now: int = 0, **fields: Any) -> None:
    entry = Entry(dot=dot, queue="q", body=b"1", body_bytes=1, enqueued_ms=now, **fields)
    sut.put(entry, now)
    check(sut)


def take(sut: PartitionDelivery, most: int = 10, lease: int = 100, now: int = 0) -> list[int]:
    taken = [entry.dot for entry in singly(sut.take("q", most, lease, now))]
    check(sut)
    return taken


def granted(sut: PartitionDelivery) -> dict[int, list[int]]:
    grants, endings = sut.drain()
    assert not endings
    check(sut)
    return {grant.token: [entry.dot for entry in singly(grant.entries)] for grant in grants}


def test_a_group_waits_while_its_head_is_in_flight_whatever_arrives() -> None:
    sut = machine(1, group="g")
    assert take(sut) == [1]
    put(sut, 2, group="g")
    put(sut, 3)
    assert take(sut) == [3]
    assert sut.settle(1, None) is Verdict.DONE
    assert take(sut) == [], "the ack is not stored yet"
    sut.gone(1, 0)
    assert take(sut) == [2]


def test_a_group_waits_for_its_delayed_and_for_its_returned_head() -> None:
    sut = machine(1, group="g", ready_at_ms=50)
    put(sut, 2, group="g")
    assert take(sut) == []
    sut.tick(50)
    assert take(sut, now=50) == [1]
    sut.nack(1, None, 30, 60)
    assert take(sut, now=60) == []
    sut.tick(90)
    assert take(sut, now=90) == [1]
    sut.gone(1, 90)
    assert take(sut, now=90) == [2]


def test_waiters_are_served_in_order_each_up_to_its_most() -> None:
    sut = machine()
    sut.wait(7, "q", 2, 100)
    sut.wait(8, "q", 2, 100)
    put(sut, 1)
    assert granted(sut) == {7: [1]}
    sut.cancel(8)
    put(sut, 2)
    assert granted(sut) == {}
    assert take(sut) == [2]


def test_who_comes_later_does_not_overtake_who_waits() -> None:
    sut = machine()
    sut.wait(7, "q", 1, 100)
    assert take(sut) == []
    put(sut, 1, ready_at_ms=10)
    assert granted(sut) == {}
    sut.tick(10)
    assert granted(sut) == {7: [1]}


def test_nobody_is_served_while_paused_and_all_are_on_resume() -> None:
    sut = machine()
    sut.wait(7, "q", 1, 100)
    sut.wait(8, "q", 1, 100)
    sut.paused = True
    put(sut, 1)
    put(sut, 2)
    assert granted(sut) == {}
    sut.resume(0)
    assert granted(sut) == {7: [1], 8: [2]}


def test_a_lease_that_ends_wakes_a_waiter_and_keeps_the_place_in_line() -> None:
    sut = machine(1, 2)
    assert take(sut, 1) == [1]
    sut.tick(100)
    assert take(sut, now=100) == [1, 2]
    sut.wait(7, "q", 10, 100)
    sut.tick(200)
    assert granted(sut) == {7: [1]}
    assert [sut.entries[dot].attempt for dot in (1, 2)] == [3, 1]


def test_a_delivery_that_reached_nobody_was_no_attempt() -> None:
    sut = machine(1)
    take(sut)
    sut.release(1, Receipt(EPOCH, 1), 0)
    check(sut)
    assert sut.entries[1].seen == 0
    take(sut)
    sut.release(1, Receipt(EPOCH, 99), 0)
    assert take(sut) == [], "a receipt of another delivery releases nothing"


def test_a_lease_is_extended_up_to_twelve_hours_in_all() -> None:
    sut = machine(1)
    take(sut, lease=1000)
    assert sut.extend(1, Receipt(EPOCH, 1), MAX_LEASE_MS, 0) is Verdict.DONE
    assert sut.extend(1, Receipt(EPOCH, 1), MAX_LEASE_MS, 1) is Verdict.TOO_LONG
    assert sut.extend(1, Receipt(EPOCH, 1), 0, 1) is Verdict.DONE
    assert take(sut, now=1) == [1], "an extension by nothing gives it back"


def test_a_jump_of_the_clock_ends_no_lease_but_delays() -> None:
    sut = machine(1, 2)
    assert take(sut, most=1, lease=100) == [1]
    put(sut, 3, ready_at_ms=500)
    sut.postpone(1_000)  # cluster time jumped from 0 to 1000
    sut.tick(1_099)
    assert take(sut, now=1_099) == [2, 3]
    sut.tick(1_100)
    assert take(sut, now=1_100) == [1]


def test_a_lease_that_ended_is_taken_up_again_while_nobody_else_has_the_message() -> None:
    sut = machine(1)
    take(sut, lease=10)
    sut.tick(20)
    assert sut.extend(1, Receipt(EPOCH, 1), 100, 20) is Verdict.DONE
    assert take(sut, now=20) == []
    assert sut.settle(1, Receipt(EPOCH, 1)) is Verdict.DONE


def test_retention_set_later_applies_to_what_is_there() -> None:
    sut = machine(1)
    sut.configure("q", Settings(retention_ms=100), 50)
    sut.tick(99)
    assert sut.drain()[1] == []
    sut.tick(100)
    [ending] = sut.drain()[1]
    assert ending.entry.dot == 1


def test_without_a_place_for_dead_letters_a_message_is_delivered_on() -> None:
    sut = machine(1)
    sut.configure("q", Settings(max_deliveries=1, dead_letter=None), 0)
    for n in range(5):
        assert take(sut, lease=10, now=n * 10) == [1]
        sut.tick(n * 10 + 10)


def test_thousands_of_settled_messages_leave_nothing_behind() -> None:
    sut = machine()
    for dot in range(1, 5_001):
        sut.put(Entry(dot=dot, queue="q", body=b"1", body_bytes=1, enqueued_ms=0), 0)
        [entry] = singly(sut.take("q", 1, 30_000, 0))
        sut.settle(entry.dot, None)
        sut.gone(entry.dot, 0)
    check(sut)
    assert sut.length("q") == 0
    assert len(sut.timers()) <= 1_100, "stale timers are trimmed"
    assert sut.delivered == {}
    assert sut.resident_bytes == 0
