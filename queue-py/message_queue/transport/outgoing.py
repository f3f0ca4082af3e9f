"""One outgoing link of a node: what waits for it, and its frames (a msgpack array of messages)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial

import aiohttp

from message_queue.metrics import Metrics
from message_queue.websocket import BINARY, dialler_head

FRAME_TARGET_BYTES = 1 << 20
OUTBOX_BYTES = 32 << 20
MAX_FRAME_MESSAGES = 0xFFFF
ROOM_BYTES = 256 << 10
"""In a transport's buffer; beyond that nothing is added until it has drained."""


class Outgoing:
    """One outgoing link: encoded messages that wait for it, bounded in bytes.

    A frame is written in the turn of the loop that made its messages, and as long as the transport
    has room, straight to it: one copy, where aiohttp's client makes three and a pass over the bytes
    for the mask. When it has none, `write` takes the first step of `send_bytes` itself, as an eager
    task would (asyncio has those from 3.12 on); the last one tells that there is room again.
    """

    __slots__ = (
        "_bytes", "_empty", "_messages", "_metrics", "_sending", "_transport", "_ws", "talking",
    )  # fmt: skip

    def __init__(self, metrics: Metrics) -> None:
        self.talking = False
        """Stands in the list of those who write at the end of this turn."""
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        """None: the link is down."""
        self._transport: asyncio.WriteTransport | None = None
        """Of `_ws`, if it could be had."""
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._metrics = metrics
        self._sending: Coroutine[asyncio.Future[None], None, None] | None = None
        """The last frame is in the transport's buffer, which is too full for another one."""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def up(self) -> bool:
        return self._ws is not None

    def raise_up(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        """The link stands."""
        # Masks protect proxies from what a browser may be made to send; a node is no browser. Of a
        # mask of zeros the other side has nothing to undo: a third of its work for large bodies.
        # aiohttp has no option for it; should it be made otherwise one day, masks are random again.
        writer = getattr(ws, "_writer", None)
        if hasattr(writer, "get_random_bits"):
            setattr(writer, "get_random_bits", int)  # noqa: B010 - no attribute that mypy knows
        self._transport = getattr(writer, "transport", None)
        self._ws = ws

    def lower(self) -> None:
        """It broke. What is queued would arrive stale."""
        self._ws = self._transport = None
        self._messages.clear()
        self._bytes = 0
        if self._sending is not None:
            self._sending.close()
            self._sending = None
        self._empty.set()

    def put(self, encoded: bytes) -> bool:
        """Queue a message. False: the link is down or full."""
        if self._ws is None or (self._bytes + len(encoded) > OUTBOX_BYTES and self._messages):
            return False
        self._messages.append(encoded)
        self._bytes += len(encoded)
        return True

    def write(self) -> None:
        """Write what waits; what does not fit into the transport's buffer leaves later."""
        if self._ws is None or self._sending is not None:
            return
        transport = self._transport
        while self._messages:
            if transport is not None and transport.get_write_buffer_size() < ROOM_BYTES:
                if transport.is_closing():
                    return  # the task that holds the link learns of it as well
                size, parts = self._take()
                transport.write(b"".join((dialler_head(size, BINARY), *parts)))
                continue
            _, parts = self._take()
            sending = self._ws.send_bytes(b"".join(parts))
            try:
                room = sending.send(None)
            except StopIteration:
                continue
            except (aiohttp.ClientError, OSError):
                return  # the task that holds the link learns of it as well
            self._sending = sending
            self._empty.clear()
            room.add_done_callback(partial(self._go_on, sending))
            return

    def _go_on(
        self, sending: Coroutine[asyncio.Future[None], None, None], _: asyncio.Future[None]
    ) -> None:
        """There is room again; or the connection broke, or the link was lowered meanwhile."""
        if self._sending is not sending:
            return
        with suppress(StopIteration, aiohttp.ClientError, OSError):
            sending.send(None)
        self._sending = None
        self.write()
        if self._sending is None:
            self._empty.set()

    def _take(self) -> tuple[int, list[bytes]]:
        """The payload of a frame, in parts, and its length: all that waits, up to about
        FRAME_TARGET_BYTES."""
        parts = [b""]
        size = 0
        while self._messages and size < FRAME_TARGET_BYTES and len(parts) <= MAX_FRAME_MESSAGES:
            encoded = self._messages.popleft()
            parts.append(encoded)
            size += len(encoded)
        self._bytes -= size
        count = len(parts) - 1
        self._metrics.peer_frames_sent += 1
        self._metrics.peer_messages_sent += count
        parts[0] = _array_header(count)
        return size + len(parts[0]), parts

    async def drained(self) -> None:
        """All that was queued is in the transport's hands."""
        await self._empty.wait()


def _array_header(n: int) -> bytes:
    return bytes((0x90 | n,)) if n < 16 else b"\xdc" + n.to_bytes(2, "big")
