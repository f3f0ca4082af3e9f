"""Lean clients of the peers' own protocols: RESP, NATS, beanstalkd's and AMQP 0-9-1.

Only what the load needs, with futures answered in order, so that a peer is not measured through a
slow library. Each is one connection.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self, cast


class Wire(asyncio.Protocol):
    """A connection; subclasses take complete units out of `data_received`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.buffer = b""
        self.asked: deque[asyncio.Future[Any]] = deque()

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Connect and greet."""
        _, wire = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        await wire.greet()
        return wire

    async def greet(self) -> None:
        """Whatever the protocol begins with."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        for asked in self.asked:
            if not asked.done():
                asked.set_exception(ConnectionError("closed"))
                asked.exception()  # whoever waited for it may be gone

    def ask(self, request: bytes) -> asyncio.Future[Any]:
        """Send; the next answer in order."""
        asked = self.loop.create_future()
        self.asked.append(asked)
        self.transport.write(request)
        return asked

    def answer(self, value: object) -> None:
        """The oldest question's answer came."""
        asked = self.asked.popleft()
        if not asked.done():
            asked.set_result(value)

    def close(self) -> None:
        """Hang up."""
        self.transport.close()


class Resp(Wire):
    """Redis."""

    def command(self, *parts: bytes) -> asyncio.Future[Any]:
        return self.ask(self.packed(*parts))

    def commands(self, commands: Sequence[tuple[bytes, ...]]) -> list[asyncio.Future[Any]]:
        """Several in one write."""
        asked = [self.loop.create_future() for _ in commands]
        self.asked.extend(asked)
        self.transport.write(b"".join(self.packed(*parts) for parts in commands))
        return asked

    @staticmethod
    def packed(*parts: bytes) -> bytes:
        return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        at = 0
        while (found := self._value(at)) is not None:
            value, at = found
            self.answer(value)
        self.buffer = self.buffer[at:]

    def _value(self, at: int) -> tuple[Any, int] | None:
        end = self.buffer.find(b"\r\n", at)
        if end < 0:
            return None
        kind, text, at = self.buffer[at : at + 1], self.buffer[at + 1 : end], end + 2
        if kind == b"$":
            size = int(text)
            if size < 0:
                return None if at > len(self.buffer) else (None, at)
            return (
                (self.buffer[at : at + size], at + size + 2)
                if at + size + 2 <= len(self.buffer)
                else None
            )
        if kind == b"*":
            items: list[Any] = []
            for _ in range(max(0, int(text))):
                found = self._value(at)
                if found is None:
                    return None
                items.append(found[0])
                at = found[1]
            return items, at
        return (int(text) if kind == b":" else text), at


class Beanstalk(Wire):
    """Answers are lists of words, the last one a body where there is one."""

    def data_received(self, data: bytes) -> None:
        buffer, at = self.buffer + data, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            words = buffer[at:end].split()
            at_next = end + 2
            if words[0] in (b"RESERVED", b"OK"):
                size = int(words[-1])
                if len(buffer) < end + size + 4:
                    break
                words[-1] = buffer[end + 2 : end + 2 + size]
                at_next = end + size + 4
            at = at_next
            self.answer(words)
        self.buffer = buffer[at:]


