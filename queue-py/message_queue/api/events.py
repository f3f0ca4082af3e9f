"""GET /events: what happens in the node, as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
from aiohttp import web

MAX_SUBSCRIBERS = 64
BACKLOG = 1024
KEEPALIVE_S = 15.0


class EventHub:
    """Fan-out to subscribers. `publish` never waits: slow readers lose the oldest, and are told."""

    def __init__(self) -> None:
        self._subscribers: list[_Subscriber] = []
        self._closed = False

    def publish(self, kind: str, **fields: object) -> None:
        """Send `{"kind": …, **fields}` to everyone who listens; free when nobody does."""
        if self._subscribers:
            line = b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(fields))
            for subscriber in self._subscribers:
                subscriber.put(line)

    def close(self) -> None:
        """End every stream (at shutdown)."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.wake.set()

    async def stream(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        """Serve one subscriber until it hangs up or the node stops."""
        if len(self._subscribers) >= MAX_SUBSCRIBERS or self._closed:
            raise web.HTTPServiceUnavailable(
                text="Too many event streams", headers={"Retry-After": "5"}
            )
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "Server": "message-queue",
                "X-Content-Type-Options": "nosniff",
                **headers,
            }
        )
        await response.prepare(request)
        subscriber = _Subscriber()
        self._subscribers.append(subscriber)
        try:
            await response.write(b": connected\n\n")
            while not self._closed:
                await response.write(await subscriber.take())
        except ConnectionError:
            pass  # it hung up: that is how these streams end
        finally:
            self._subscribers.remove(subscriber)
        return response


class _Subscriber:
    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self.wake = asyncio.Event()

    def put(self, line: bytes) -> None:
        if len(self._lines) >= BACKLOG:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)
        self.wake.set()

    async def take(self) -> bytes:
        if not self._lines:
            self.wake.clear()
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    await self.wake.wait()
            except TimeoutError:
                return b": keepalive\n\n"
        lost = b'event: lost\ndata: {"count":%d}\n\n' % self._lost if self._lost else b""
        self._lost = 0
        lines = b"".join(self._lines)
        self._lines.clear()
        return lost + lines
