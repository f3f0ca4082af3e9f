"""Peer links on real sockets: order, batching, refusals, loss, reconnection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from message_queue.core.messages import Canvass, PeerMessage, Soft
from message_queue.metrics import Metrics
from message_queue.transport import links as module
from message_queue.transport import outgoing
from message_queue.transport.links import LINK_PATH, SECRET_HEADER, Hello, Links
from message_queue.websocket import BINARY, FrameReader
from testkit.cluster import free_port


class Side:
    """One node's links and what they told."""

    def __init__(self, position: int, ports: Sequence[int], **changes: object) -> None:
        self.port = ports[position]
        self.frames: list[tuple[int, int, list[PeerMessage]]] = []
        self.up: list[str] = []
        self.down: list[int] = []
        self.dismissed: list[int] = []
        self.departed: set[int] = set()
        self.new: set[int] = set()
        self.metrics = Metrics()
        secret = changes.pop("secret", None)
        hello = {
            "position": position,
            "node_id": f"n{position}",
            "addr": f"127.0.0.1:{self.port}",
            "cluster": "c",
            "incarnation": 10 + position,
        }
        self.links: Links[PeerMessage] = Links(
            Hello(**{**hello, **changes}),
            {n: f"http://127.0.0.1:{port}" for n, port in enumerate(ports) if n != position},
            message_type=PeerMessage,
            on_batch=lambda p, i, messages: self.frames.append((p, i, list(messages))),
            on_up=lambda hello: self.up.append(hello.addr),
            on_down=self.down.append,
            secret=secret,  # type: ignore[arg-type]  # a test's keyword
            client_ssl=None,
            metrics=self.metrics,
            on_left=self.dismissed.append,
            has_left=self.departed.__contains__,
            may_be_new=self.new.__contains__,
        )
        self.runner: web.AppRunner | None = None

    async def start(self) -> None:
        await self.listen()
        await self.links.start()

    async def listen(self) -> None:
        app = web.Application()
        app.router.add_get(LINK_PATH, self.links.accept)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        await self.links.stop()
        if self.runner is not None:
            await self.runner.cleanup()

    def received(self) -> list[PeerMessage]:
        return [message for _, _, messages in self.frames for message in messages]


@asynccontextmanager
async def pair(**changes: object) -> AsyncIterator[tuple[Side, Side]]:
    """Two nodes; the changes are the second's."""
    ports = [free_port(), free_port()]
    sides = Side(0, ports, secret=changes.pop("first_secret", None)), Side(1, ports, **changes)
    try:
        for side in sides:
            await side.start()
        yield sides
    finally:
        for side in sides:
            await side.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the condition is not ours to signal
            await asyncio.sleep(0.005)


async def test_messages_arrive_in_order_with_the_senders_incarnation() -> None:
    async with pair() as (a, b):
        await until(lambda: 1 in a.links.connected)
        for n in range(500):
            assert a.links.send(1, Canvass(0, n))
        await until(lambda: len(b.received()) == 500)
        assert [m.epoch for m in b.received()] == list(range(500))  # type: ignore[union-attr]
        assert {(p, i) for p, i, _ in b.frames} == {(0, 10)}
        assert len(b.frames) < 500, "what gathers leaves together"


async def test_one_message_to_several_peers_is_encoded_once_and_announced_addresses_are_told() -> (
    None
):
    async with pair() as (a, b):
        await until(lambda: a.up and b.up)
        assert a.up == [f"127.0.0.1:{b.port}"]
        message = Soft(0, 64, b"x")
        a.links.send_all([(1, message), (1, message)])
        await until(lambda: len(b.received()) == 2)
        assert b.received() == [message, message]


async def test_what_several_steps_send_together_leaves_as_one_frame() -> None:
    async with pair() as (a, b):
        await until(lambda: a.up)
        with a.links.together():
            a.links.send_all([(1, Soft(0, 64, b"x"))])
            with a.links.together():
                a.links.send_all([(1, Soft(1, 64, b"y")), (1, Soft(2, 64, b"z"))])
        a.links.send_all([(1, Soft(3, 64, b"alone"))])
        await until(lambda: len(b.received()) == 4)
        assert [[m.partition for m in batch] for _, _, batch in b.frames] == [[0, 1, 2], [3]]  # type: ignore[union-attr]


