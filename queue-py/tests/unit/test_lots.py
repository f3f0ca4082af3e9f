"""Leases of many together: cut by an ack of some, taken apart by whoever names one, and by time."""

from __future__ import annotations

from array import array

from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.leases import MAX_LEASES, decode_leases, encode_leases
from message_queue.core.delivery.lots import Lot, receipts_of, singly
from message_queue.core.delivery.model import Ended, Receipt, Settings, Verdict
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.queues import QUEUE_BYTES
from message_queue.core.delivery.stored import MessageMeta

EPOCH = 3
COUNT = 20
DONE, SETTLING, OVERTAKEN = Verdict.DONE, Verdict.SETTLING, Verdict.OVERTAKEN


def body(dot: int) -> bytes:
    return b"body %d" % dot


def machine(epoch: int = EPOCH, first: int = 1, **settings: int) -> PartitionDelivery:
    """Twenty messages that wait together."""
    sut = PartitionDelivery(epoch)
    if settings:
        sut.configure("q", Settings(dead_letter="d", **settings), 0)
    bodies = [body(dot) for dot in range(first, first + COUNT)]
    sut.put_run(first, MessageMeta("q", 0, 7), bodies, True, 0)
    check(sut)
    return sut


def take(sut: PartitionDelivery, now: int = 0, most: int = COUNT) -> list[int]:
    taken = singly(sut.take("q", most, 100, now))
    check(sut)
    assert all(entry.body == body(entry.dot) for entry in taken)
    return [entry.dot for entry in taken]


def test_what_is_delivered_together_is_one_lease_and_settled_in_one_step() -> None:
    sut = machine()
    (lot,) = sut.take("q", COUNT, 100, 0)
    assert isinstance(lot, Lot)
    assert not sut.entries
    assert len(sut.timers()) == 1
    assert sut.settle_span(1, COUNT, "3.1") == [(1, COUNT, DONE)]
    assert sut.settle_span(1, COUNT, "3.1") == [(1, COUNT, SETTLING)]
    check(sut)
    sut.gone_all([(1, COUNT)], 0)
    check(sut)
    assert (sut.held, sut.memory_bytes, sut.counts("q").bytes) == (0, QUEUE_BYTES, 0)


def test_an_ack_of_some_leaves_the_others_leased_with_their_own_bodies_and_times() -> None:
    sut = machine()
    take(sut)
    assert sut.settle_span(5, 8, "3.1") == [(5, 8, DONE)]
    check(sut)
    sut.gone_all([(5, 8)], 0)
    check(sut)
    assert take(sut, now=99) == []
    sut.tick(100)
    assert take(sut, now=100) == [1, 2, 3, 4, *range(9, COUNT + 1)]
    assert sut.settle_span(9, 9, "3.1") == [(9, 9, OVERTAKEN)]


def test_a_receipt_of_no_or_another_delivery_settles_nothing_of_a_lot() -> None:
    for text in ("3.2", "3.0", "4.1", "x", "2.1"):
        sut = machine()
        take(sut)
        assert sut.settle_span(1, COUNT, text) == [(1, COUNT, OVERTAKEN)], text
        assert sut.nack(4, Receipt(2, 1), 0, 0) is OVERTAKEN
        check(sut)


def test_a_lot_whose_ack_is_in_doubt_is_not_delivered_again_when_its_lease_ends() -> None:
    sut = machine()
    take(sut)
    sut.settle_span(1, 10, None)
    sut.tick(1_000)
    check(sut)
    assert take(sut, now=1_000) == list(range(11, COUNT + 1))


def test_a_nack_or_an_extend_in_the_middle_takes_one_out() -> None:
    sut = machine()
    take(sut)
    assert sut.nack(7, Receipt(EPOCH, 1), 0, 0) is DONE
    check(sut)
    assert sut.extend(9, Receipt(EPOCH, 1), 500, 0) is DONE
    check(sut)
    assert take(sut, most=1) == [7]
    sut.tick(100)
    # 7 is leased anew, 9 for longer.
    assert take(sut, now=100) == [*range(1, 7), 7, 8, *range(10, COUNT + 1)]
    sut.tick(500)
    assert take(sut, now=500, most=30) == [*range(1, COUNT + 1)]


def test_a_lot_that_reached_nobody_was_no_attempt_and_its_receipt_is_good_for_nothing() -> None:
    sut = machine(max_deliveries=1)
    spans = receipts_of(sut.take("q", COUNT, 100, 0))
    sut.settle_span(3, 4, None)
    sut.release_all(spans, 0)
    check(sut)
    again = singly(sut.take("q", COUNT, 100, 0))
    assert [entry.dot for entry in again] == [1, 2, *range(5, COUNT + 1)]
    assert {entry.seen for entry in again} == {1}
    assert [verdict for *_, verdict in sut.settle_span(1, 2, "3.1")] == [OVERTAKEN] * 2
    assert not sut.drain()[1]


