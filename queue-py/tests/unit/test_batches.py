"""Many messages at once through the delivery machine: stored as a run, waiting as bits and a parcel
of bodies, taken straight from there. (The property test mixes them; these fail without luck.)"""

from __future__ import annotations

from array import array
from itertools import groupby

from message_queue.core.delivery.backlog import Card
from message_queue.core.delivery.intake import SHARED_MS
from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.lots import Lot, singly
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.queues import QUEUE_BYTES
from message_queue.core.delivery.stored import MessageMeta, decode
from message_queue.core.operations import NewMessage, Produce
from message_queue.core.replication.drafts import RunDraft

RUN = 20


def body(dot: int) -> bytes:
    return b"body %d" % dot


def store(
    sut: PartitionDelivery, first: int, count: int = RUN, ready_at_ms: int = 0, keep: bool = True
) -> None:
    meta = MessageMeta("q", 0, 7, ready_at_ms=ready_at_ms)
    sut.put_run(first, meta, [body(dot) for dot in range(first, first + count)], keep, 0)
    check(sut)


def take(sut: PartitionDelivery, most: int, now: int = 0) -> list[int]:
    taken = singly(sut.take("q", most, 100, now))
    check(sut)
    assert [entry.body for entry in taken] == [body(entry.dot) for entry in taken]
    return [entry.dot for entry in taken]


def test_a_large_take_keeps_the_order_of_what_waits_and_of_what_its_delay_brings_among_it() -> None:
    sut = PartitionDelivery(3)
    store(sut, 1)
    store(sut, 21, count=1, ready_at_ms=5)
    store(sut, 22)
    sut.tick(5)
    assert take(sut, 30, now=5) == list(range(1, 31))
    assert take(sut, 30, now=5) == list(range(31, 42))


def test_a_large_take_across_runs_gives_each_message_its_own_body() -> None:
    sut = PartitionDelivery(3)
    store(sut, 1)
    store(sut, 21)
    store(sut, 50)
    assert take(sut, 3 * RUN) == [*range(1, 41), *range(50, 70)]


def test_a_parcel_is_taken_in_parts_and_each_message_keeps_its_own_body() -> None:
    sut = PartitionDelivery(3)
    store(sut, 1, count=3 * RUN)
    assert take(sut, 17) == list(range(1, 18))
    assert take(sut, 25) == list(range(18, 43))
    assert take(sut, 2 * RUN) == list(range(43, 61))


def test_what_comes_back_among_the_waiting_keeps_its_place_also_for_who_takes_one() -> None:
    """Fewer than are drawn from the backlog at once: these are called into the line."""
    sut = PartitionDelivery(3)
    store(sut, 1)
    store(sut, 21, count=1, ready_at_ms=5)
    store(sut, 22, count=100)
    sut.tick(5)
    assert [take(sut, 1, now=5) for _ in range(24)] == [[n] for n in range(1, 25)]


def test_a_purge_of_waiting_messages_gives_their_memory_back() -> None:
    sut = PartitionDelivery(3)
    store(sut, 1)
    assert sut.memory_bytes >= sum(len(body(dot)) for dot in range(1, RUN + 1))
    dots, waiting = sut.purge("q")
    assert waiting is not None
    assert not dots
    sut.purged(waiting)
    check(sut)
    assert sut.memory_bytes == QUEUE_BYTES


class LaggingShelf:
    """A disk that has the messages before `upto`."""

    def __init__(self) -> None:
        self.upto = 0

    def card(self, dot: int) -> Card | None:
        return Card("q", 0, len(body(dot)), 0) if dot < self.upto else None

    def sizes(self, first: int, count: int) -> array[int]:
        return array("I", [len(body(dot)) for dot in range(first, first + count)])


def test_a_full_memory_keeps_what_only_the_other_disks_have_until_this_one_has_it_too() -> None:
    """Each of them with an entry of its own, as before, took more memory and five times the work
    (seen in a bench whose memory was just full)."""
    shelf = LaggingShelf()
    sut = PartitionDelivery(3, shelf)
    for first in (1, 1 + RUN):
        store(sut, first, keep=False)
    assert len(sut.entries) == 0
    assert sorted(sut.parcels.dots()) == list(range(1, 1 + 2 * RUN))
    shelf.upto = 1 + RUN
    store(sut, 1 + 2 * RUN, keep=False)
    assert sorted(sut.parcels.dots()) == list(range(1 + RUN, 1 + 3 * RUN))
    first, *others = sut.take("q", 2 * RUN, 100, 0)
    assert isinstance(first, Lot)
    assert (first.first, first.count, first.bodies) == (1, RUN, None), "from disk"
    assert [entry.body for entry in singly(others)] == [body(dot) for dot in range(21, 41)]
    shelf.upto = 10 * RUN
    store(sut, 1 + 3 * RUN, keep=False)
    assert list(sut.parcels.dots()) == []
    assert sut.parcels.bytes == 0


def produced(owner: PartitionOwner, now_ms: int, body: bytes, **fields: int) -> None:
    message = NewMessage(body, **fields)  # type: ignore[arg-type]
    assert owner.produce(0, Produce("q", (message,)), now_ms, 5_000 + now_ms) is None


def runs_of(owner: PartitionOwner) -> list[int]:
    """Puts in each run, as the replication will stamp what waits."""
    drafts, _ = owner.gather(1 << 20)
    metas = [draft.meta for draft in drafts if isinstance(draft, RunDraft)]
    return [len(list(its)) for _, its in groupby(metas)]


def test_what_many_clients_send_one_by_one_within_milliseconds_becomes_one_run() -> None:
    owner = PartitionOwner(1, 1, lambda _: False)
    for ms in range(SHARED_MS + 1):
        produced(owner, 100 + ms, b"%d" % ms)
    produced(owner, 101 + SHARED_MS, b"the next one")
    assert runs_of(owner) == [SHARED_MS + 1, 1]


def test_a_delay_and_a_lifetime_are_counted_from_the_moment_of_their_own_request() -> None:
    owner = PartitionOwner(1, 1, lambda _: False)
    for ms in (100, 103):
        produced(owner, ms, b"1", delay_ms=50)
    for ms in (104, 107):
        produced(owner, ms, b"2", ttl_ms=50)
    drafts, _ = owner.gather(1 << 20)
    metas = [decode(draft.meta) for draft in drafts if isinstance(draft, RunDraft)]
    assert [m.ready_at_ms or m.expires_ms for m in metas if isinstance(m, MessageMeta)] == [
        150, 153, 154, 157,
    ]  # fmt: skip


def test_messages_that_differ_in_more_than_their_bodies_share_no_meta() -> None:
    owner = PartitionOwner(1, 1, lambda _: False)
    produced(owner, 100, b"1")
    produced(owner, 100, b"2", priority=3)
    produced(owner, 100, b"3", priority=3)
    assert owner.produce(0, Produce("r", (NewMessage(b"4", priority=3),)), 100, 5_100) is None
    assert runs_of(owner) == [1, 2, 1]