async def test_what_is_sent_to_a_peer_that_is_away_is_dropped() -> None:
    ports = [free_port(), free_port()]
    alone = Side(0, ports)
    await alone.start()
    try:
        assert not alone.links.send(1, Canvass(0, 1))
        assert alone.metrics.peer_messages_dropped == 1
    finally:
        await alone.stop()


async def test_a_broken_link_is_told_and_mended() -> None:
    async with pair() as (a, b):
        await until(lambda: 1 in a.links.connected)
        assert b.runner is not None
        await b.runner.cleanup()
        await until(lambda: a.down == [1])
        assert not a.links.send(1, Canvass(0, 1))
        await b.listen()
        await until(lambda: 1 in a.links.connected)
        assert a.links.send(1, Canvass(0, 2))
        await until(b.received)
        assert b.received() == [Canvass(0, 2)]


async def test_a_peer_that_dials_is_dialled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it was tried in vain before."""
    monkeypatch.setattr(module, "RECONNECT_S", (60.0, 60.0))
    ports = [free_port(), free_port()]
    first, second = Side(0, ports), Side(1, ports)
    dialled: list[bool] = []

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(True)
        writer.close()

    try:
        async with await asyncio.start_server(hang_up, "127.0.0.1", second.port):
            await first.start()
            await until(lambda: dialled)
        await second.start()
        await until(lambda: first.up)
    finally:
        await first.stop()
        await second.stop()


async def test_a_wrong_secret_is_refused() -> None:
    async with pair(first_secret=b"one", secret=b"two") as (a, b):
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {SECRET_HEADER: "two"}, {SECRET_HEADER: "oné"}):
                url = f"http://127.0.0.1:{a.port}{LINK_PATH}"
                async with session.get(url, headers=headers) as reply:
                    assert reply.status == 403
        assert not a.links.connected
        assert not b.links.connected


GREETING = {"position": 1, "node_id": "n1", "addr": "x", "cluster": "c", "incarnation": 1}


@asynccontextmanager
async def one() -> AsyncIterator[tuple[Side, str]]:
    """A node whose only peer is played by the test, and where to dial it."""
    ports = [free_port(), free_port()]
    node = Side(0, ports)
    await node.start()
    try:
        yield node, f"http://127.0.0.1:{node.port}{LINK_PATH}"
    finally:
        await node.stop()


async def greeted(url: str, **changes: object) -> aiohttp.WSMsgType:
    """How the node answers a greeting."""
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
        await ws.send_bytes(msgspec.msgpack.encode({**GREETING, **changes}))
        return (await ws.receive(timeout=20)).type


async def test_strangers_are_refused() -> None:
    async with one() as (node, url):
        for changes in ({"cluster": "other"}, {"position": 7}, {"position": 0}, {"position": "1"}):
            assert await greeted(url, **changes) is aiohttp.WSMsgType.CLOSE
        assert not node.links.connected


async def test_who_may_have_joined_meanwhile_is_listened_to() -> None:
    ports = [free_port() for _ in range(4)]
    # Node 0 knows of three; node 3 came later, and all of them know where node 0 is.
    old, new = Side(0, ports[:3]), Side(3, ports)
    old.new.add(3)
    await old.start()
    await new.start()
    try:
        await until(lambda: new.up)
        new.links.send(0, Canvass(1, 2))
        await until(lambda: old.frames)
        assert old.frames == [(3, 13, [Canvass(1, 2)])]
        assert not old.links.send(3, Canvass(1, 2))  # not before the ring says who that is
        old.links.add(3, f"http://127.0.0.1:{ports[3]}")
        await until(lambda: len(old.up) == 1)
    finally:
        await old.stop()
        await new.stop()


async def test_a_position_belongs_to_the_first_id_that_took_it() -> None:
    async with one() as (_, url):
        assert await greeted(url) is aiohttp.WSMsgType.BINARY
        assert await greeted(url, node_id="thief") is aiohttp.WSMsgType.CLOSE
        assert await greeted(url) is aiohttp.WSMsgType.BINARY


async def test_garbage_closes_the_link_and_reaches_nobody() -> None:
    async with one() as (node, url):
        nested = b"\x91" * 100_000
        for garbage in (b"", b"\xc1", b"\x91\x92\x63\x00", nested, b"\x91\x93\x03\xff\x00"):
            async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
                await ws.send_bytes(msgspec.msgpack.encode(GREETING))
                await ws.receive(timeout=20)
                await ws.send_bytes(garbage)
                assert (await ws.receive(timeout=20)).type in (
                    aiohttp.WSMsgType.CLOSE,
                    aiohttp.WSMsgType.CLOSED,
                )
        assert not node.frames


class Slow:
    """A connection that takes one frame, and more only when it is told to."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.room: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def send_bytes(self, frame: bytes) -> None:
        self.frames.append(frame)
        await self.room


