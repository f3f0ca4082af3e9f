"""Links carry batches between nodes that know each other, and nothing from anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from lock_manager.core.peer_book import PROTOCOL, Hello, PeerBook, PeerIdentity
from lock_manager.core.raft import (
    AppendEntries,
    Configuration,
    Entry,
    EntryKind,
    Member,
    Message,
    TimeoutNow,
)
from lock_manager.transport import LINK_PATH, SECRET_HEADER, Links

MEMBERS = Configuration(tuple(Member(node_id=position) for position in (1, 2, 3)))


def hello(position: int, **changes: object) -> Hello:
    usual = Hello(
        protocol=PROTOCOL, position=position, node_id=f"node{position}", store_id=f"store{position}"
    )
    return msgspec.structs.replace(usual, **changes)


def append(sender: int, to: int, index: int = 1, payload: bytes = b"x") -> AppendEntries:
    entry = Entry(index, 1, EntryKind.COMMAND, payload)
    return AppendEntries(
        sender=sender, to=to, term=1, prev_index=index - 1, prev_term=0, entries=(entry,)
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any of several events may make it true
            await asyncio.sleep(0.002)


class End:
    """One node's end: its links, a server that accepts, and what arrived."""

    def __init__(self, me: Hello, secret: bytes | None = None) -> None:
        self.received: list[Message] = []
        self.broken: list[int] = []
        self.book = PeerBook(me, {}, lambda peer: None)
        self.book.follow(MEMBERS)
        self.links = Links(
            me,
            admit=self.book.judge,
            on_messages=lambda position, messages: self.received.extend(messages),
            on_broken=self.broken.append,
            secret=secret,
        )
        self.address = ""

    async def __aenter__(self) -> End:
        app = web.Application()
        app.router.add_get(LINK_PATH, self.links.accept)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.links.stop()
        await self._runner.cleanup()


@asynccontextmanager
async def pair(one: End, two: End) -> AsyncIterator[None]:
    async with one, two:
        one.links.connect({2: two.address})
        two.links.connect({1: one.address})
        await until(lambda: bool(one.links.connected and two.links.connected))
        yield


async def test_messages_arrive_in_order_and_in_batches() -> None:
    one, two = End(hello(1)), End(hello(2))
    async with pair(one, two):
        one.links.send(append(1, 2, index) for index in range(1, 501))
        for index in range(501, 1001):
            one.links.send([append(1, 2, index)])
        two.links.send([append(2, 1)])
        await until(lambda: len(two.received) == 1000 and len(one.received) == 1)
        assert [m.prev_index for m in two.received] == list(range(1000))
        assert one.links.counters.frames_sent <= 501
        assert one.links.counters.messages_sent == 1000
        assert one.links.counters.dropped == 0


async def test_what_is_sent_to_a_link_that_is_down_is_dropped_and_the_link_comes_back() -> None:
    one, two = End(hello(1)), End(hello(2))
    async with one:
        async with two:
            address = two.address
            one.links.connect({2: address})
            await until(lambda: bool(one.links.connected))
        await until(lambda: one.broken == [2])
        one.links.send([append(1, 2)])
        assert one.links.counters.dropped == 1
        again = End(hello(2))
        async with again:
            one.links.connect({2: again.address})
            await until(lambda: bool(one.links.connected))
            one.links.send([append(1, 2, 7)])
            await until(lambda: len(again.received) == 1)


async def test_a_peer_that_does_not_read_costs_bounded_memory_and_gets_the_rest_when_it_does() -> (
    None
):
    one, two = End(hello(1)), End(hello(2))
    async with pair(one, two):
        payload = b"x" * (1 << 20)
        sent = 0
        while not one.links.counters.dropped:  # nobody reads: this turn of the loop does not end
            one.links.send([append(1, 2, sent + 1, payload)])
            sent += 1
            assert sent < 200
        await until(lambda: len(two.received) == sent - 1)
        assert [m.prev_index for m in two.received] == list(range(sent - 1))
        one.links.send([append(1, 2, sent)])
        await until(lambda: len(two.received) == sent)


@pytest.mark.parametrize(
    "stranger",
    [
        hello(2, protocol=PROTOCOL + 1),
        hello(1),  # claims the other's own position
        hello(2, node_id="node1"),
        hello(2, node_id=""),
        hello(4),  # no member
    ],
)
async def test_a_stranger_is_refused(stranger: Hello) -> None:
    one, two = End(hello(1)), End(stranger)
    async with one, two:
        two.links.connect({1 if stranger.position != 1 else 3: one.address})
        await until(lambda: one.links.counters.refused > 0)
        assert not two.links.connected


