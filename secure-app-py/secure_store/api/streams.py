"""Server-sent events (WHATWG HTML, section 9.2): one open stream, and how it is served to its end.

A stream lives no longer than the token that opened it: it ends when that is revoked (`recheck`),
and at the moment it expires.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from aiohttp import web

BACKLOG = 1024
KEEPALIVE_S = 15.0


class Listener:
    """One open stream. `is_valid()`: whether its token may still be used; `expires_ms`: until when
    at most (UTC, 0: without end)."""

    def __init__(self, is_valid: Callable[[], bool], expires_ms: int) -> None:
        self.is_valid = is_valid
        self.expires_ms = expires_ms
        self.lines: deque[bytes] = deque()
        self.lost = 0
        self.ended = False
        self.wake = asyncio.Event()

    def put(self, line: bytes) -> None:
        """Queue an event; a slow reader loses the oldest, and is told."""
        if len(self.lines) >= BACKLOG:
            self.lines.popleft()
            self.lost += 1
        self.lines.append(line)
        self.wake.set()

    def end(self) -> None:
        self.ended = True
        self.wake.set()

    async def take(self) -> bytes:
        """What to send next; nothing if the stream is over."""
        if not self.lines and not self.ended:
            self.wake.clear()
            left_s = self.expires_ms / 1000 - time.time() if self.expires_ms else KEEPALIVE_S
            try:
                async with asyncio.timeout(max(0.0, min(KEEPALIVE_S, left_s))):
                    await self.wake.wait()
            except TimeoutError:
                return b": keepalive\n\n" if self.is_valid() else b""
        lost = b'event: lost\ndata: {"count":%d}\n\n' % self.lost if self.lost else b""
        self.lost = 0
        lines = b"".join(self.lines)
        self.lines.clear()
        return lost + lines


L = TypeVar("L", bound=Listener)


class Hub(Generic[L]):
    """The open streams of one kind, so many at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.listeners: list[L] = []
        self._closed = False

    def recheck(self) -> None:
        """Tokens have changed: streams whose token is no longer valid end now."""
        for listener in self.listeners:
            if not listener.is_valid():
                listener.end()

    def close(self) -> None:
        """End every stream (at shutdown)."""
        self._closed = True
        for listener in self.listeners:
            listener.end()

    def has_room(self) -> bool:
        return len(self.listeners) < self._limit and not self._closed

    async def serve(
        self, request: web.Request, listener: L, headers: dict[str, str], first: Iterable[bytes]
    ) -> web.StreamResponse:
        """Serve one stream until it hangs up, its token ends, or the node stops. `first`: what it
        gets before anything that is published from now on (not taken up before it listens)."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
        response.force_close()  # the end of the stream is the end of the connection
        await response.prepare(request)
        self.listeners.append(listener)
        try:
            await response.write(b": connected\n\n" + b"".join(first))
            while not (listener.ended or self._closed) and listener.is_valid():
                await response.write(await listener.take())
            if not self._closed:
                await response.write(b"event: end\ndata: {}\n\n")
        except ConnectionError:
            pass  # it hung up: that is how these streams end
        finally:
            self.listeners.remove(listener)
        return response
