"""A receipt names one delivery, for ever: no later one bears it, and one that was never given
settles nothing."""

from __future__ import annotations

from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.leases import decode_leases, encode_leases
from message_queue.core.delivery.model import Entry, Receipt, Settings, Verdict, parse_receipt
from message_queue.core.delivery.partition import PartitionDelivery

EPOCH = 3


def machine() -> PartitionDelivery:
    sut = PartitionDelivery(EPOCH)
    sut.put(Entry(dot=1, queue="q", body=b"1", body_bytes=1, enqueued_ms=0), 0)
    return sut


def take(sut: PartitionDelivery, now: int = 0) -> tuple[Receipt, int]:
    """The receipt, and the attempt that the consumer is told."""
    (entry,) = sut.take("q", 1, 100, now)
    assert isinstance(entry, Entry)
    check(sut)
    return Receipt(entry.epoch, entry.attempt), entry.seen


def test_the_receipt_of_a_released_delivery_never_names_another_one() -> None:
    sut = machine()
    first, attempt = take(sut)
    assert sut.release(1, first, 0) is Verdict.DONE
    second, again = take(sut)
    assert (attempt, again) == (1, 1), "nobody saw the first: it was no attempt"
    assert first < second
    # The releasing client asks again, for it heard no answer; or does anything else with it.
    assert sut.release(1, first, 0) is Verdict.OVERTAKEN
    assert sut.nack(1, first, 0, 0) is Verdict.OVERTAKEN
    assert sut.extend(1, first, 100, 0) is Verdict.OVERTAKEN
    assert sut.settle_span(1, 1, str(first)) == [(1, 1, Verdict.OVERTAKEN)]
    assert sut.settle_span(1, 1, str(second)) == [(1, 1, Verdict.DONE)]


def test_a_release_counts_as_no_attempt_towards_the_last_one() -> None:
    sut = machine()
    sut.configure("q", Settings(max_deliveries=2, dead_letter="d"), 0)
    for _ in range(5):
        sut.release(1, take(sut)[0], 0)
    sut.nack(1, None, 0, 0)
    assert take(sut)[1] == 1
    sut.nack(1, None, 0, 0)
    assert take(sut)[1] == 2
    assert not sut.drain()[1]
    sut.nack(1, None, 0, 0)
    assert len(sut.drain()[1]) == 1


def test_a_successor_knows_which_deliveries_were_no_attempts() -> None:
    sut = machine()
    sut.release(1, take(sut)[0], 0)
    receipt, _ = take(sut)
    (lease,) = decode_leases(encode_leases(sut.delivered.values(), sut.lots))
    successor = PartitionDelivery(EPOCH + 1)
    successor.put(Entry(dot=1, queue="q", body=b"1", body_bytes=1, enqueued_ms=0), 0)
    successor.restore_lease(lease, 0)
    entry = successor.entries[1]
    assert (Receipt(entry.epoch, entry.attempt), entry.seen) == (receipt, 1)
    check(successor)


def test_deliveries_that_only_a_note_tells_of_are_told_to_the_next_owner_too() -> None:
    sut = machine()
    sut.exhaust(1, 5)
    check(sut)
    assert list(sut.delivered) == [1]


def test_a_receipt_that_was_never_given_settles_nothing() -> None:
    for text in ("3.2", "3.99", "4.1", "9999999999999999.1", "3", "x", "", "3.1.1", "-3.1", "٣.1"):
        sut = machine()
        take(sut)
        assert sut.settle_span(1, 1, text) == [(1, 1, Verdict.OVERTAKEN)], text
        assert sut.nack(1, parse_receipt(text), 0, 0) is Verdict.OVERTAKEN, text
        assert sut.extend(1, parse_receipt(text), 50, 0) is Verdict.OVERTAKEN, text


def test_a_receipt_of_an_owner_whose_deliveries_were_forgotten_is_good() -> None:
    sut = machine()
    assert sut.settle_span(1, 1, "2.7") == [(1, 1, Verdict.DONE)]
    sut = machine()
    assert sut.settle_span(1, 1, "3.1") == [(1, 1, Verdict.OVERTAKEN)], (
        "in this epoch it was not delivered"
    )
