"""GET /watch: decided changes under a prefix, as server-sent events, each checked for
permission."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec
from aiohttp import web

MAX_WATCHERS = 256
BACKLOG = 1024
KEEPALIVE_S = 15.0


class Watcher:
    """One open stream. `may_read(key)` is asked for every event; `is_valid()` when rights
    change."""

    def __init__(
        self, prefix: str, may_read: Callable[[str], bool], is_valid: Callable[[], bool]
    ) -> None:
        self.prefix = prefix
        self.may_read = may_read
        self.is_valid = is_valid
        self.lines: deque[bytes] = deque()
        self.lost = 0
        self.ended = False
        self.wake = asyncio.Event()

    def put(self, line: bytes) -> None:
        if len(self.lines) >= BACKLOG:  # a slow reader loses the oldest, and is told
            self.lines.popleft()
            self.lost += 1
        self.lines.append(line)
        self.wake.set()

    def end(self) -> None:
        self.ended = True
        self.wake.set()


class WatchHub:
    """Fan-out of decided changes; free when nobody watches."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []
        self._closed = False

    def publish(self, kind: str, key: str, version: int, value: bytes | None = None) -> None:
        for watcher in self._watchers:
            if key.startswith(watcher.prefix) and not watcher.ended and watcher.may_read(key):
                data = {"key": key, "version": version}
                if value is not None:
                    line = msgspec.json.encode({**data, "value": msgspec.Raw(value)})
                else:
                    line = msgspec.json.encode(data)
                watcher.put(b"event: %s\ndata: %s\n\n" % (kind.encode(), line))

    def recheck(self) -> None:
        """Rights have changed: streams whose token is no longer valid end now."""
        for watcher in self._watchers:
            if not watcher.is_valid():
                watcher.end()

    def close(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.end()

    def has_room(self) -> bool:
        return len(self._watchers) < MAX_WATCHERS and not self._closed

    async def stream(self, request: web.Request, watcher: Watcher, headers: dict[str, str]) -> (
        web.StreamResponse
    ):  # fmt: skip
        """Serve one watcher until it hangs up, its token ends, or the node stops."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
        response.force_close()  # the end of the stream is the end of the connection
        await response.prepare(request)
        self._watchers.append(watcher)
        try:
            await response.write(b": connected\n\n")
            while not watcher.ended and not self._closed:
                await response.write(await self._take(watcher))
            if not self._closed:
                await response.write(b"event: end\ndata: {}\n\n")
        except ConnectionError:
            pass  # it hung up: that is how these streams end
        finally:
            self._watchers.remove(watcher)
        return response

    async def _take(self, watcher: Watcher) -> bytes:
        if not watcher.lines:
            watcher.wake.clear()
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    await watcher.wake.wait()
            except TimeoutError:
                if not watcher.is_valid():
                    watcher.end()
                return b": keepalive\n\n"
        lost = b'event: lost\ndata: {"count":%d}\n\n' % watcher.lost if watcher.lost else b""
        watcher.lost = 0
        lines = b"".join(watcher.lines)
        watcher.lines.clear()
        return lost + lines
