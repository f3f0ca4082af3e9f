"""Plain reads that are answered at once: the same answers, and everything else goes the usual way.

Real connections on loopback (without TLS, which is below this), aiohttp's own parser and handlers;
only the store behind them is a stub.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from secure_store import config as configuration
from secure_store.api import app as application
from secure_store.api import connection
from secure_store.api.events import EventHub
from secure_store.api.express import Express
from secure_store.api.watch import WatchHub
from secure_store.core.kv import Damaged
from secure_store.core.tokens import Principal
from secure_store.metrics import Metrics

ADMIN, LIMITED = Principal("demo:admin", ("admin",)), Principal("token:l", ("admin",), "l", 3)
GET = "GET /get?key=a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\n"


class StubAudit:
    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self.failure: str | None = None

    def unavailable(self) -> str | None:
        return self.failure

    def refuse(self) -> None:
        pass

    def note_read(self, action: str, addr: str, request_id: str, who: str, key: str) -> None:
        self.lines.append((action, addr, "allowed", request_id, 200, who, key))

    def note(self, action: str, *, addr: str, outcome: str, request_id: str, status: int,
             who: str, key: str = "", urgent: bool = False) -> None:  # fmt: skip
        self.lines.append((action, addr, outcome, request_id, status, who, key))


class StubService:
    """Key "a" holds 1; "no" may not be read, "broken" does not open, "slow" is not settled."""

    node_id = "nodeA"

    def __init__(self) -> None:
        self.audit = StubAudit()
        self.tokens = {"good": ADMIN, "limited": LIMITED}
        self.is_primary = True
        self.degraded = self.unsettled = False
        self.settle = asyncio.Event()

    def audit_key(self, key: str) -> str:
        return key

    def authenticate(self, token: str) -> Principal | None:
        return self.tokens.get(token)

    def allows(self, principal: Principal, verb: str, key: str) -> bool:
        return key != "no"

    def is_primary_here(self) -> bool:
        return self.is_primary

    def primary_url(self) -> str:
        return "https://elsewhere"

    def is_unsettled(self) -> bool:
        return self.unsettled

    async def settled(self, key: str) -> None:
        await self.settle.wait()

    def read(self, key: str, version: int | None) -> tuple[int, bytes] | None:
        if key == "broken":
            raise Damaged("flipped")
        return (7, b'{"x":[1,"\\u00e9"]}') if key in ("a", "a/b-c.d~e:f@g_h") else None

    def is_degraded(self) -> bool:
        return self.degraded

    async def write(self, write: object) -> None:
        """A use of the limited token is counted."""


class Served:
    """What a test talks to."""

    def __init__(self, service: StubService, port: int, metrics: Metrics) -> None:
        self.service, self.port, self.metrics = service, port, metrics
        self.at_once = 0
        self.connections: list[connection.Connection] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.sleep(0.02)  # aiohttp waits for the first request now
        return reader, writer

    async def ask(self, *requests: str) -> list[tuple[str, bytes]]:
        """Each on a connection of its own: (head without what changes, body)."""
        found = []
        for request in requests:
            reader, writer = await self.open()
            writer.write((request + "\r\n").encode())
            found.append(await answer(reader))
            writer.close()
        return found


async def answer(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        size = int(re.findall(r"Content-Length: (\d+)", head)[0])
        body = await reader.readexactly(size)
    return re.sub(r"(Date|X-Request-Id): [^\r]*\r\n", "", head), body


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[Served]:
    service, metrics = StubService(), Metrics()
    config = configuration.parse(["--id=nodeA", "--addr=127.0.0.1:1"])
    app = application.build(
        service, config, metrics, EventHub(), WatchHub(), [], lambda: None  # type: ignore[arg-type]  # a stub of Service
    )  # fmt: skip
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    express = Express(service, metrics, action="get")  # type: ignore[arg-type]  # a stub of Service
    it: Served

    def get(path: str, token: str, addr: str) -> bytes | None:
        found = express.get(path, token, addr)
        it.at_once += found is not None
        return found

    make = connection.factory(runner, get)

    def made() -> connection.Connection:
        each = make()
        it.connections.append(each)
        for name, value in settings.items():
            setattr(each, name, value)
        return each

    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    it = Served(service, server.sockets[0].getsockname()[1], metrics)
    try:
        yield it
    finally:
        server.close()
        await runner.cleanup()


async def test_a_plain_read_is_answered_at_once_with_the_answer_of_the_usual_way() -> None:
    async with served() as it:
        for path in ("a", "a/b-c.d~e:f@g_h"):
            plain = GET.replace("key=a", f"key={path}")
            for degraded in (False, True):
                it.service.degraded = degraded
                it.at_once = 0
                quick, usual = await it.ask(plain, plain + "X-Request-Id: my-own\r\n")
                assert it.at_once == 1
                assert quick == usual
                assert quick[1] == b'{"key":"%s","value":{"x":[1,"\\u00e9"]}}' % path.encode()
                assert ("X-Replication: degraded" in quick[0]) is degraded
        quick_line, usual_line = it.service.audit.lines[:2]
        assert usual_line[3] == "my-own"
        assert quick_line[:3] + quick_line[4:] == usual_line[:3] + usual_line[4:]
        assert it.metrics.requests == 8
        assert it.metrics.request_ms.count == 8


USUAL = [
    ("GET /get?key=a HTTP/1.1\r\nHost: x\r\n", 401),
    (GET.replace("good", "bad"), 401),
    (GET.replace("Bearer", "Basic"), 401),
    (GET.replace("Bearer good", "Bearer " + "x" * 600), 401),
    (GET + "Authorization: Bearer good\r\n", 400),
    (GET.replace("key=a", "key=a&token=x"), 400),
    (GET.replace("key=a", "key=a&key=a"), 400),
    (GET.replace("key=a", "key="), 400),
    (GET.replace("key=a", "key=a/../b"), 400),
    (GET.replace("key=a", "key=no"), 403),
    (GET.replace("key=a", "key=gone"), 404),
    (GET.replace("key=a", "key=broken"), 500),
    (GET.replace("key=a", "key=%61"), 200),
    (GET.replace("GET", "POST"), 405),
    (GET.replace("HTTP/1.1", "HTTP/1.0"), 200),
    (GET + "Connection: close\r\n", 200),
    (GET + "Content-Length: 0\r\n", 200),
    (GET + "X-Request-Id: mine\r\n", 200),
    (GET + "X-Read-From: primary\r\n", 200),
    (GET + "Origin: https://elsewhere\r\n", 200),
    (GET.replace("good", "limited"), 200),
    ("GET /healthz HTTP/1.1\r\nHost: x\r\n", 200),
]


async def test_whatever_is_not_plain_or_not_allowed_goes_the_usual_way() -> None:
    async with served() as it:
        for request, status in USUAL:
            it.service.audit.lines.clear()
            ((head, _),) = await it.ask(request)
            assert head.split(" ")[1] == str(status), request
            assert it.at_once == 0, request
            outcomes = [line[4] for line in it.service.audit.lines]
            assert outcomes == ([] if "healthz" in request else [status]), (
                "a line, with what it was"
            )


async def test_a_broken_audit_log_a_restart_and_a_replica_stand_in_the_way() -> None:
    async with served() as it:
        it.service.audit.failure = "disk full"
        assert "503" in (await it.ask(GET))[0][0]
        it.service.audit.failure = None
        it.service.is_primary = False
        assert " 200 " in (await it.ask(GET))[0][0], "a replica answers reads"
        assert it.at_once == 1
        assert " 421 " in (await it.ask(GET + "X-Read-From: primary\r\n"))[0][0]
        it.service.unsettled = True
        it.service.settle.set()
        assert " 200 " in (await it.ask(GET))[0][0]
        assert it.at_once == 1


async def test_a_revocation_counts_at_once_on_a_connection_that_is_open() -> None:
    async with served() as it:
        reader, writer = await it.open()
        for _ in range(3):
            writer.write((GET + "\r\n").encode())
            assert " 200 " in (await answer(reader))[0]
        assert it.at_once == 3
        del it.service.tokens["good"]
        writer.write((GET + "\r\n").encode())
        assert " 401 " in (await answer(reader))[0]
        it.service.tokens["other"] = ADMIN
        writer.write((GET.replace("good", "other") + "\r\n").encode())
        assert " 200 " in (await answer(reader))[0], "other headers are looked at anew"
        assert it.at_once == 4
        writer.close()


async def test_answers_come_in_the_order_of_requests_however_they_are_cut() -> None:
    async with served() as it:
        reader, writer = await it.open()
        it.service.unsettled = True  # the first one waits, in its handler
        writer.write((GET + "\r\n").encode())
        await asyncio.sleep(0.05)
        it.service.unsettled = False
        missing = GET.replace("key=a", "key=gone") + "\r\n"
        writer.write((missing + GET + "\r\n" + missing).encode())
        await asyncio.sleep(0.05)
        assert it.at_once == 0
        it.service.settle.set()
        heads = [(await answer(reader))[0] for _ in range(4)]
        assert [head.split(" ")[1] for head in heads] == ["200", "404", "200", "404"]
        await asyncio.sleep(0.02)
        raw = (GET + "\r\n").encode()
        for at in range(1, len(raw), 17):
            writer.write(raw[:at])
            await asyncio.sleep(0.005)
            writer.write(raw[at:])
            assert " 200 " in (await answer(reader))[0]
        assert it.at_once > 0, "whole ones are answered at once also then"
        writer.write(raw * 5 + missing.encode() + raw)
        heads = [(await answer(reader))[0] for _ in range(7)]
        assert [head.split(" ")[1] for head in heads] == ["200"] * 5 + ["404", "200"]
        writer.close()


async def test_a_client_that_does_not_read_is_not_written_to_without_end() -> None:
    async with served() as it:
        reader, writer = await it.open()
        (mine,) = it.connections
        mine.pause_writing()  # as the transport does when its buffer is full
        writer.write((GET + "\r\n").encode())
        await asyncio.sleep(0.1)
        assert it.at_once == 0
        mine.resume_writing()
        assert " 200 " in (await answer(reader))[0]
        writer.close()


async def test_an_idle_connection_is_still_closed_and_a_busy_one_is_not() -> None:
    async with served(_keepalive_timeout=0.4) as it:
        reader, writer = await it.open()
        for _ in range(5):
            writer.write((GET + "\r\n").encode())
            assert " 200 " in (await answer(reader))[0]
            await asyncio.sleep(0.15)
        assert it.at_once == 5
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()


async def test_broken_http_after_a_plain_read_gets_the_usual_answer() -> None:
    async with served() as it:
        reader, writer = await it.open()
        writer.write((GET + "\r\n").encode())
        await answer(reader)
        writer.write(b"\x00nonsense\r\n\r\n")
        head, body = await answer(reader)
        assert " 400 " in head
        assert body == b'{"error":"Malformed HTTP request"}'
        writer.close()
