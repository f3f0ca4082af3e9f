"""Links between two members over real sockets: frames whole, strangers out, silence noticed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from mesi_cache.core.messages import Inv, Message
from mesi_cache.metrics import Metrics
from mesi_cache.transport import links as transport
from mesi_cache.transport.links import LINK_PATH, MAX_HELLO_BYTES, Hello, Links
from mesi_cache.transport.stream import FrameStream


class Member:
    """One end: a web server whose only route is the link's."""

    def __init__(self, name: str, secret: bytes | None = None, cluster: str = "c") -> None:
        self.name, self.secret, self.cluster = name, secret, cluster
        self.got: list[tuple[str, Any]] = []
        self.up: list[str] = []
        self.down: list[str] = []
        self.differ: list[str] = []
        self.url = ""
        self.links: Links[Message]

    def batch(self, hello: Hello, messages: Sequence[Message]) -> None:
        self.got += [(hello.node_id, message) for message in messages]

    async def serve(self) -> web.AppRunner:
        app = web.Application()

        async def accept(request: web.Request) -> web.StreamResponse:
            return await self.links.accept(request)

        app.router.add_get(LINK_PATH, accept)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def dial(self, *others: Member) -> None:
        self.links = Links(
            Hello(self.url, self.name, self.cluster, 1),
            {other.url: other.url for other in others},
            message_type=Message, on_batch=self.batch, on_up=lambda h: self.up.append(h.node_id),
            on_down=self.down.append, on_other_members=self.differ.append, secret=self.secret,
            client_ssl=None, metrics=Metrics(),
        )  # fmt: skip
        await self.links.start()


@asynccontextmanager
async def pair(**second: Any) -> AsyncIterator[tuple[Member, Member]]:
    a, b = Member("A"), Member("B", **second)
    runners = [await member.serve() for member in (a, b)]
    await a.dial(b)
    await b.dial(a)
    try:
        yield a, b
    finally:
        for member in (a, b):
            await member.links.stop()
        for runner in runners:
            await runner.cleanup()


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        await asyncio.sleep(0.01)


async def raw(
    member: Member, headers: str = "Upgrade: mesi-link\r\nConnection: Upgrade\r\n"
) -> Any:
    host, port = member.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {LINK_PATH} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    return reader, writer, await reader.readuntil(b"\r\n\r\n")


async def test_what_one_turn_says_arrives_whole_and_in_order_however_large() -> None:
    async with pair() as (a, b):
        await until(lambda: a.up and b.up, "both links are up")
        large = "x" * 3_000_000
        sent = [Inv("k", number, large if number % 100 == 7 else "") for number in range(500)]
        for message in sent:
            a.links.send(b.url, message)
        await until(lambda: len(b.got) == len(sent), "all have arrived")
        assert [message for _, message in b.got] == sent
        assert {name for name, _ in b.got} == {"A"}
        assert a.links.connected == {b.url}


async def test_bytes_that_are_no_frames_end_only_their_own_connection() -> None:
    async with pair() as (a, b):
        await until(lambda: a.up and b.up, "both links are up")
        hello = msgspec.msgpack.encode(Hello(b.url, "B", "c", 1))
        for garbage in (
            b"\xff" * 100,
            (MAX_HELLO_BYTES + 1).to_bytes(4, "little") + b"x" * 100,
            (3).to_bytes(4, "little") + b"\xc1\xc1\xc1",
            len(hello).to_bytes(4, "little") + hello + (5).to_bytes(4, "little") + b"\x91" * 5,
        ):
            reader, writer, head = await raw(a)
            assert b" 101 " in head.split(b"\r\n")[0]
            writer.write(garbage)
            async with asyncio.timeout(10):
                while await reader.read(4096):
                    pass
            writer.close()
        # The last one had taken the real link's place: B comes back by itself.
        before = len(b.got)
        await until(lambda: len(b.up) >= 1 and b.links.connected == {a.url}, "B is linked again")
        a.links.send(b.url, Inv("k", 1, ""))
        await until(lambda: len(b.got) == before + 1, "A's own link still works")


async def test_who_has_not_the_secret_or_is_no_peer_is_not_let_in() -> None:
    async with pair(secret=b"hush") as (a, b):
        await until(lambda: b.up, "A asks for no secret")
        assert not a.up
        _, writer, head = await raw(b)
        assert b" 403 " in head.split(b"\r\n")[0]
        writer.close()
        _, writer, head = await raw(a, "Upgrade: websocket\r\nConnection: Upgrade\r\n")
        assert b" 426 " in head.split(b"\r\n")[0]
        writer.close()


async def test_another_member_list_is_told_on_both_sides() -> None:
    async with pair(cluster="other") as (a, b):
        await until(lambda: a.differ and b.differ, "both say so")
        assert not a.up
        assert not b.up


async def test_a_peer_that_falls_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "KEEPALIVE_S", 0.05)
    async with pair() as (a, b):
        await until(lambda: a.up and b.up, "both links are up")
        assert a.links.connected
        monkeypatch.setattr(FrameStream, "alive", lambda self: None)
        await until(lambda: b.url in a.down, "silence is taken for a broken link")
