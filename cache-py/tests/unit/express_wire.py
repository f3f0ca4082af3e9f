"""A node that answers by the key, served with the short way or without; raw connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

from aiohttp import web

from mesi_cache import config as configuration
from mesi_cache.api import app as application
from mesi_cache.api import connection
from mesi_cache.api.events import EventHub
from mesi_cache.api.express import Express
from mesi_cache.api.keys import Listener, Service
from mesi_cache.core.records import Incr, Operation, Outcome
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
        with suppress(ConnectionError):
            await wire.writer.wait_closed()


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
