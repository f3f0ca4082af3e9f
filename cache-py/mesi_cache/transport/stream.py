"""Frames of bytes over one connection: what a link is made of once HTTP has let it in.

A frame is its length (4 bytes, little-endian) and so many bytes; an empty frame is a sign of life,
which the accepting side gives back. Nothing here is a task: a frame is handed on in the turn of the
loop in which its last byte came, and written in the turn after the one that made it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

MAX_HEAD_BYTES = 8192
_LENGTH = 4
_ALIVE = bytes(_LENGTH)


class FrameStream(asyncio.Protocol):
    """One connection, from the moment when it speaks in frames. `max_bytes` bounds a frame."""

    def __init__(
        self,
        on_frame: Callable[[bytes], None],
        on_writable: Callable[[], None],
        on_lost: Callable[[Exception | None], None],
        max_bytes: int,
    ) -> None:
        self.max_bytes = max_bytes
        self.writable = True  # the transport's buffer has room
        self.heard = True  # something came since `heard` was last set to False
        self.echo = False  # give signs of life back
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_frame = on_frame
        self._on_writable = on_writable
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._missing = _LENGTH  # so many bytes must be there before it is worth a look

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not registered as asyncio.Transport, but behave like it.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)
        self._on_lost(exc)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._on_writable()

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._missing:
                return
            data, self._buffer = bytes(self._buffer), bytearray()
        at, size = 0, len(data)
        while size - at >= _LENGTH:
            length = int.from_bytes(data[at : at + _LENGTH], "little")
            if length > self.max_bytes:
                self.abort()
                return
            end = at + _LENGTH + length
            if end > size:
                break
            if length:
                self._on_frame(data[at + _LENGTH : end])
            elif self.echo:
                self.alive()
            if self._transport is None or self._transport.is_closing():
                return
            at = end
        if at < size:
            self._buffer += data[at:]
            length = int.from_bytes(self._buffer[:_LENGTH], "little") if size - at >= _LENGTH else 0
            self._missing = _LENGTH + length

    def send(self, payload: bytes) -> None:
        """Write one frame; lost if the connection is."""
        if self._transport is not None:
            self._transport.write(len(payload).to_bytes(_LENGTH, "little") + payload)

    def alive(self) -> None:
        """Say that this side is there."""
        if self._transport is not None:
            self._transport.write(_ALIVE)

    def close(self) -> None:
        """After what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """At once."""
        if self._transport is not None:
            self._transport.abort()


class Dialled(FrameStream):
    """The dialling side: before the frames comes the answer to its HTTP upgrade."""

    def __init__(
        self,
        on_frame: Callable[[bytes], None],
        on_writable: Callable[[], None],
        on_lost: Callable[[Exception | None], None],
        max_bytes: int,
    ) -> None:
        super().__init__(on_frame, on_writable, on_lost, max_bytes)
        # The status line, e.g. `HTTP/1.1 101 Switching Protocols`.
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._head = b""

    def ask(self, request: bytes) -> None:
        """Write the upgrade request."""
        if self._transport is not None:
            self._transport.write(request)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(exc or ConnectionResetError("closed before its answer"))
            self.answered.exception()  # whoever waits is told; if nobody does, nobody minds
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.answered.done():
            super().data_received(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > MAX_HEAD_BYTES:
                self.abort()
            return
        rest, self._head = self._head[end + 4 :], self._head[:end]
        self.answered.set_result(self._head.split(b"\r\n", 1)[0].decode("latin-1"))
        if rest:
            super().data_received(rest)
