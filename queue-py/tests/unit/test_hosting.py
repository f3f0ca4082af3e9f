"""A partition at its owner with a real disk and a replication that is always of its opinion: what
lies only on disk, moves to dead letter queues and back, and refusals before room runs out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from message_queue.core.delivery.queues import QUEUE_BYTES
from message_queue.core.ids import parse_id
from message_queue.core.operations import (
    Answer,
    Configure,
    Consume,
    NewMessage,
    Operation,
    Produce,
    Purge,
    Redrive,
    Settle,
    refusal,
)
from message_queue.core.placement.ring import partition_of
from message_queue.memory import MessageMemory
from message_queue.storage.log import Trouble

sys.path.insert(0, str(Path(__file__).parent))
from queue_house import House, consume, exhaust, fill, length, until


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House.opened(tmp_path) as house:
        yield house


async def test_messages_without_memory_are_delivered_in_order_with_their_headers(
    house: House,
) -> None:
    (await house.host("q")).owner.keep_bodies = house.memory.keep_bodies = False
    ids = await fill(house, "q", 700)
    delivery = (await house.host("q")).owner.delivery
    assert delivery.length("q") == 700
    assert delivery.memory_bytes == QUEUE_BYTES
    house.memory.keep_bodies = True
    ids += await fill(house, "q", 300)
    for first in range(0, 1000, 90):
        got = await consume(house, "q", 90)
        assert [m["id"] for m in got] == ids[first : first + 90]
        assert all(m["headers"] == {"n": m["body"]} for m in got)


async def test_what_is_ready_is_leased_at_once_and_what_lies_on_disk_is_left_to_those_who_wait(
    house: House,
) -> None:
    host = await house.host("q")
    assert host.consume_now(Consume("q", 5, True)) is None, "nothing is there"
    ids = await fill(house, "q", 7)
    delivered = host.consume_now(Consume("q", 5, True))
    assert delivered is not None
    assert [m["id"] for m in msgspec.json.decode(delivered.answer.body)["messages"]] == ids[:5]
    delivered.undo()
    again = host.consume_now(Consume("q", 7))
    assert again is not None
    assert msgspec.json.decode(again.answer.body)["attempt"] == 1, "what was undone was no attempt"
    again.undo()
    host.owner.keep_bodies = house.memory.keep_bodies = False
    ids = await fill(house, "p", 3)
    other = await house.host("p")
    other.owner.keep_bodies = False
    ids += await fill(house, "p", 3)
    for _ in range(3):
        assert other.consume_now(Consume("p", 6, True)) is None
    got = await consume(house, "p", 6)
    assert [m["id"] for m in got] == ids
    assert {m["attempt"] for m in got} == {1}


async def test_who_stops_waiting_in_the_moment_of_the_grant_leaves_nothing_leased(
    house: House,
) -> None:
    host = await house.host("q")
    waiting = asyncio.create_task(host.consume(Consume("q", 1, False, 10_000)))
    await asyncio.sleep(0)
    polled = next(iter(host._polls.values()))
    produced = asyncio.create_task(fill(house, "q", 1))
    passes_on = host.after

    def after() -> None:
        passes_on()
        if polled.done():
            waiting.cancel()

    host.after = after  # type: ignore[method-assign]  # the client hangs up in that very turn
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await produced
    (message,) = await consume(house, "q", 1)
    assert message["attempt"] == 1
    timed = await host.consume(Consume("q", 1, False, 1))
    assert timed is not None
    assert timed.answer.status == 204
    assert not host.owner.delivery.waiting()


async def test_a_purge_ends_what_lies_only_on_disk_for_the_next_owner_too(house: House) -> None:
    await house.host("q")
    house.hosts[partition_of("q")].owner.keep_bodies = house.memory.keep_bodies = False
    await fill(house, "q", 300)
    await fill(house, "q", 5, group_id="g")
    answer = await house.ask(Purge("q"))
    assert msgspec.json.decode(answer.body)["messages"] == 305
    assert length(house, "q") == 0
    house.crash()
    assert (await house.host("q")).owner.delivery.length("q") == 0
    assert house.store.figures()["stored_records"] == 0


async def test_an_ack_of_what_is_being_purged_waits_for_the_purge(house: House) -> None:
    host = await house.host("q")
    host.owner.keep_bodies = house.memory.keep_bodies = False
    name = parse_id((await fill(house, "q", 3))[1])
    assert name is not None
    host.owner.purge(99, "q", delete=False)
    assert host.owner.settle(98, Settle(name.partition, (name.dot,), (None,))) is None
    house.flush(host)
    await until(lambda: not host.owner.in_flight)
    assert length(house, "q") == 0


async def test_a_letter_stays_at_its_source_until_its_target_has_it(house: House) -> None:
    refused = 0

    def refuse_some(operation: Operation) -> Answer | None:
        nonlocal refused
        refused += isinstance(operation, Produce) and operation.queue == "s.dead"
        return refusal(503, "not now") if 0 < refused <= 2 else None

    house.refuse = refuse_some
    ids = await fill(house, "s", 150)
    await exhaust(house, "s", 150)
    await until(lambda: refused == 2)
    assert length(house, "s") == 150
    await until(lambda: length(house, "s") == 0)
    letters = await consume(house, "s.dead", 1000)
    assert [m["source_id"] for m in letters] == ids
    assert all((m["source"], m["reason"]) == ("s", "max_deliveries") for m in letters)
    assert [m["body"] for m in letters] == list(range(150))
    assert all(m["headers"] == {"n": m["body"]} for m in letters)


async def test_a_move_cut_short_by_a_failover_is_taken_up_and_leaves_one_copy(
    house: House,
) -> None:
    await fill(house, "s", 40)
    stored = asyncio.Event()
    begun = house.ask

    async def cut(operation: Operation) -> Answer:
        answer = await begun(operation)
        if isinstance(operation, Produce) and operation.queue == "s.dead" and not stored.is_set():
            stored.set()
            house.crash()  # the letters are stored, their end is not
        return answer

    house.ask = cut  # type: ignore[method-assign]
    await exhaust(house, "s", 40)
    await stored.wait()
    # The next owner does not wait for another delivery to fail.
    host = await house.host("s")
    await until(lambda: host.owner.delivery.length("s") == 0)
    letters = await consume(house, "s.dead", 1000)
    assert [m["body"] for m in letters] == list(range(40))


async def test_a_clients_dedupe_id_does_not_swallow_a_letter(house: House) -> None:
    (source_id,) = await fill(house, "s", 1)
    decoy = NewMessage(b'"decoy"', dedupe_id=f"dead/{source_id}")
    assert (await house.ask(Produce("s.dead", (decoy,)))).status == 201
    await exhaust(house, "s", 1)
    await until(lambda: length(house, "s") == 0)
    assert [m["body"] for m in await consume(house, "s.dead", 9)] == ["decoy", 0]


async def test_one_redrive_at_a_time_all_letters_and_nothing_else(house: House) -> None:
    await fill(house, "s", 250)
    await exhaust(house, "s", 250)
    await until(lambda: length(house, "s") == 0)
    await house.ask(Produce("s.dead", (NewMessage(b'"stays"'),)))
    first, second = await asyncio.gather(
        house.ask(Redrive("s.dead", "s")), house.ask(Redrive("s.dead", "s"))
    )
    assert second.status == 409
    body = msgspec.json.decode(first.body)
    assert (first.status, body["status"], body["messages"]) == (200, "redriven", 250)
    assert sorted(m["body"] for m in await consume(house, "s", 1000)) == list(range(250))
    assert [m["body"] for m in await consume(house, "s.dead", 9)] == ["stays"]
    some = await house.ask(Redrive("s.dead", "s", 3))
    assert msgspec.json.decode(some.body)["messages"] == 0


async def test_a_redrive_cut_short_by_a_failover_is_finished_by_the_next_owner(
    house: House,
) -> None:
    await fill(house, "s", 350)
    await exhaust(house, "s", 350)
    await until(lambda: length(house, "s") == 0)
    begun, sent = house.ask, 0

    async def cut(operation: Operation) -> Answer:
        nonlocal sent
        answer = await begun(operation)
        if isinstance(operation, Produce) and operation.queue == "s":
            sent += 1
            if sent == 2:
                house.crash()
        return answer

    house.ask = cut  # type: ignore[method-assign]
    await house.ask(Redrive("s.dead", "s"))
    host = await house.host("s.dead")
    assert host.mover.redriving == {"s.dead"}
    await until(lambda: not host.mover.redriving)
    await house.host("s")
    assert sorted(m["body"] for m in await consume(house, "s", 1000)) == list(range(350))
    assert host.owner.delivery.length("s.dead") == 0


async def test_letters_whose_note_could_not_be_kept_at_once_are_moved_all_the_same(
    house: House,
) -> None:
    await fill(house, "s", 2)
    host = await house.host("s")
    keeps, failed = host.keep_note, 0

    async def fails_once(key: str, value: bytes) -> bool:
        nonlocal failed
        failed += 1
        return failed > 1 and await keeps(key, value)

    host.keep_note = fails_once  # type: ignore[method-assign]  # no quorum for a moment
    await exhaust(house, "s", 2)
    await until(lambda: length(house, "s.dead") == 2)
    assert length(house, "s") == 0


async def test_a_full_dead_letter_queue_keeps_no_other_queue_waiting(house: House) -> None:
    other = next(name for n in range(999) if partition_of(name := f"o{n}") == partition_of("s"))
    house.refuse = lambda op: (
        refusal(429, "Queue is full", 1)
        if isinstance(op, Produce) and op.queue == "s.dead"
        else None
    )
    await fill(house, "s", 3)
    await fill(house, other, 3)
    await exhaust(house, "s", 3)
    await exhaust(house, other, 3)
    await until(lambda: length(house, f"{other}.dead") == 3)
    assert length(house, "s") == 3
    # Who then wants them delivered on instead has them back.
    await house.ask(Configure("s", b'{"dead_letter":null}'))
    got: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while len(got) < 3:
            got += await consume(house, "s", 9)
            await asyncio.sleep(0.01)
    assert [m["body"] for m in got] == [0, 1, 2]
    house.crash()
    await house.host("s")
    assert length(house, "s") == 3
    assert len(await consume(house, "s", 9)) == 3, "nothing is noted any more"


@pytest.mark.parametrize(
    ("trouble", "status"), [(Trouble.FULL, 507), (Trouble.FAILING, 503), (None, 429)]
)
async def test_without_room_messages_are_refused_and_acks_are_taken(
    house: House, trouble: Trouble | None, status: int
) -> None:
    await fill(house, "q", 3)
    once = Produce("q", (NewMessage(b"1", dedupe_id="k"),))
    assert (await house.ask(once)).status == 201
    house.store._log.trouble = trouble
    house.memory.full = trouble is None
    answer = await house.ask(Produce("q", (NewMessage(b"1"),)))
    assert answer.status == status
    assert answer.retry_after_s
    assert (await house.ask(once)).status == 200, "it was stored, whatever there is room for now"
    got = await consume(house, "q", 9)
    assert len(got) == 4
    host = await house.host("q")
    for message in got:
        name = parse_id(message["id"])
        assert name is not None
        acked = await host.perform(Settle(name.partition, (name.dot,), (None,)))
        assert acked is not None
    assert length(house, "q") == 0


async def test_retention_ends_messages_that_lie_only_on_disk(house: House) -> None:
    host = await house.host("q")
    host.owner.keep_bodies = house.memory.keep_bodies = False
    await house.ask(Configure("q", b'{"retention_ms":5000}'))
    await fill(house, "q", 600)
    house.now_ms += 4_000
    await fill(house, "q", 10)
    house.now_ms += 1_500
    while host.owner.due(house.now_ms):
        host.owner.tick(house.now_ms)
        host.after()
    await until(lambda: length(house, "q") == 10)
    assert len(await consume(house, "q", 100)) == 10


def test_memory_is_full_only_of_what_cannot_leave_it() -> None:
    memory = MessageMemory(1 << 20)
    memory.look(in_play=2 << 20, index=100 << 20)
    assert not memory.keep_bodies
    assert not memory.full, "a small memory for bodies must not limit how many messages there are"
    memory.look(in_play=200 << 20, index=100 << 20)
    assert memory.full
    memory.look(in_play=0, index=100 << 20)
    assert memory.keep_bodies
    assert not memory.full