def test_an_ack_that_was_refused_leaves_the_lease_as_it_was() -> None:
    sut = machine()
    take(sut)
    sut.settle_span(1, 10, None)
    sut.settle_span(11, 15, None)
    sut.unsettle_all([(1, 10)], 50)
    check(sut)
    assert sut.counts("q").in_flight == COUNT
    sut.unsettle_all([(11, 15)], 100)
    check(sut)
    assert take(sut, now=100) == [11, 12, 13, 14, 15]
    sut.tick(100)
    assert take(sut, now=100) == [*range(1, 11), *range(16, COUNT + 1)]


def test_who_waits_for_several_gets_several_when_a_lot_comes_back() -> None:
    sut = machine()
    take(sut)
    sut.wait(7, "q", COUNT, 100)
    sut.tick(100)
    (grant,) = sut.drain()[0]
    assert [entry.dot for entry in singly(grant.entries)] == list(range(1, COUNT + 1))


def test_the_last_attempt_of_a_lot_ends_with_its_lease() -> None:
    sut = machine(max_deliveries=1)
    take(sut)
    sut.tick(100)
    endings = sut.drain()[1]
    assert [(e.entry.dot, e.reason) for e in endings] == [
        (dot, Ended.EXHAUSTED) for dot in range(1, COUNT + 1)
    ]
    check(sut)


def test_a_purge_ends_leased_lots_too() -> None:
    sut = machine()
    take(sut)
    dots, waiting = sut.purge("q")
    assert (sorted(dots), waiting) == (list(range(1, COUNT + 1)), None)
    sut.tick(100)
    assert take(sut, now=100) == []
    sut.gone_all([(1, COUNT)], 100)
    assert sut.held == 0


def test_a_jump_of_cluster_time_ends_no_lot_early() -> None:
    sut = machine()
    take(sut)
    sut.postpone(1_000)
    sut.tick(1_099)
    assert take(sut, now=1_099) == []
    sut.tick(1_100)
    assert take(sut, now=1_100) == list(range(1, COUNT + 1))


def test_a_successor_honours_a_lot_to_its_end_and_takes_its_receipt() -> None:
    sut = machine()
    take(sut)
    sut.settle_span(1, 4, None)  # not stored when the owner went
    leases = decode_leases(encode_leases(sut.delivered.values(), sut.lots))
    assert [(lease.dot, lease.count) for lease in leases] == [(1, 4), (5, 16)]
    later = machine(EPOCH + 1)
    for lease in leases:
        later.restore_lease(lease, 10)
        check(later)
    # A lease that is not told of as running has ended: these were being acked.
    assert take(later, now=10) == [1, 2, 3, 4]
    assert later.settle_span(6, 8, "3.1") == [(6, 8, DONE)]
    later.tick(100)
    assert take(later, now=100, most=30) == [5, *range(9, COUNT + 1)]


def test_a_successor_that_lacks_some_of_a_lot_honours_the_rest() -> None:
    sut = machine()
    take(sut)
    leases = decode_leases(encode_leases([], sut.lots))
    later = machine(EPOCH + 1, first=8)
    later.restore_lease(leases[0], 10)
    check(later)
    assert take(later, now=10, most=30) == list(range(21, 28))


def test_leases_of_more_messages_than_a_node_tells_of_are_not_taken_up() -> None:
    sizes = array("I", [0]) * 1000
    lots = [Lot(1024 * n + 1, 1000, "q", 0, 0, sizes, 0, EPOCH, 0, 9) for n in range(30)]
    leases = decode_leases(encode_leases([], lots))
    assert sum(lease.count for lease in leases) == MAX_LEASES
    assert decode_leases(b"\x91\x97\x01\x03\x01\x09\x00\x00\xcd\x04\x01") == [], "1,025 in one"


def test_bodies_that_were_read_too_late_or_twice_are_not_kept() -> None:
    sut = machine()
    meta, bodies = MessageMeta("q", 0, 7), [body(dot) for dot in range(1, COUNT + 1)]
    before = sut.memory_bytes
    assert not sut.fill("q", 1, meta, bodies), "they are here"
    assert take(sut, most=16) == list(range(1, 17))
    assert not sut.fill("q", 1, meta, bodies[:16]), "they were delivered"
    assert not sut.fill("q", 15, meta, bodies[14:18]), "some of them were"
    assert not sut.fill("other", 17, meta, bodies[16:])
    check(sut)
    assert take(sut) == [17, 18, 19, 20]
    sut.gone_all([(1, COUNT)], 0)
    assert before > sut.memory_bytes == QUEUE_BYTES
