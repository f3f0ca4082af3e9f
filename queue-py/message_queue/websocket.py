"""The server's side of a WebSocket (RFC 6455), without a task or a future for a frame.

aiohttp's own hands each message through a queue to a task that must be woken, and each answer
through a coroutine; on a connection that carries thousands of small messages a second that costs
more than what is done with them. Here a frame is handled in the call that brought its bytes, and
what is written goes straight to the transport.

`FrameReader` is the protocol's reading half, pure; `WebSocket` joins it to an aiohttp request.
Extensions and subprotocols are not offered.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiohttp import WSCloseCode, web
from aiohttp.abc import AbstractStreamWriter

CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10
_KNOWN = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTROL_BYTES = 125
_NO_MASK: Final = b"\0\0\0\0"
_CLOSE_WITHIN_S = 1.0
_CLOSE_CODES: Final = frozenset((*range(1000, 1004), *range(1007, 1015)))
_FULL_BYTES: Final = 256 * 1024
"""In the transport's buffer; beyond that nothing is added until it has drained. Above the mark at
which transports stop their writers, so that one that is full tells when it has drained."""


class ProtocolError(Exception):
    """The peer broke the protocol; `code` is the close code that says how."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class FrameReader:
    """Bytes in, messages out: (opcode, payload), of text, binary and control frames; continued
    ones are put together. A message is at most `max_bytes` long."""

    __slots__ = ("_have", "_max_bytes", "_need", "_opcode", "_partial", "_parts")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        """What came of a frame that is not complete,"""
        self._have = 0
        self._need = 0
        """and how many bytes there must be before it is worth another look."""
        self._opcode = CONTINUATION
        """Of the message that is being continued."""
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The messages that are complete with `data`. Raises ProtocolError; then it is over."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        found: list[tuple[int, bytes]] = []
        at, end = 0, len(data)
        while end - at >= 2:
            first, second = data[at], data[at + 1]
            size, start = second & 0x7F, at + 6
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 8
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 14
            if end < start:
                self._need = start - at
                break
            self._check(first, second, size)
            if end < start + size:
                self._need = start + size - at
                break
            payload = data[start : start + size]
            mask = data[start - 4 : start]
            if mask != _NO_MASK:
                payload = _unmasked(payload, mask)
            at = start + size
            opcode = first & 0x0F
            if first & 0x80 and opcode != CONTINUATION:
                if opcode == CLOSE:
                    _check_close(payload)
                found.append((opcode, payload))
            else:
                self._continue(opcode, bool(first & 0x80), payload, found)
        else:
            self._need = 2
        if at < end:
            self._parts.append(data[at:] if at else data)
            self._have = end - at
        return found

    def _check(self, first: int, second: int, size: int) -> None:
        opcode = first & 0x0F
        if first & 0x70 or opcode not in _KNOWN:
            raise ProtocolError(WSCloseCode.PROTOCOL_ERROR, "reserved bits or opcode")
        if not second & 0x80:
            raise ProtocolError(WSCloseCode.PROTOCOL_ERROR, "frame without a mask")
        if opcode >= CLOSE:
            if size > _CONTROL_BYTES or not first & 0x80:
                raise ProtocolError(WSCloseCode.PROTOCOL_ERROR, "control frame in parts")
            return
        if (opcode == CONTINUATION) is not (self._opcode != CONTINUATION):
            raise ProtocolError(WSCloseCode.PROTOCOL_ERROR, "continuation out of place")
        if len(self._partial) + size > self._max_bytes:
            raise ProtocolError(WSCloseCode.MESSAGE_TOO_BIG, "message too big")

    def _continue(
        self, opcode: int, last: bool, payload: bytes, found: list[tuple[int, bytes]]
    ) -> None:
        if opcode != CONTINUATION:
            self._opcode = opcode
        self._partial += payload
        if last:
            found.append((self._opcode, bytes(self._partial)))
            self._opcode = CONTINUATION
            self._partial.clear()


def _check_close(payload: bytes) -> None:
    """RFC 6455, section 7.4: a code that may be sent, and a reason in UTF-8; or nothing at all."""
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (code in _CLOSE_CODES or 3000 <= code < 5000):
        raise ProtocolError(WSCloseCode.PROTOCOL_ERROR, "close code")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise ProtocolError(WSCloseCode.INVALID_TEXT, "close reason") from None


def _unmasked(payload: bytes, mask: bytes) -> bytes:
    """As whole numbers: linear in the length, and in C."""
    size = len(payload)
    pad = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(payload, "little") ^ pad).to_bytes(size, "little")


def frame(payload: bytes, opcode: int) -> bytes:
    """One whole frame from a server."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def dialler_head(size: int, opcode: int) -> bytes:
    """What precedes `size` bytes of payload in a whole frame from the side that dialled: its mask
    is of zeros, so that neither side has anything to do with the payload."""
    if size < 126:
        return bytes((0x80 | opcode, 0x80 | size)) + _NO_MASK
    if size < 65536:
        return bytes((0x80 | opcode, 0xFE)) + size.to_bytes(2, "big") + _NO_MASK
    return bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big") + _NO_MASK


def accept_key(headers: web.BaseRequest) -> str:
    """What answers the client's handshake. Raises HTTPBadRequest."""
    given = headers.headers
    if given.get("Upgrade", "").strip().lower() != "websocket":
        raise web.HTTPBadRequest(text="Expected Upgrade: websocket")
    if "upgrade" not in [word.strip() for word in given.get("Connection", "").lower().split(",")]:
        raise web.HTTPBadRequest(text="Expected Connection: Upgrade")
    if given.get("Sec-WebSocket-Version", "") != "13":
        raise web.HTTPBadRequest(text="Unsupported WebSocket version")
    key = given.get("Sec-WebSocket-Key", "")
    try:
        good = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        good = False
    if not good:
        raise web.HTTPBadRequest(text="Bad Sec-WebSocket-Key")
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


