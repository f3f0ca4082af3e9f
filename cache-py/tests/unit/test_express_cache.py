"""The short way answers as aiohttp's way does, in order, and takes nothing that is not plain."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from mesi_cache import config as configuration
from mesi_cache.api import app as application
from mesi_cache.api import connection
from mesi_cache.api.events import EventHub
from mesi_cache.api.express import Express, plain_request
from mesi_cache.api.keys import Listener, Service
from mesi_cache.core.records import Incr, Operation, Outcome, Write
from mesi_cache.core.step import Answer, Changed, Found, Missing, Unavailable
from mesi_cache.metrics import Metrics

PROBLEM = b"Host: x\r\nAccept: application/problem+json\r\n"
HEAD = b"Host: 127.0.0.1:8000\r\nAccept: */*\r\nX-Request-Id: r-1\r\n"


Address = tuple[str, int]


class FakeNode:
    """Answers by the key. Keys named `wait…` wait for ever, `hit…` are answered at once."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, Operation | None]] = []
        self.short: list[bool] = []  # whether it came by the short way
        self.waiting: asyncio.Queue[Listener] = asyncio.Queue()

    def lookup(self, key: str) -> Found | None:
        return Found(b'{"n":[1,2]}', 7, "S", True) if key.startswith("hit") else None

    def begin(self, key: str, operation: Operation | None, listener: Listener) -> None:
        self.begun.append((key, operation))
        self.short.append(not isinstance(listener, asyncio.Future))
        if key.startswith("wait"):
            self.waiting.put_nowait(listener)
            return
        asyncio.get_running_loop().call_soon(listener.set_result, _answer(key, operation))

    async def _asked(self, key: str, operation: Operation | None) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.begin(key, operation, future)
        return await future

    async def read(self, key: str) -> Answer:
        return await self._asked(key, None)

    async def change(self, key: str, operation: Operation, name: str | None = None) -> Answer:
        return await self._asked(key, operation)

    def status(self) -> dict[str, object]:
        return {"id": "a"}


def _answer(key: str, operation: Operation | None) -> Answer:
    if key == "gone":
        return Unavailable(operation is None, "The key's home does not answer")
    if operation is None:
        return Missing() if key == "absent" else Found(b'"x"', 3, "E", False)
    if key == "other":
        refused = "not_integer" if isinstance(operation, Incr) else "mismatch"
        return Changed(Outcome(refused, 5))
    return Changed(Outcome("done", 4, b"41" if isinstance(operation, Incr) else None))


