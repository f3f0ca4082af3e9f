"""The peers: a Redis and a memcached of our own, in a scratch directory on a free port, no daemons.

Neither writes anything to a disk (`--save '' --appendonly no`), while ours logs every change at its
home: that is said beside the figures. Clients: raw protocol on uvloop, and redis-py with hiredis.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections import deque
from pathlib import Path
from typing import cast

from nodes import Children, free_ports, wait


def _answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


class Redis(Children):
    """`available()` first."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.start(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--daemonize", "no", "--set-proc-title", "no", "--dir",
             str(root)]
        )  # fmt: skip

    @staticmethod
    def available() -> bool:
        return shutil.which("redis-server") is not None

    def __enter__(self) -> Redis:
        wait(lambda: _answers(self.port), "redis-server")
        return self


class Memcached(Children):
    """`available()` first."""

    def __init__(self) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.start(
            ["memcached", "-l", "127.0.0.1", "-p", str(self.port), "-u", "root", "-t", "2"]
        )  # fmt: skip

    @staticmethod
    def available() -> bool:
        return shutil.which("memcached") is not None

    def __enter__(self) -> Memcached:
        wait(lambda: _answers(self.port), "memcached")
        return self


class _Raw(asyncio.Protocol):
    """Requests answered in order; `_next` cuts one answer off the buffer."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, port: int, count: int) -> list[_Raw]:
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(cls, "127.0.0.1", port) for _ in range(count)]
        return [protocol for _, protocol in made]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def _ask(self, request: bytes) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self._transport is None:
            raise ConnectionError("not connected")
        self._waiting.append(future)
        self._transport.write(request)
        return future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        while buffer and (end := self._end(buffer)):
            self._waiting.popleft().set_result(buffer[:end])
            buffer = buffer[end:]
        self._buffer = buffer

    def _end(self, buffer: bytes) -> int:
        """Where the first answer ends; 0 if it is not all there."""
        raise NotImplementedError

    async def get(self, key: str) -> bytes:
        raise NotImplementedError

    async def set(self, key: str, value: bytes) -> bytes:
        raise NotImplementedError


class RawRedis(_Raw):
    """RESP2, as much of it as GET and SET need."""

    def _end(self, buffer: bytes) -> int:
        line = buffer.find(b"\r\n") + 2
        if line < 2 or buffer[:1] != b"$" or buffer[1:2] == b"-":
            return max(0, line) if line >= 2 else 0
        end = line + int(buffer[1 : line - 2]) + 2
        return end if len(buffer) >= end else 0

    async def get(self, key: str) -> bytes:
        return await self._ask(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key.encode()))

    async def set(self, key: str, value: bytes) -> bytes:
        return await self._ask(
            b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
            % (len(key), key.encode(), len(value), value)
        )


class RawMemcached(_Raw):
    """The text protocol, as much of it as get and set need."""

    def _end(self, buffer: bytes) -> int:
        line = buffer.find(b"\r\n") + 2
        if line < 2 or not buffer.startswith(b"VALUE"):
            return max(0, line) if line >= 2 else 0
        end = line + int(buffer[: line - 2].rsplit(b" ", 1)[1]) + len(b"\r\nEND\r\n")
        return end if len(buffer) >= end else 0

    async def get(self, key: str) -> bytes:
        return await self._ask(b"get %b\r\n" % key.encode())

    async def set(self, key: str, value: bytes) -> bytes:
        return await self._ask(b"set %b 0 0 %d\r\n%b\r\n" % (key.encode(), len(value), value))
