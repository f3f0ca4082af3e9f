"""A lean client of `/stream` for load: just enough WebSocket to send and take frames of JSON.

What a client sends is masked with zeros, which the protocol allows and which costs nothing here.
See `lean_client.py` for why the load must not be made by a full client library.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections import deque
from typing import Any, cast

import msgspec


class Item(msgspec.Struct, frozen=True):
    """From the node."""

    cid: int | None = None
    status: int = 0
    subscription: int | None = None
    receipt: str | None = None
    messages: list[Delivery] | None = None


class Delivery(msgspec.Struct, frozen=True):
    """What the load looks at."""

    id: str
    receipt: str
    body: str


_items = msgspec.json.Decoder(list[Item])


class LeanStream(asyncio.Protocol):
    """`ask` for an answer, `say` for none; deliveries gather in `deliveries`, each with the receipt
    for all of it if it has one, and `arrived` (a future, when somebody waits) is done when some
    come."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._transport: asyncio.Transport
        self._buffer = b""
        self._open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self.asked = 0
        """The number (`cid`) of the last question."""
        self.deliveries: deque[tuple[str | None, list[Delivery]]] = deque()
        self.arrived: asyncio.Future[None] | None = None
        self.refused = 0

    @classmethod
    async def connect(cls, address: str) -> LeanStream:
        """Shake hands."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(address), host, int(port))
        await stream._open
        return stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        key = base64.b64encode(os.urandom(16)).decode()
        self._transport.write(
            f"GET /stream HTTP/1.1\r\nHost: {self._address}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def ask(self, item: bytes, beside: bytes = b"") -> asyncio.Future[int]:
        """Send `{"op":…` (without its closing brace), in one frame with an item that needs no
        answer; the status of the answer."""
        self.asked += 1
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[self.asked] = answered
        text = b'%b,"cid":%d}' % (item, self.asked)
        self.say(b"[%b,%b]" % (text, beside) if beside else text)
        return answered

    def say(self, text: bytes, kind: int = 1) -> None:
        """Send a frame."""
        size = len(text)
        if size < 126:
            head = bytes((0x80 | kind, 0x80 | size))
        elif size < 65536:
            head = bytes((0x80 | kind, 0xFE)) + size.to_bytes(2, "big")
        else:
            head = bytes((0x80 | kind, 0xFF)) + size.to_bytes(8, "big")
        self._transport.write(head + b"\0\0\0\0" + text)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if not self._open.done():
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            assert buffer.startswith(b"HTTP/1.1 101"), buffer[:200]
            self._open.set_result(None)
            buffer = buffer[end + 4 :]
        at = 0
        while len(buffer) - at >= 2:
            size, start = buffer[at + 1] & 0x7F, at + 2
            if size == 126:
                size, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if len(buffer) < start + size:
                break
            kind, text = buffer[at] & 0x0F, buffer[start : start + size]
            at = start + size
            if kind == 1:
                self._take(_items.decode(text))
            elif kind == 9:
                self.say(text, 10)
        self._buffer = buffer[at:]

    def _take(self, items: list[Item]) -> None:
        for item in items:
            if item.messages is not None:
                self.deliveries.append((item.receipt, item.messages))
                if self.arrived is not None and not self.arrived.done():
                    self.arrived.set_result(None)
            elif item.cid is not None:
                answered = self._asked.pop(item.cid, None)
                if answered is not None and not answered.done():
                    answered.set_result(item.status)
            if item.status >= 400:
                self.refused += 1

    async def some(self, within_s: float) -> bool:
        """Wait for deliveries; False: none came in time."""
        if self.deliveries:
            return True
        self.arrived = asyncio.get_running_loop().create_future()
        waiting: asyncio.Future[Any] = self.arrived
        try:
            await asyncio.wait_for(waiting, within_s)
        except TimeoutError:
            return False
        return True

    def connection_lost(self, error: Exception | None) -> None:
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(ConnectionError("closed"))
                answered.exception()  # whoever waited for it may be gone

    def close(self) -> None:
        self._transport.close()
