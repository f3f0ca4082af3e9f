"""A node that answers by the queue's name, served with the short way or without, and raw
connections to it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))

from express_requests import NOWHERE, ODD, WAIT, get, name

from message_queue import config as configuration
from message_queue.api import app as application
from message_queue.api import connection
from message_queue.api.events import EventHub
from message_queue.api.express import Client, Express, Plain, Turn
from message_queue.api.keys import Service, WrongNode
from message_queue.core.ids import unpack_dot
from message_queue.core.operations import (
    Answer,
    Consume,
    Direct,
    Nack,
    Operation,
    Produce,
    Results,
    Settle,
    certain_refusal,
    refusal,
    unknown_outcome,
)
from message_queue.hosting import Delivered
from message_queue.metrics import Metrics
from message_queue.routing import Router

Address = tuple[str, int]
Seen = tuple[bytes, dict[bytes, bytes], bytes]


class FakeNode:
    """Answers by the queue. `later` ones are answered in the next turn of the loop, `wait` ones
    when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Operation] = []
        self.metrics = Metrics()
        self._node = SimpleNamespace(metrics=self.metrics)
        self.waiting: asyncio.Queue[Callable[[Answer], None]] = asyncio.Queue()
        self.leased = 0
        """Deliveries that were not undone."""
        self.polls = 0
        """Consumers that wait."""
        self.body = b"[1]"

    # ── as the api knows it ─────────────────────────────────────────────────────────────────────

    async def ask(self, operation: Operation, forward: bool = True) -> Answer:
        return (await self._route(operation, forward)).answer

    async def consume(self, operation: Consume, forward: bool = True) -> Delivered:
        return await self._route(operation, forward)

    ack = Router.ack

    def begin(self, operation: Direct, done: Callable[[Answer], None]) -> None:
        self.asked.append(operation)
        self._answer(operation, done)

    def consume_now(self, operation: Consume) -> Delivered | None:
        if not operation.queue.startswith("ready"):
            return None
        self.asked.append(operation)
        return self._delivered(operation)

    async def _route(self, operation: Operation, forward: bool) -> Delivered:
        if not forward:
            raise WrongNode("127.0.0.1:8001")
        self.asked.append(operation)
        if isinstance(operation, Consume):
            return await self._consume(operation)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answer(cast("Direct", operation), done.set_result)
        return Delivered(await done)

    # ── what it answers ─────────────────────────────────────────────────────────────────────────

    def _answer(self, operation: Direct, done: Callable[[Answer], None]) -> None:
        queue = operation.queue if isinstance(operation, Produce) else ""
        if queue == "boom":
            raise RuntimeError("planted")
        if queue.startswith("wait") or (
            isinstance(operation, Settle) and operation.partition == WAIT
        ):
            self.waiting.put_nowait(done)
        elif queue == "at-once":
            done(refusal(429, "Queue is full", 5, queue=queue, limit=3))
        else:
            asyncio.get_running_loop().call_soon(done, self._reply(operation))

    def _reply(self, operation: Direct) -> Answer:
        match operation:
            case Produce(queue="gone"):
                return unknown_outcome("No answer from the owner")
            case Produce(queue="none"):
                return certain_refusal("No quorum")
            case Produce(queue="dup"):
                return Answer(200, b'{"id":"a","queue":"dup","duplicate":true}')
            case Produce(queue="bad"):
                return Answer(507, b"no json")
            case Produce(queue, messages, batch):
                ids = [name(1, n + 1) for n in range(len(messages))]
                shown = {"ids": ids} if batch else {"id": ids[0], "queue": queue}
                return Answer(201, msgspec.json.encode(shown | {"status": "created"}))
            case Settle(partition=part):
                if part == NOWHERE:
                    return unknown_outcome("No quorum")
                statuses = tuple(self._status(one) for one in operation.dots)
                body = b"?" if part == ODD else msgspec.msgpack.encode(Results(statuses))
                return Answer(200, body)
            case Nack():
                status = self._status(operation.dot)
                if status == 200:
                    return Answer(200, b'{"status":"returned"}')
                return refusal(status, "Message not found", id="x")
            case _:
                return Answer(200, b'{"status":"extended"}')

    @staticmethod
    def _status(packed: int) -> int:
        seq = unpack_dot(packed)[1]
        return 404 if seq % 5 == 0 else 409 if seq % 7 == 0 else 200

    async def _consume(self, operation: Consume) -> Delivered:
        queue = operation.queue
        await asyncio.sleep(0)
        if queue == "boom":
            raise RuntimeError("planted")
        if queue == "gone":
            return Delivered(certain_refusal("No quorum"))
        if queue.startswith("wait"):
            done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self.waiting.put_nowait(lambda answer: done.done() or done.set_result(answer))
            self.polls += 1
            try:
                await done
            finally:
                self.polls -= 1
        return Delivered(Answer(204)) if queue == "empty" else self._delivered(operation)

    def _delivered(self, operation: Consume) -> Delivered:
        self.leased += 1
        one = b'{"id":"i","queue":%b,"body":%b}' % (
            msgspec.json.encode(operation.queue), self.body,
        )  # fmt: skip
        body = b'{"messages":[%b]}' % one if operation.batch else one
        return Delivered(Answer(200, body, messages=1), self._undo)

    def _undo(self) -> None:
        self.leased -= 1

    def status(self) -> dict[str, object]:
        return {"id": "a"}