class Wire:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """Status line, headers, body."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.rstrip().split(b"\r\n")
            headers = {k.lower(): v for k, v in (line.split(b": ", 1) for line in lines)}
            return first, headers, await self.reader.readexactly(int(headers[b"content-length"]))

    async def ask(self, *chunks: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
        for chunk in chunks:
            self.writer.write(chunk)
            await self.writer.drain()
            await asyncio.sleep(0.01)  # so that each arrives alone
        return await self.answer()


@asynccontextmanager
async def listening(node: FakeNode, tmp_path: Path, *, short: bool) -> AsyncIterator[Address]:
    config = configuration.parse(["--id=a", "--addr=127.0.0.1:8000", f"--data_dir={tmp_path}"])
    service, metrics = cast("Service", node), Metrics()
    runner = web.AppRunner(
        application.build(service, config, metrics, EventHub(), []), handler_cancellation=True
    )
    await runner.setup()
    express = Express(service, metrics, config.max_body_bytes) if short else None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(connection.factory(runner, express), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await runner.cleanup()


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Wire]:
    wire = Wire(*await asyncio.open_connection(*address))
    await asyncio.sleep(0.01)  # aiohttp's task of this connection begins to wait
    try:
        yield wire
    finally:
        wire.writer.close()
        await wire.writer.wait_closed()


@asynccontextmanager
async def serving(node: FakeNode, tmp_path: Path) -> AsyncIterator[Wire]:
    async with listening(node, tmp_path, short=True) as address, connected(address) as wire:
        yield wire


def get(path: bytes, head: bytes = HEAD) -> bytes:
    return b"GET %s HTTP/1.1\r\n%s\r\n" % (path, head)


def post(path: bytes, body: bytes, head: bytes = HEAD) -> bytes:
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (path, head, len(body), body)


REQUESTS = {
    "hit": get(b"/read?key=hit-1"),
    "miss": get(b"/read?key=k.1_~"),
    "absent": get(b"/read?key=absent"),
    "read 503": get(b"/read?key=gone"),
    "punctuation": get(b"/read?key=hit:a/b@c,d"),
    "escaped": get(b"/read?key=hit%20%3a%2F%25%26%3D%2b%3f%7F%7e"),
    "escaped twice": get(b"/read?key=hit%2541"),
    "umlaut": get(b"/read?key=hit%C3%A4"),
    "escaped control": get(b"/read?key=hit%0a"),
    "broken escape": get(b"/read?key=hit%4"),
    "longest key": get(b"/read?key=hit" + b"k" * 252 + b"%20"),
    "plus": get(b"/read?key=hit+a"),
    "no key": get(b"/read"),
    "empty key": get(b"/read?key="),
    "long key": get(b"/read?key=hit" + b"k" * 254),
    "equals": get(b"/read?key=hit=a"),
    "unknown parameter": get(b"/read?kay=hit"),
    "two parameters": get(b"/read?key=hit&key=hit"),
    "head": get(b"/read?key=hit").replace(b"GET", b"HEAD"),
    "write": post(b"/write", b'{"key":"a","value":{"n": [1, 2]},"ttl_ms":9}'),
    "write 503": post(b"/write", b'{"key":"gone","value":1}'),
    "cas": post(b"/cas", b'{"key":"a","expected_version":3,"value":null}'),
    "cas 409": post(b"/cas", b'{"key":"other","expected_version":3,"value":1}'),
    "delete": post(b"/delete", b'{"key":"\\u00e4"}'),
    "incr": post(b"/incr", b'{"key":"a","by":40}'),
    "incr 409": post(b"/incr", b'{"key":"other"}'),
    "bad field": post(b"/write", b'{"key":1,"value":1}'),
    "lone surrogate": post(b"/write", b'{"key":"a","value":"\\ud800"}'),
    "no json": post(b"/write", b"{"),
    "with a query": post(b"/write?key=a", b'{"key":"a","value":1}'),
    "wrong verb": post(b"/read?key=hit", b""),
    "status": get(b"/status"),
    "unknown": get(b"/nothing"),
    "problem": get(b"/read?key=absent", PROBLEM),
    "foreign page": post(b"/write", b'{"key":"a","value":1}', HEAD + b"Origin: http://evil\r\n"),
}
SHORT = {
    "hit", "punctuation", "escaped", "escaped twice", "longest key", "miss", "absent", "read 503",
    "write", "write 503", "cas", "cas 409", "delete", "incr", "incr 409",
}  # fmt: skip


async def test_both_ways_give_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    begin = Express.begin

    def noted(self: Express, *arguments: Any) -> bool:
        taken.append(begin(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(Express, "begin", noted)
    nodes = FakeNode(), FakeNode()
    async with (
        listening(nodes[0], tmp_path / "0", short=True) as short,
        listening(nodes[1], tmp_path / "1", short=False) as long,
    ):
        for name, request in REQUESTS.items():
            taken.clear()
            assert await _asked(short, request) == await _asked(long, request), name
            assert nodes[0].begun == nodes[1].begun, name
            assert (taken == [True]) == (name in SHORT), name


async def _asked(address: Address, request: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers, body; without what differs from request to request."""
    async with connected(address) as wire:
        if request.startswith(b"HEAD"):
            wire.writer.write(request)
            return (await wire.reader.readuntil(b"\r\n")), {}, b""
        first, headers, body = await wire.ask(request)
        assert re.fullmatch(rb"\w+, \d\d \w+ \d{4} [\d:]+ GMT", headers.pop(b"date"))
        if b"X-Request-Id" not in request:
            assert headers.pop(b"x-request-id")
        return first, headers, body


