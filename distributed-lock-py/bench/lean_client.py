"""A lean HTTP/1.1 client for load: one connection, requests answered in order.

A full client library costs more than the server it measures (see ../DESIGN.md), so this one knows
only what it meets here: bodies with Content-Length or in chunks, connections that stay open.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

Answer = tuple[int, bytes]


class LeanClient(asyncio.Protocol):
    def __init__(self, host: str, port: int) -> None:
        self._head = f" HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: ".encode()
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, address: str) -> LeanClient:
        """`address` is host:port. Raises OSError."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(host, int(port)), host, int(port))
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not registered as asyncio.Transport, but behave like it.
        self._transport = cast("asyncio.Transport", transport)

    def post(self, path: bytes, body: bytes) -> asyncio.Future[Answer]:
        return self._send(b"POST " + path + self._head + b"%d\r\n\r\n" % len(body) + body)

    def get(self, path: bytes) -> asyncio.Future[Answer]:
        return self._send(b"GET " + path + self._head + b"0\r\n\r\n")

    def _send(self, request: bytes) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(ConnectionError("closed"))
            return future
        self._waiting.append(future)
        self._transport.write(request)
        return future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while buffer and (found := _take_answer(buffer)) is not None:
            answer, length = found
            buffer = buffer[length:]
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(answer)
        self._buffer = buffer

    def connection_lost(self, error: Exception | None) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(ConnectionError("closed"))
        self._waiting.clear()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _take_answer(buffer: bytes) -> tuple[Answer, int] | None:
    """The first whole answer in `buffer` and its length in bytes; None: not all there yet."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head, status = buffer[:end].lower(), int(buffer[9:12])
    at = head.find(b"content-length:")
    if at < 0 and b"transfer-encoding: chunked" in head:
        return _take_chunks(buffer, status, end + 4)
    length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    done = end + 4 + length
    return ((status, buffer[end + 4 : done]), done) if len(buffer) >= done else None


def _take_chunks(buffer: bytes, status: int, at: int) -> tuple[Answer, int] | None:
    parts: list[bytes] = []
    while (line_end := buffer.find(b"\r\n", at)) >= 0:
        size = int(buffer[at:line_end].split(b";")[0], 16)
        start, at = line_end + 2, line_end + 2 + size + 2
        if len(buffer) < at:
            return None
        if not size:
            return (status, b"".join(parts)), at
        parts.append(buffer[start : start + size])
    return None
