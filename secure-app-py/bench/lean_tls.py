"""A lean client: raw asyncio.Protocol over TLS, one request in flight a connection. (An aiohttp
client would cost more than the server it measures.)"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement found. `cpu_us`: the servers' processor time per operation (Linux)."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


class Failed(Exception):
    """The server answered something else than 200."""


class Client(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[bytes] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        stop = head.find(b"\r\n", at)
        length = int(head[at + 15 : stop if stop > 0 else None])
        size = end + 4 + length
        if len(self._buffer) >= size and self._waiting is not None:
            answer, self._buffer = self._buffer[:size], self._buffer[size:]
            waiting, self._waiting = self._waiting, None
            if not waiting.done():
                waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionResetError("closed"))

    async def ask(self, request: bytes) -> bytes:
        """Send a request, wait for its whole answer; raises Failed unless that is 200."""
        if self.transport is None:
            raise ConnectionError("not connected")
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        answer = await self._waiting
        if not answer.startswith(b"HTTP/1.1 200"):
            raise Failed(answer[:300].decode(errors="replace"))
        return answer


def context() -> ssl.SSLContext:
    """TLS 1.3 without a check of the certificate: the same for every contender."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


async def connect(port: int, tls: ssl.SSLContext) -> Client:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, "127.0.0.1", port, ssl=tls)
    return client


async def drive(
    clients: int,
    seconds: float,
    pids: Sequence[int],
    prepare: Callable[[int], Awaitable[Callable[[], Awaitable[object]]]],
) -> Sample:
    """`clients` at once do one operation after the other; `prepare(number)` gives a client's."""
    operations = [await prepare(number) for number in range(clients)]
    took: list[float] = []
    clock = time.perf_counter
    until = clock() + seconds

    async def one(operation: Callable[[], Awaitable[object]]) -> None:
        while (began := clock()) < until:
            await operation()
            took.append(clock() - began)

    before, began = sum(map(cpu_s, pids)), clock()
    await asyncio.gather(*(one(operation) for operation in operations))
    spent, lasted = sum(map(cpu_s, pids)) - before, clock() - began
    took.sort()
    return Sample(
        len(took) / lasted,
        took[len(took) // 2] * 1e3,
        took[int(len(took) * 0.99)] * 1e3,
        spent / len(took) * 1e6,
    )


async def requests(
    port: int, pids: Sequence[int], clients: int, seconds: float, make: Callable[[int], bytes]
) -> Sample:
    """One request after the other on each of `clients` connections."""
    tls = context()
    opened: list[Client] = []

    async def prepare(number: int) -> Callable[[], Awaitable[object]]:
        client = await connect(port, tls)
        opened.append(client)
        request = make(number)
        await client.ask(request)  # whatever is made once is made now
        return lambda: client.ask(request)

    try:
        return await drive(clients, seconds, pids, prepare)
    finally:
        for client in opened:
            if client.transport is not None:
                client.transport.abort()


async def connections(
    port: int, pids: Sequence[int], clients: int, seconds: float, request: bytes
) -> Sample:
    """A full handshake and one request, again and again (no session is resumed)."""

    async def prepare(_: int) -> Callable[[], Awaitable[object]]:
        tls = context()

        async def once() -> None:
            client = await connect(port, tls)
            await client.ask(request)
            if client.transport is not None:
                client.transport.abort()

        return once

    return await drive(clients, seconds, pids, prepare)


def cpu_s(pid: int) -> float:
    """Processor time of a process so far; 0 where /proc is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
