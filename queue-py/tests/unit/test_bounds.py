"""What must not grow beyond all bounds: an answer, and memory that nobody counts."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest

from message_queue.core.delivery.backlog import Card
from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.lots import Lot, Taken
from message_queue.core.delivery.model import Verdict
from message_queue.core.delivery.parcels import Parcels
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.queues import MAX_IDLE_QUEUES
from message_queue.core.delivery.stored import MessageMeta
from message_queue.core.ids import pack_dot
from message_queue.core.operations import MAX_ANSWER_BYTES

MEGABYTE = 1 << 20


class Disk:
    """A shelf that has everything, each of the size that the test says."""

    def __init__(self, size: int) -> None:
        self.size = size

    def card(self, dot: int) -> Card:
        return Card("q", 0, self.size, 0)

    def sizes(self, first: int, count: int) -> array[int]:
        return array("I", [self.size]) * count


def dots(taken: list[Taken]) -> list[int]:
    found: list[int] = []
    for each in taken:
        found += range(each.first, each.last + 1) if isinstance(each, Lot) else [each.dot]
    return found


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("together", [1, 20])
def test_who_asks_for_a_thousand_large_messages_gets_what_an_answer_can_carry(
    on_disk: bool, together: int
) -> None:
    size = MEGABYTE // together
    sut = PartitionDelivery(3, Disk(size))  # type: ignore[arg-type]  # enough of a shelf
    body = bytes(size)
    meta = MessageMeta("q", 0, 0)
    first = pack_dot(3, 1)
    for n in range(0, 10 * together, together):
        sut.put_run(first + n, meta, [body] * together, not on_disk, 0)
    if not on_disk:
        check(sut)
    seen: list[int] = []
    answers = 0
    while taken := sut.take("q", 1000, 60_000, 0):
        answers += 1
        assert size * len(dots(taken)) <= MAX_ANSWER_BYTES + MEGABYTE
        seen += dots(taken)
    assert seen == list(range(first, first + 10 * together)), "all of them, in order, once"
    assert answers in (2, 3)
    if not on_disk:
        check(sut)


def test_one_message_is_delivered_however_large() -> None:
    sut = PartitionDelivery(3)
    sut.put_run(pack_dot(3, 1), MessageMeta("q", 0, 0), [bytes(2 * MAX_ANSWER_BYTES)] * 2, True, 0)
    for dot in (pack_dot(3, 1), pack_dot(3, 2)):
        assert dots(sut.take("q", 10, 60_000, 0)) == [dot]


def test_queues_are_counted_and_those_that_fell_empty_do_not_pile_up() -> None:
    tracemalloc.start()
    sut = PartitionDelivery(3)
    for n in range(900):
        sut.put_run(pack_dot(3, n + 1), MessageMeta(f"q{n}", n, n), [b""], True, 0)
    takes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert takes / 2 < sut.memory_bytes < takes * 2
    for n in range(900, 3_000):
        dot = pack_dot(3, n + 1)
        sut.put_run(dot, MessageMeta(f"q{n}", n, n), [b""], True, 0)
        assert sut.settle(dot, None) is Verdict.DONE
        sut.gone(dot, 0)
    assert len(sut.queue_names()) <= MAX_IDLE_QUEUES
    assert {f"q{n}" for n in range(900)} <= set(sut.queue_names()), "these hold something"


def test_a_lease_that_is_extended_for_hours_leaves_no_timers_behind() -> None:
    sut = PartitionDelivery(3)
    for n in range(1, 6):
        sut.put_run(pack_dot(3, n), MessageMeta("q", 0, 0, expires_ms=99_999_999), [b""], True, 0)
    taken = dots(sut.take("q", 3, 1_000, 0))
    for now in range(10_000):
        assert sut.extend(taken[now % 3], None, 30_000_000, now) is Verdict.DONE
    assert len(sut.timers()) < 2_000
    check(sut)
    sut.tick(30_000_000 + 9_999)
    check(sut)
    assert sut.counts("q").ready == 5, "their leases are over"
    sut.tick(99_999_999)
    assert len(sut.drain()[1]) == 5, "and so, at last, are they"


def test_a_group_forgets_those_that_left_behind_a_head_that_stays() -> None:
    sut = PartitionDelivery(3)
    sut.put_run(
        pack_dot(3, 1), MessageMeta("q", 0, 0, group="g", ready_at_ms=1 << 40), [b""], True, 0
    )
    kept = pack_dot(3, 2)
    sut.put_run(kept, MessageMeta("q", 0, 0, group="g"), [b""], True, 0)
    for n in range(3, 800):
        dot = pack_dot(3, n)
        sut.put_run(dot, MessageMeta("q", 0, 0, group="g"), [b""], True, 0)
        assert sut.settle(dot, None) is Verdict.DONE
        sut.gone(dot, 0)
    check(sut)
    assert len(sut._queues["q"].groups["g"].behind) < 200
    sut.settle(pack_dot(3, 1), None)
    sut.gone(pack_dot(3, 1), 0)
    assert dots(sut.take("q", 9, 1_000, 0)) == [kept]


@pytest.mark.parametrize("headers", [None, bytes(1000)])
@pytest.mark.parametrize("together", [1, 100])
def test_what_waits_in_memory_is_counted_with_all_that_hangs_on_it(
    headers: bytes | None, together: int
) -> None:
    tracemalloc.start()
    parcels = Parcels()
    for n in range(0, 1000, together):
        own = headers + b"%d" % n if headers is not None else None
        meta = MessageMeta("q", 1_000_000 + n, 1_000_000 + n, headers=own)
        parcels.add(pack_dot(3, n + 1), meta, [b"body %d" % (n + k) for k in range(together)])
    takes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert takes / 2 < parcels.bytes < takes * 2
    for dot in list(parcels.dots()):
        parcel = parcels.holding(dot)
        assert parcel is not None
        parcels.take(parcel, dot)
    assert parcels.bytes == 0
