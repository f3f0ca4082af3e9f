"""The answers of the hot path, put together as one piece of bytes.

`web.Response` builds a dictionary of headers and serialises it, which costs a third of a small
request. A `Reply` has the same headers, in one write; everything else about the connection (keep
alive, draining, shutdown) stays aiohttp's.
"""

from __future__ import annotations

import time
from email.utils import formatdate

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from secure_store.api.errors import REQUEST_ID, SAFE_HEADERS

_SAFE = "".join(f"{name}: {value}\r\n" for name, value in SAFE_HEADERS.items()).encode()
_date = (-1, b"")
DEGRADED = b"X-Replication: degraded\r\n"


def _dated() -> bytes:
    """The constant headers and the date, made once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        date = formatdate(now, usegmt=True).encode()
        _date = (now, b"%sContent-Type: application/json\r\nDate: %s\r\n" % (_SAFE, date))
    return _date[1]


def head(request_id: str, length: int, version: int, more: bytes) -> bytes:
    """The head of a 200 with `length` bytes of JSON. `version`: of the key, for `ETag` (0: none);
    `more`: headers as they stand on the wire, each with its line end."""
    if version:
        more += b'ETag: "%d"\r\n' % version
    return b"HTTP/1.1 200 OK\r\n%s%sX-Request-Id: %s\r\nContent-Length: %d\r\n\r\n" % (
        _dated(),
        more,
        request_id.encode(),
        length,
    )


class Reply(web.StreamResponse):
    """200 with a JSON body; see `head`."""

    def __init__(self, body: bytes, *, version: int = 0, more: bytes = b"") -> None:
        # Not the base class's: a dictionary of headers is what this does without.
        self._text = body
        self._version = version
        self._more = more
        self._sent = False
        self._alive: bool | None = None
        self._writer: AbstractStreamWriter | None = None
        self._head = b""

    @property
    def status(self) -> int:
        return 200

    @property
    def prepared(self) -> bool:
        return self._sent

    @property
    def keep_alive(self) -> bool | None:
        return self._alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._alive = request.keep_alive
        more = self._more
        if not self._alive:
            more += b"Connection: close\r\n"
        elif request.version < HttpVersion11:
            more += b"Connection: keep-alive\r\n"
        self._head = head(request[REQUEST_ID], len(self._text), self._version, more)
        self._writer = request.writer
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        if self._writer is not None and not self._sent:
            self._sent = True
            await self._writer.write_eof(self._head + self._text)