class Nats(Wire):
    """`request` answers on an inbox; other messages go to `on_message(reply_to, body)`."""

    made = 0

    async def greet(self) -> None:
        Nats.made += 1
        self.inbox = b"_INBOX.%d." % Nats.made
        self.number = 0
        self.waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self.on_message: Callable[[bytes, bytes], None] = lambda _reply_to, _body: None
        hello = b'CONNECT {"verbose":false,"headers":true,"no_responders":true,"protocol":1}\r\n'
        await self.ask(hello + b"SUB %b* 1\r\nPING\r\n" % self.inbox)

    def request(self, subject: bytes, body: bytes) -> asyncio.Future[bytes]:
        self.number += 1
        waiting = self.waiting[b"%d" % self.number] = self.loop.create_future()
        inbox = b"%b%d" % (self.inbox, self.number)
        self.transport.write(b"PUB %b %b %d\r\n%b\r\n" % (subject, inbox, len(body), body))
        return waiting

    def data_received(self, data: bytes) -> None:
        buffer, at = self.buffer + data, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            words = buffer[at:end].split()
            if words[0] in (b"MSG", b"HMSG"):
                size = int(words[-1])
                if len(buffer) < end + size + 4:
                    break
                head = int(words[-2]) if words[0] == b"HMSG" else 0
                body = buffer[end + 2 + head : end + 2 + size]
                sizes = 2 if words[0] == b"HMSG" else 1
                reply_to = words[3] if len(words) - sizes == 4 else b""
                self._message(words[1], reply_to, body)
                at = end + size + 4
                continue
            at = end + 2
            if words[0] == b"PING":
                self.transport.write(b"PONG\r\n")
            elif words[0] == b"PONG" and self.asked:
                self.answer(None)
        self.buffer = buffer[at:]

    def _message(self, subject: bytes, reply_to: bytes, body: bytes) -> None:
        if subject.startswith(b"_INBOX."):
            waiting = self.waiting.pop(subject.rsplit(b".", 1)[1], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(body)
        else:
            self.on_message(reply_to, body)


class Amqp(Wire):
    """RabbitMQ: one channel, publisher confirms, pushed deliveries in `delivered`."""

    async def greet(self) -> None:
        self.sequence = 0
        self.confirmed = 1
        self.unconfirmed: dict[int, asyncio.Future[None]] = {}
        self.delivered: deque[tuple[int, bytes]] = deque()
        self.arrived: asyncio.Future[None] | None = None
        self._tag = self._size = 0
        await self.ask(b"AMQP\x00\x00\x09\x01")
        start_ok = struct.pack(">I", 0) + b"\x05PLAIN" + _long(b"\0guest\0guest") + b"\x05en_US"
        await self.call(10, 11, start_ok, 0)
        self.transport.write(_method(10, 31, struct.pack(">HIH", 2047, 131072, 0), 0))
        await self.call(10, 40, b"\x01/\0\0", 0)
        await self.call(20, 10, b"\0")
        await self.call(85, 10, b"\0")

    def call(self, group: int, number: int, arguments: bytes, channel: int = 1) -> Any:
        return self.ask(_method(group, number, arguments, channel))

    async def declare(self, queue: bytes) -> int:
        """A durable quorum queue; how many messages are ready in it."""
        kind = b"\x0cx-queue-typeS" + _long(b"quorum")
        body = await self.call(50, 10, b"\0\0" + _short(queue) + b"\x02" + _long(kind))
        return int(struct.unpack_from(">I", body, 1 + body[0])[0])

    async def delete(self, queue: bytes) -> None:
        await self.call(50, 40, b"\0\0" + _short(queue) + b"\0")

    async def subscribe(self, queue: bytes, prefetch: int) -> None:
        await self.call(60, 10, struct.pack(">IHB", 0, prefetch, 0))
        await self.call(60, 20, b"\0\0" + _short(queue) + b"\x01c" + b"\0" + _long(b""))

    def publish(self, queue: bytes, bodies: Sequence[bytes]) -> list[asyncio.Future[None]]:
        """Persistent messages in one write; a future a confirm."""
        parts, confirms = [], []
        method = _method(60, 40, b"\0\0\0" + _short(queue) + b"\0", 1)
        for body in bodies:
            self.sequence += 1
            confirm = self.unconfirmed[self.sequence] = self.loop.create_future()
            confirms.append(confirm)
            head = struct.pack(">HHQHB", 60, 0, len(body), 0x1000, 2)
            parts += [method, _frame(2, head, 1), _frame(3, body, 1)]
        self.transport.write(b"".join(parts))
        return confirms

    def ack(self, tag: int, multiple: bool) -> None:
        self.transport.write(_method(60, 80, struct.pack(">QB", tag, multiple), 1))

    def data_received(self, data: bytes) -> None:
        buffer, at = self.buffer + data, 0
        while len(buffer) - at >= 8:
            kind, _, size = struct.unpack_from(">BHI", buffer, at)
            if len(buffer) - at < size + 8:
                break
            payload = buffer[at + 7 : at + 7 + size]
            at += size + 8
            if kind == 1:
                self._method(payload)
            elif kind == 3:
                self.delivered.append((self._tag, payload))
                if self.arrived is not None and not self.arrived.done():
                    self.arrived.set_result(None)
        self.buffer = buffer[at:]

    def _method(self, payload: bytes) -> None:
        name = struct.unpack_from(">HH", payload)
        if name == (60, 80):
            tag, multiple = struct.unpack_from(">QB", payload, 4)
            for sequence in range(self.confirmed, tag + 1) if multiple else (tag,):
                confirm = self.unconfirmed.pop(sequence, None)
                if confirm is not None:
                    confirm.set_result(None)
            if multiple:
                self.confirmed = tag + 1
        elif name == (60, 60):
            self._tag = struct.unpack_from(">Q", payload, 5 + payload[4])[0]
        elif name in ((10, 50), (20, 40)):
            raise ConnectionError(f"RabbitMQ closed: {payload[4:]!r}")
        elif self.asked:
            self.answer(payload[4:])


def _short(text: bytes) -> bytes:
    return bytes((len(text),)) + text


def _long(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def _frame(kind: int, payload: bytes, channel: int) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def _method(group: int, number: int, arguments: bytes, channel: int) -> bytes:
    return _frame(1, struct.pack(">HH", group, number) + arguments, channel)