class Messages(Protocol):
    """Who takes what comes: text and binary messages, in the turn in which they came."""

    def __call__(self, opcode: int, payload: bytes, /) -> None: ...


class WebSocket:
    """`open` it, `listen`, `await closed()` in the request's handler, `end` it, and give its
    response back.

    Pings are answered; with `heartbeat_s` a peer that says nothing
    for that long is pinged, and cut off when it stays silent for as long again.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        writer: AbstractStreamWriter,
        transport: asyncio.Transport,
        max_bytes: int,
        heartbeat_s: float,
    ) -> None:
        self.response = response
        self.remote = request.remote
        self._protocol = request.protocol
        self._on_message: Messages
        self._writer = writer
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(max_bytes)
        self._heartbeat_s = heartbeat_s
        self._heard = True
        self._closing = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._timer = self._loop.call_later(heartbeat_s, self._beat)
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, request: web.Request, *, max_bytes: int, heartbeat_s: float) -> WebSocket:
        """Shake hands. Raises HTTPBadRequest, or ConnectionError when the client is gone."""
        headers = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Accept": accept_key(request),
            "Server": "message-queue",
        }
        response = web.StreamResponse(status=101, headers=headers)
        response.force_close()
        writer = await response.prepare(request)
        transport = request.transport
        if writer is None or transport is None:
            raise ConnectionResetError("the client is gone")
        return cls(request, response, writer, transport, max_bytes, heartbeat_s)

    def listen(self, on_message: Messages) -> None:
        """From here on each message is handed to this, those that were too early first."""
        self._on_message = on_message
        # The connection now brings its bytes to `feed_data`. It asks for no more than that and
        # `feed_eof` of aiohttp's own reader.
        parser: Any = self
        self._protocol.keep_alive(False)
        self._protocol.set_parser(parser)

    async def closed(self) -> None:
        """Until the connection is of no use any more."""
        await self._gone

    def end(self) -> None:
        """The handler ends: nothing is called any more."""
        self._timer.cancel()
        if self._draining is not None:
            self._draining.cancel()
        self._transport.close()
        self._lost()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """The connection brings bytes."""
        self._heard = True
        try:
            messages = self._reader.feed(data if type(data) is bytes else bytes(data))
        except ProtocolError as error:
            self.close(error.code, str(error))
            return False, b""
        for opcode, payload in messages:
            if opcode in (TEXT, BINARY):
                if self._closing:
                    continue
                self._on_message(opcode, payload)
            elif opcode == PING:
                self._send(payload, PONG)
            elif opcode == CLOSE:
                if not self._closing:
                    self._send(payload[:2], CLOSE)
                self._closing = True
                self._transport.close()
                self._lost()
                break
        return False, b""

    def feed_eof(self) -> None:
        """The connection is gone."""
        self._lost()

    def _lost(self) -> None:
        self._closing = True
        if not self._gone.done():
            self._gone.set_result(None)

    def _beat(self) -> None:
        if not self._heard:
            self._transport.abort()
            return
        self._heard = False
        self._send(b"", PING)
        self._timer = self._loop.call_later(self._heartbeat_s, self._beat)

    def pause_reading(self) -> None:
        """Take no more for a while: the peer's socket fills up."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # ── out ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_open(self) -> bool:
        """Whether `send` would reach the transport."""
        return not self._closing and not self._transport.is_closing()

    @property
    def full(self) -> bool:
        """The transport has much to write already: wait for `when_drained`."""
        return self._transport.get_write_buffer_size() > _FULL_BYTES

    def send(self, payload: bytes, opcode: int) -> bool:
        """Write a message at once. False: the connection is closing, and nothing was written."""
        if self._closing or self._transport.is_closing():
            return False
        self._transport.write(frame(payload, opcode))
        return True

    def when_drained(self, call: Callable[[], None]) -> None:
        """Call this when the transport has written most of what it has. One at a time."""
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain(call))

    async def _drain(self, call: Callable[[], None]) -> None:
        try:
            await self._writer.drain()
        except ConnectionError:
            self._lost()
            return
        self._draining = None
        call()

    def _send(self, payload: bytes, opcode: int) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame(payload, opcode))

    def close(self, code: int, reason: str) -> None:
        """Say why, and wait a second at most for the peer to close too."""
        if self._closing:
            return
        self._send(code.to_bytes(2, "big") + reason.encode()[: _CONTROL_BYTES - 2], CLOSE)
        self._closing = True
        self._timer.cancel()
        self._timer = self._loop.call_later(_CLOSE_WITHIN_S, self._cut)

    def _cut(self) -> None:
        self._transport.abort()
        self._lost()

    def abort(self) -> None:
        """End it without a word."""
        self._transport.abort()