async def test_the_secret_is_demanded() -> None:
    one, two = End(hello(1), secret=b"s3cret"), End(hello(2), secret=b"other")
    async with one, two:
        two.links.connect({1: one.address})
        await until(lambda: one.links.counters.refused > 1)
        assert not two.links.connected


async def test_hostile_frames_close_the_link_and_reach_nobody() -> None:
    frames = [
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode([[99, 2, 1, 1]]),
        msgspec.msgpack.encode([[7, 2, 1, -5]]),
        msgspec.msgpack.encode([[7, 2, 1, 2**63]]),
        msgspec.msgpack.encode([TimeoutNow(sender=3, to=1, term=1)]),  # speaks for another
        msgspec.msgpack.encode([TimeoutNow(sender=2, to=3, term=1)]),  # is for another
    ]
    one = End(hello(1), secret=b"s3cret")
    async with one, aiohttp.ClientSession() as session:
        for frame in frames:
            async with session.ws_connect(
                f"ws://{one.address}{LINK_PATH}", headers={SECRET_HEADER: "s3cret"}
            ) as socket:
                await socket.send_bytes(msgspec.msgpack.encode(hello(2)))
                greeting = await socket.receive(timeout=20)
                assert msgspec.msgpack.decode(greeting.data, type=Hello) == hello(1)
                await socket.send_bytes(frame)
                closing = await socket.receive(timeout=20)
                assert closing.type is aiohttp.WSMsgType.CLOSE
        assert one.received == []
        assert one.links.counters.refused == len(frames)


# ------------------------------------------------------------------------------------ the peer book


def test_a_node_that_lost_its_disk_is_refused_until_it_was_added_again() -> None:
    stored: list[PeerIdentity] = []
    book = PeerBook(hello(1), {}, stored.append)
    book.follow(MEMBERS)
    assert book.judge(hello(2)) is None
    assert stored == [PeerIdentity(2, "node2", "store2")]
    assert book.judge(hello(2)) is None
    assert len(stored) == 1
    wiped = hello(2, store_id="fresh")
    assert "its disk was lost" in (book.judge(wiped) or "")
    # Also after a restart of this node, and whatever it saw itself if the cluster agreed on it.
    again = PeerBook(hello(1), {2: stored[0]}, stored.append)
    again.follow(MEMBERS)
    assert "its disk was lost" in (again.judge(wiped) or "")
    agreed = Configuration((Member(node_id=1), Member(node_id=2, name="node2", store_id="store2")))
    late = PeerBook(hello(1), {}, stored.append)
    late.follow(agreed)
    assert "its disk was lost" in (late.judge(wiped) or "")
    # Removed and added again: whatever store it brings is its store from now on.
    late.follow(Configuration((Member(node_id=1),)))
    late.follow(Configuration((Member(node_id=1), Member(node_id=2, voter=False))))
    assert late.judge(wiped) is None
    assert "its disk was lost" in (late.judge(hello(2)) or "")


def test_a_node_that_waits_to_be_added_listens_to_everybody() -> None:
    book = PeerBook(hello(4), {}, lambda peer: None)
    book.follow(Configuration())
    assert book.judge(hello(1)) is None
    assert book.judge(hello(1, store_id="fresh")) is not None


def test_a_name_belongs_to_one_position() -> None:
    book = PeerBook(hello(1), {}, lambda peer: None)
    book.follow(MEMBERS)
    assert book.judge(hello(2)) is None
    assert "is at position 2" in (book.judge(hello(3, node_id="node2")) or "")
    assert "is node 'node2'" in (book.judge(hello(2, node_id="nodeX")) or "")


def test_the_leader_learns_what_the_configuration_does_not_say_yet() -> None:
    book = PeerBook(hello(1), {}, lambda peer: None)
    book.follow(MEMBERS)
    assert book.unrecorded() == Member(node_id=1, name="node1", store_id="store1")
    named = Member(node_id=1, name="node1", store_id="store1")
    book.follow(Configuration((named, *MEMBERS.members[1:])))
    assert book.unrecorded() is None
    assert book.judge(hello(3)) is None
    assert book.unrecorded() == Member(node_id=3, name="node3", store_id="store3")