async def test_an_outbox_is_bounded_and_keeps_its_order_behind_a_frame_that_waits() -> None:
    slow, metrics = Slow(), Metrics()
    link = outgoing.Outgoing(metrics)
    assert not link.put(b"x"), "down"
    link.raise_up(slow)  # type: ignore[arg-type]  # a test's connection
    link.put(b"\x01")
    link.write()
    assert slow.frames == [b"\x91\x01"], "in the turn that made it"
    link.put(b"\x02")
    link.write()
    link.put(b"\x03")
    link.write()
    assert len(slow.frames) == 1, "no frame passes the one that waits"
    slow.room.set_result(None)
    await asyncio.sleep(0)
    await link.drained()
    assert slow.frames[1:] == [b"\x92\x02\x03"]
    slow.room = asyncio.get_running_loop().create_future()
    link.put(b"\x04")
    link.write()
    piece = bytes(outgoing.OUTBOX_BYTES // 4)
    assert [link.put(piece) for _ in range(5)] == [True] * 4 + [False]
    link.lower()
    await link.drained()
    assert not link.put(b"x")


class Transport:
    """Of a connection that has been opened: as full as it is told to be."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.buffered = 0
        self.closing = False

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written.append(data)


class Writer:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport


async def test_a_transport_with_room_is_written_to_without_a_detour() -> None:
    slow, transport = Slow(), Transport()
    slow._writer = Writer(transport)  # type: ignore[attr-defined]  # as aiohttp's have
    link = outgoing.Outgoing(Metrics())
    link.raise_up(slow)  # type: ignore[arg-type]  # a test's connection
    sizes = (1, 124, 125, 126, 65_534, 65_535, 70_000)
    for size in sizes:
        link.put(b"\x05" * size)
        link.write()
    reader = FrameReader(1 << 20)
    (*frames,) = (frame for data in transport.written for frame in reader.feed(data))
    assert frames == [(BINARY, b"\x91" + b"\x05" * size) for size in sizes]
    assert slow.frames == []
    transport.buffered = outgoing.ROOM_BYTES
    link.put(b"\x01")
    link.write()
    transport.buffered = 0
    link.put(b"\x02")
    link.write()
    assert (slow.frames, len(transport.written)) == ([b"\x91\x01"], len(sizes))
    slow.room.set_result(None)
    await asyncio.sleep(0)
    await link.drained()
    assert reader.feed(transport.written[-1]) == [(BINARY, b"\x91\x02")]
    transport.closing = True
    link.put(b"\x03")
    link.write()
    assert len(transport.written) == len(sizes) + 1
    link.lower()


async def test_who_meets_a_node_that_has_left_tells_it_so_and_does_not_take_it_for_itself() -> None:
    ports = [free_port(), free_port()]
    member, departed = Side(0, ports), Side(1, ports)
    member.departed.add(1)
    try:
        await member.start()
        await departed.start()
        async with asyncio.timeout(20):
            # Both have dialled by then, again and again.
            while len(departed.dismissed) < 3:  # noqa: ASYNC110 - a condition without an event
                await asyncio.sleep(0.01)
        assert set(departed.dismissed) == {0}
        assert member.dismissed == []
    finally:
        await member.stop()
        await departed.stop()
