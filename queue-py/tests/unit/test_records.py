"""A partition's record set by example; `tests/property/test_dots.py` has its laws."""

from __future__ import annotations

from message_queue.core.messages import Ack, Put
from message_queue.core.replication.records import RecordSet

EPOCH = 1025
PUT, ACK = Put(1, b"", b""), Ack(2, ((EPOCH, 1, 1),))


def test_a_put_that_comes_again_after_its_ack_stays_gone() -> None:
    records = RecordSet()
    records.apply(EPOCH, PUT)
    assert records.apply(EPOCH, ACK) == ((EPOCH, 1, 1),)
    records.apply(EPOCH, PUT)
    assert not records.held


def test_an_ack_that_overtook_its_put_voids_it() -> None:
    records = RecordSet()
    assert records.apply(EPOCH, ACK) == ()
    records.apply(EPOCH, PUT)
    assert not records.held
    assert records.context.has(EPOCH, 1)
