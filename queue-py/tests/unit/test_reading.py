"""What lies on disk comes into memory before its turn, as far as there is room."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest_asyncio

from message_queue.core.operations import Consume, NewMessage, Produce
from message_queue.reading import AHEAD_BYTES

sys.path.insert(0, str(Path(__file__).parent))
from queue_house import House, consume, fill, until


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House.opened(tmp_path) as house:
        yield house


async def test_what_lies_on_disk_is_read_before_its_turn_where_there_is_memory(
    house: House,
) -> None:
    host = await house.host("q")
    host.owner.keep_bodies = house.memory.keep_bodies = False
    ids = await fill(house, "q", 900)
    got = await consume(house, "q", 50)
    assert host.owner.delivery.parcels.bytes == 0, "there is no room"
    house.memory.keep_bodies = True
    got += await consume(house, "q", 50)
    while len(got) < 900:
        await until(lambda: host.owner.delivery.at_hand("q"))
        delivered = host.consume_now(Consume("q", 50, True))
        assert delivered is not None
        got += msgspec.json.decode(delivered.answer.body)["messages"]
    assert [m["id"] for m in got] == ids
    assert all(m["headers"] == {"n": m["body"]} and m["attempt"] == 1 for m in got)
    assert host.owner.delivery.parcels.bytes == 0


async def test_what_is_half_in_memory_is_left_to_those_who_wait_and_not_leased_meanwhile(
    house: House,
) -> None:
    host = await house.host("q")
    ids = await fill(house, "q", 20)
    host.owner.keep_bodies = house.memory.keep_bodies = False
    ids += await fill(house, "q", 20)
    assert host.consume_now(Consume("q", 40, True)) is None
    got = await consume(house, "q", 40)
    assert [m["id"] for m in got] == ids
    assert {m["attempt"] for m in got} == {1}


async def test_no_more_is_read_ahead_than_there_is_room_for_whatever_most_messages_are_like(
    house: House,
) -> None:
    host = await house.host("q")
    host.owner.keep_bodies = house.memory.keep_bodies = False
    large = NewMessage(b'"' + b"x" * 999_998 + b'"')
    for _ in range(3):
        await house.ask(Produce("q", (large, large), batch=True))
    for _ in range(2):
        await fill(house, "q", 1000)
    house.memory.keep_bodies = True
    await host._ahead.wait("q")
    assert AHEAD_BYTES <= host.owner.delivery.parcels.bytes < AHEAD_BYTES + 1_000_000
    got = await consume(house, "q", 50)
    assert len(got[0]["body"]) == 999_998
