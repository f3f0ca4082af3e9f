"""A lean HTTP/1.1 client for load: one connection, requests answered in order.

A full client library costs more than the server it measures (see ../DESIGN.md), so this one only
knows what the queue's answers look like: Content-Length, no chunks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast


class LeanClient(asyncio.Protocol):
    def __init__(self, host: str, port: int) -> None:
        self._head = f" HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: ".encode()
        self._waiting: deque[asyncio.Future[tuple[int, bytes]]] = deque()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, address: str) -> LeanClient:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(host, int(port)), host, int(port))
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not registered as asyncio.Transport, but behave like it.
        self._transport = cast("asyncio.Transport", transport)

    def post(self, path: bytes, body: bytes) -> asyncio.Future[tuple[int, bytes]]:
        return self._send(b"POST " + path + self._head + b"%d\r\n\r\n" % len(body) + body)

    def get(self, path: bytes) -> asyncio.Future[tuple[int, bytes]]:
        return self._send(b"GET " + path + self._head + b"0\r\n\r\n")

    def request(self, method: bytes, path: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """One without a body."""
        return self._send(method + b" " + path + self._head + b"0\r\n\r\n")

    def _send(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(ConnectionError("closed"))
            return future
        self._waiting.append(future)
        self._transport.write(request)
        return future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            done = end + 4 + length
            if len(buffer) < done:
                break
            future = self._waiting.popleft()
            if not future.done():
                future.set_result((int(buffer[9:12]), buffer[end + 4 : done]))
            buffer = buffer[done:]
        self._buffer = buffer

    def connection_lost(self, error: Exception | None) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(ConnectionError("closed"))
        self._waiting.clear()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