async def until(condition: Callable[[], object]) -> None:
    """Poll until it holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - connections tell nobody what they are at
            await asyncio.sleep(0.001)


class Wire:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> Seen:
        """Status line, headers, body."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.rstrip().split(b"\r\n")
            headers = {k.lower(): v for k, v in (line.split(b": ", 1) for line in lines)}
            size = int(headers.get(b"content-length", b"0"))
            return first, headers, await self.reader.readexactly(size)

    async def ask(self, *chunks: bytes) -> Seen:
        for chunk in chunks:
            self.writer.write(chunk)
            await self.writer.drain()
            await asyncio.sleep(0.005)  # so that each arrives alone
        return await self.answer()


class NotedExpress(Express):
    """The short way, which notes what it takes."""

    taken: list[Plain]

    def turn(self, request: Plain, client: Client) -> Turn:
        self.taken.append(request)
        return super().turn(request, client)


class Served:
    """Where a node is to be found."""

    def __init__(self, node: FakeNode, runner: web.AppRunner) -> None:
        self.node, self.runner = node, runner
        self.address: Address = ("", 0)
        self.connections: list[connection.Connection] = []
        self.taken: list[Plain] = []
        """By the short way."""

    def forget(self) -> None:
        """Count anew."""
        self.taken.clear()
        self.node.asked.clear()


@asynccontextmanager
async def serving(tmp_path: Path, *, short: bool = True) -> AsyncIterator[Served]:
    config = configuration.parse(
        ["--id=a", "--addr=127.0.0.1:8000", "--peers=127.0.0.1:8000", f"--dataDir={tmp_path}",
         "--max_body_bytes=2000"]
    )  # fmt: skip
    node = FakeNode()
    service = cast("Service", node)
    runner = web.AppRunner(
        application.build(service, config, node.metrics, EventHub(), []),
        handler_cancellation=True, shutdown_timeout=20.0,
    )  # fmt: skip
    await runner.setup()
    served = Served(node, runner)
    express = NotedExpress(service, node.metrics, config.max_body_bytes)
    express.taken = served.taken
    make = connection.factory(runner, express if short else None)

    def made() -> connection.Connection:
        served.connections.append(make())
        return served.connections[-1]

    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    served.address = server.sockets[0].getsockname()
    try:
        yield served
    finally:
        server.close()
        await runner.cleanup()


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Wire]:
    before = len(served.connections)
    wire = Wire(*await asyncio.open_connection(*served.address))
    # aiohttp's task of this connection begins to wait
    await until(lambda: any(each._waiter for each in served.connections[before:]))
    try:
        yield wire
    finally:
        wire.writer.close()
        with suppress(ConnectionError):
            await wire.writer.wait_closed()


_CHANGING = re.compile(
    rb"Date: \w+, \d\d \w+ \d{4} [\d:]+ GMT|(?<=X-Request-Id: )[0-9a-f]{8}-[0-9a-f]+\r\n"
)
LAST = get(b"/consume?queue=ready", b"Host: a\r\nX-Request-Id: last\r\n")


async def seen(
    served: Served, chunks: Sequence[bytes], pause_s: float = 0.002, within_s: float = 20.0
) -> bytes:
    """All that comes back for `chunks` and one more request, without what changes."""
    found = b""
    async with connected(served) as wire:
        try:
            for chunk in chunks:
                wire.writer.write(chunk)
                await wire.writer.drain()
                await asyncio.sleep(pause_s)
            # Read first: what comes after the node has closed makes the client lose its answer.
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    found = await wire.reader.read(65_536)
            wire.writer.write(LAST)
            async with asyncio.timeout(within_s):
                while piece := await wire.reader.read(65_536):
                    found += piece
                    if b"X-Request-Id: last" in found and found.endswith(b"}"):
                        break
                else:
                    found += b"closed"
        except TimeoutError:
            found += b"it waits for more"
        except ConnectionError:
            found += b"closed"
    return _CHANGING.sub(b"", found)


async def assert_alike(one: Served, other: Served, chunks: Sequence[bytes]) -> None:
    """Both give the same bytes. How bytes arrive is not quite in our hands, what follows a request
    in one piece can spoil it, and some wait for more: so again, with more patience."""
    for patience in (1, 2, 8, 32):
        how = 0.002 * patience, 0.25 * patience
        found = await asyncio.gather(seen(one, chunks, *how), seen(other, chunks, *how))
        if found[0] == found[1]:
            return
    assert found[0] == found[1], chunks