async def test_answers_come_in_the_order_of_requests(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        for key in (b"miss", b"hit-1"):
            wire.writer.write(get(b"/read?key=" + key))
            await asyncio.sleep(0.01)
        wire.writer.write(REQUESTS["status"] + post(b"/incr", b'{"key":"two"}'))
        answers = [await wire.answer() for _ in range(4)]
    assert [b'"miss"' in answers[0][2], b'"hit-1"' in answers[1][2]] == [True, True]
    assert [b'"id"' in answers[2][2], b'"two"' in answers[3][2]] == [True, True]


async def test_what_comes_while_a_request_waits_is_held_back_and_then_answered(
    tmp_path: Path,
) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        wire.writer.write(post(b"/write", b'{"key":"wait","value":1}'))
        listener = await asyncio.wait_for(node.waiting.get(), 20)
        wire.writer.write(get(b"/read?key=hit"))
        await asyncio.sleep(0.05)
        assert node.begun == [("wait", Write(b"1"))]
        listener.set_result(Changed(Outcome("done", 9)))
        assert b'"version":9' in (await wire.answer())[2]
        assert b'"hit":true' in (await wire.answer())[2]


async def test_a_client_that_hangs_up_is_told_nothing_and_nothing_breaks(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        wire.writer.write(post(b"/write", b'{"key":"wait","value":1}'))
        listener = await asyncio.wait_for(node.waiting.get(), 20)
    listener.set_result(Changed(Outcome("done", 9)))
    assert listener.done()


async def test_a_body_that_comes_after_its_head_is_waited_for(tmp_path: Path) -> None:
    """Python's http.client and all that is built on it send them apart."""
    request = post(b"/write", b'{"key":"a","value":"in pieces"}')
    nodes = FakeNode(), FakeNode()
    async with (
        listening(nodes[0], tmp_path / "0", short=True) as short,
        listening(nodes[1], tmp_path / "1", short=False) as long,
    ):
        for cut in (len(request) - 31, len(request) - 1):
            answers = []
            for address in (short, long):
                async with connected(address) as wire:
                    first, headers, body = await wire.ask(request[:cut], request[cut:])
                    del headers[b"date"]
                    again = await wire.ask(get(b"/read?key=hit"))
                    answers.append((first, headers, body, again[2]))
            assert answers[0] == answers[1]
    assert nodes[0].begun == nodes[1].begun
    assert (nodes[0].short, nodes[1].short) == ([True, True], [False, False])


async def test_a_body_too_long_to_be_held_goes_to_aiohttp(tmp_path: Path) -> None:
    value = b'"%s"' % (b"x" * connection.MAX_HELD_BYTES)
    request = post(b"/write", b'{"key":"a","value":%s}' % value)
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        answer = await wire.ask(request[:300], request[300:70_000], request[70_000:])
    assert answer[0] == b"HTTP/1.1 200 OK"
    assert node.begun == [("a", Write(value))]
    assert node.short == [False]


async def test_a_request_in_pieces_never_begins_in_the_middle(tmp_path: Path) -> None:
    """A piece that looks like a request of its own is still a piece."""
    inner = post(b"/write", b'{"key":"smuggled","value":1}')
    outer = b"POST /write HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (HEAD, len(inner))
    for pieces in ((outer, inner), (b"GET /status HTTP/1.1\r\nHost: x\r\nX-A: ", inner)):
        node = FakeNode()
        async with serving(node, tmp_path) as wire:
            await wire.ask(*pieces)
            assert node.begun == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        post(b"/write", b"{}") + b"x",
        post(b"/write", b"{}") * 2,
        post(b"/write", b"{}", HEAD + b"Content-Length: 2\r\n"),
        post(b"/write", b"{}", HEAD + b"host: x\r\n"),
        post(b"/write", b"{}", b""),
        post(b"/write", b"{}", HEAD + b"Transfer-Encoding: chunked\r\n"),
        post(b"/write", b"{}", HEAD + b"Content-Encoding: gzip\r\n"),
        post(b"/write", b"{}", HEAD + b"Expect: 100-continue\r\n"),
        post(b"/write", b"{}", HEAD + b"Connection: close\r\n"),
        post(b"/write", b"{}", HEAD + b"Idempotency-Key: a\r\n"),
        post(b"/write", b"{}", b"Host : x\r\n"),
        post(b"/write", b"{}", b"Host: x\r\nAccept: */*\r\n folded\r\n"),
        post(b"/write", b"{}", b"Host: x\nOrigin: y\r\n"),
        post(b"/write", b"{}").replace(b"1.1", b"1.0"),
        b"POST /write HTTP/1.1\r\nHost: x\r\n\r\n",
        get(b"/read?key=%c3%a4"),
        get(b"/read?key=%0a"),
        get(b"/read?key=%6"),
        get(b"/read?key=a&key=b"),
        get(b"/read?key=a#b"),
        get(b"/read?key=a?b"),
        get(b"/read?key=a", b""),
        get(b"/read?key=a")[:-2],
    ],
)
def test_only_whole_and_plain_requests_are_taken(data: bytes) -> None:
    assert plain_request(data) is None


def test_a_hostile_head_costs_no_more_than_its_length() -> None:
    assert plain_request(b"GET / HTTP/1.1\r\n" + b"host:  \r\n" * 20_000 + b"!") is None
