"""The short way answers as aiohttp's way does, in order, and takes nothing that is not plain."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from lock_manager import config as configuration
from lock_manager.api import app as application
from lock_manager.api import connection
from lock_manager.api.errors import ApiError, NotLeader
from lock_manager.api.events import EventHub
from lock_manager.api.express import Express, plain_request
from lock_manager.api.pending import Listener, Pending
from lock_manager.core.locks.commands import Acquire, Command, LockType
from lock_manager.core.locks.replies import Acquired, Granted, Held, Released, Reply
from lock_manager.core.locks.views import LockView
from lock_manager.metrics import Metrics

PROBLEM = b"Host: x\r\nAccept: application/problem+json\r\n"
HEAD = b"Host: 127.0.0.1:8000\r\nAccept: */*\r\nX-Request-Id: r-1\r\n"


class FakeNode:
    """Answers by the lock's name; `leads` False: redirects. Locks named `wait…` wait for ever."""

    def __init__(self) -> None:
        self.leads = True
        self.begun: list[Command] = []
        self.abandoned = 0

    def begin(self, command: Command, listener: Listener) -> Pending:
        if not self.leads:
            raise NotLeader("node2", "http://127.0.0.1:8001")
        soon = asyncio.get_running_loop().call_soon
        self.begun.append(command)
        name = command.asks[0].lock_name if isinstance(command, Acquire) else command.lock_name
        if name == "held":
            soon(listener.set_result, Held("held"))
        elif name == "lost":
            error = ApiError(503, "Leadership lost", headers={"Retry-After": "1"}, definite=False)
            soon(listener.set_exception, error)
        elif isinstance(command, Acquire) and not name.startswith("wait"):
            grant = Granted(name, LockType.EXCLUSIVE, 7, 7, 0, 0)
            soon(listener.set_result, Acquired(command.client_id, (grant,), 7, None))
        elif not name.startswith("wait"):
            soon(listener.set_result, Released(name, command.client_id))
        return Pending(command, listener)

    def abandon(self, pending: Pending) -> None:
        pending.abandoned = True
        self.abandoned += 1

    async def execute(self, command: Command) -> Reply:
        future = asyncio.get_running_loop().create_future()
        pending = self.begin(command, future)
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(pending)
            raise

    def confirmation(self) -> asyncio.Future[None]:
        if not self.leads:
            raise NotLeader(None, None)
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def confirm_leadership(self) -> None:
        await self.confirmation()

    def lock(self, lock_name: str) -> LockView:
        return LockView(lock_name, [], [])

    def status(self) -> dict[str, object]:
        return {"id": "node1"}


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
async def serving(node: FakeNode, tmp_path: Path, *, short: bool) -> AsyncIterator[Wire]:
    config = configuration.parse(
        ["--id=node1", "--raft_addr=127.0.0.1:7000", "--http_addr=127.0.0.1:8000",
         "--peers=127.0.0.1:7000", "--peer_http_addrs=127.0.0.1:8000", f"--data_dir={tmp_path}"]
    )  # fmt: skip
    metrics, events = Metrics(), EventHub()
    runner = web.AppRunner(
        application.build(node, config, metrics, events), handler_cancellation=True
    )
    await runner.setup()
    express = Express(node, metrics, config.max_body_bytes) if short else None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(connection.factory(runner, express), "127.0.0.1", 0)
    wire = Wire(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    await asyncio.sleep(0.05)  # aiohttp's task of this connection begins to wait
    try:
        yield wire
    finally:
        wire.writer.close()
        await wire.writer.wait_closed()
        server.close()
        await runner.cleanup()
        await asyncio.sleep(0.05)  # until the server has seen it


def post(path: bytes, body: bytes, head: bytes = HEAD) -> bytes:
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (path, head, len(body), body)


def body_for(name: bytes) -> bytes:
    return b'{"lock_name":"%s","client_id":"a"}' % name


REQUESTS = {
    "acquire": post(b"/acquire", body_for(b"free")),
    "release": post(b"/release", body_for(b"free")),
    "held": post(b"/acquire", body_for(b"held")),
    "lost leadership": post(b"/acquire", body_for(b"lost")),
    "bad field": post(b"/acquire", b'{"lock_name":1}'),
    "no json": post(b"/release", b"{"),
    "a lock": b"GET /locks/jobs.daily HTTP/1.1\r\n%s\r\n" % HEAD,
    "stale": b"GET /locks/jobs?consistency=stale HTTP/1.1\r\n%s\r\n" % HEAD,
    "status": b"GET /status HTTP/1.1\r\n%s\r\n" % HEAD,
    "unknown": b"GET /nothing HTTP/1.1\r\n%s\r\n" % HEAD,
    "problem": post(b"/acquire", body_for(b"held"), PROBLEM),
    "foreign page": post(b"/acquire", body_for(b"free"), HEAD + b"Origin: http://evil\r\n"),
}


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize("name", REQUESTS)
async def test_both_ways_give_the_same_answer(name: str, leads: bool, tmp_path: Path) -> None:
    answers = []
    for short in (True, False):
        node = FakeNode()
        node.leads = leads
        async with serving(node, tmp_path, short=short) as wire:
            first, headers, body = await wire.ask(REQUESTS[name])
            assert re.fullmatch(rb"\w+, \d\d \w+ \d{4} [\d:]+ GMT", headers.pop(b"date"))
            if name == "problem":  # it brought no id
                assert headers.pop(b"x-request-id")
            headers[b"content-type"] = headers[b"content-type"].partition(b";")[0]
            answers.append((first, headers, body))
    assert answers[0] == answers[1]


async def test_answers_come_in_the_order_of_requests(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path, short=True) as wire:
        for name in (b"lost", b"one"):
            wire.writer.write(post(b"/acquire", body_for(name)))
            await asyncio.sleep(0.01)
        wire.writer.write(REQUESTS["status"] + post(b"/release", body_for(b"two")))
        answers = [await wire.answer() for _ in range(4)]
    assert [b"Leadership" in answers[0][2], b'"one"' in answers[1][2]] == [True, True]
    assert [b"node1" in answers[2][2], b'"two"' in answers[3][2]] == [True, True]


async def test_what_comes_while_a_request_waits_is_held_back(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path, short=True) as wire:
        wire.writer.write(post(b"/acquire", body_for(b"wait")))
        await asyncio.sleep(0.05)
        wire.writer.write(post(b"/acquire", body_for(b"after")))
        await asyncio.sleep(0.05)
        assert len(node.begun) == 1
    assert (node.abandoned, len(node.begun)) == (1, 1)


async def test_a_request_in_pieces_never_begins_in_the_middle(tmp_path: Path) -> None:
    """A piece that looks like a request of its own is still a piece."""
    inner = post(b"/acquire", body_for(b"smuggled"))
    outer = b"POST /release HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (HEAD, len(inner))
    for pieces in ((outer, inner), (b"GET /status HTTP/1.1\r\nHost: x\r\nX-A: ", inner)):
        node = FakeNode()
        async with serving(node, tmp_path, short=True) as wire:
            await wire.ask(*pieces)
            assert node.begun == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        post(b"/acquire", b"{}")[:-1],
        post(b"/acquire", b"{}") + b"x",
        post(b"/acquire", b"{}") * 2,
        post(b"/acquire", b"{}", HEAD + b"Content-Length: 2\r\n"),
        post(b"/acquire", b"{}", HEAD + b"host: x\r\n"),
        post(b"/acquire", b"{}", b""),
        post(b"/acquire", b"{}", HEAD + b"Transfer-Encoding: chunked\r\n"),
        post(b"/acquire", b"{}", HEAD + b"Content-Encoding: gzip\r\n"),
        post(b"/acquire", b"{}", HEAD + b"Expect: 100-continue\r\n"),
        post(b"/acquire", b"{}", HEAD + b"Connection: close\r\n"),
        post(b"/acquire", b"{}", b"Host : x\r\n"),
        post(b"/acquire", b"{}", b"Host: x\r\nAccept: */*\r\n folded\r\n"),
        post(b"/acquire", b"{}", b"Host: x\nOrigin: y\r\n"),
        post(b"/acquire?x=1", b"{}"),
        post(b"/acquire", b"{}").replace(b"1.1", b"1.0"),
        b"POST /acquire HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /locks/%2e HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_only_whole_and_plain_requests_are_taken(data: bytes) -> None:
    assert plain_request(data) is None


def test_a_hostile_head_costs_no_more_than_its_length() -> None:
    assert plain_request(b"GET / HTTP/1.1\r\n" + b"host:  \r\n" * 20_000 + b"!") is None
