"""A short way for the requests that are nearly all requests: read, write, cas, delete, incr.

aiohttp costs 60 to 100 us a request, most of it for what a cache's client never sends, and a hit
itself takes one. So a chunk that is exactly one plain request for one of those paths is decoded and
answered here, in the turn of the loop in which it came or in which the node knows the answer. Plain
means what `_HEADERS` says: a few harmless headers, each spelled simply, a Content-Length that ends
with the chunk (or with a later one: many clients send head and body apart). Everything else (other
paths and headers, pipelined requests, input that is refused) goes aiohttp's way, which alone knows
HTTP. Both ways give the same answers: they share `answers.py`, and test_express_cache.py compares.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol
from urllib.parse import unquote

import msgspec

from mesi_cache.api.answers import answer_of
from mesi_cache.api.errors import ApiError, next_request_id
from mesi_cache.api.keys import Service
from mesi_cache.api.schemas import (
    MAX_KEY_BYTES,
    Asked,
    decode_cas,
    decode_delete,
    decode_incr,
    decode_write,
)
from mesi_cache.clock import now_ms
from mesi_cache.core.records import Operation
from mesi_cache.core.step import Answer
from mesi_cache.metrics import Metrics

MAX_HEAD_BYTES = 2048
# A query's escapes are those of visible ASCII and the blank.
_FIRST = re.compile(
    rb"(GET|POST) (/[A-Za-z0-9._~/-]*)(?:\?((?:[A-Za-z0-9._~:/@,=-]|%[2-7][0-9A-Fa-f])*+))?"
    rb" HTTP/1\.1\r\n"
)
# No Origin, Cookie, Authorization, Expect, Transfer-Encoding, Upgrade or Idempotency-Key; no
# obs-fold, no spaces before a colon, no Accept that could ask for problem+json.
_HEADERS = re.compile(
    rb"(?:(?i:host|user-agent|accept-encoding|accept-language|content-type):[\x20-\x7e]*+\r\n"
    rb"|(?i:accept): ?(?:\*/\*|application/json)\r\n"
    rb"|(?i:connection): ?(?i:keep-alive)\r\n"
    rb"|(?i:content-length): ?(?P<length>[0-9]{1,7})\r\n"
    rb"|(?i:x-request-id): ?(?P<id>[A-Za-z0-9._:-]{1,128})\r\n)*\r\n"
)
_NAMES = re.compile(rb"(?:^|\r\n)([a-z-]+):")
_QUERY = b"key="
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_encode = msgspec.json.Encoder().encode

_CHANGES: dict[bytes, Callable[[bytes], Asked]] = {
    b"/write": decode_write,
    b"/cas": decode_cas,
    b"/delete": decode_delete,
    b"/incr": decode_incr,
}


class Plain(msgspec.Struct, frozen=True):
    """A chunk that is exactly one plain request, or one whose body is not all there."""

    method: bytes
    path: bytes
    query: bytes  # empty: it has none
    request_id: bytes  # empty: it brought none
    body: bytes
    missing_bytes: int  # of the body


@lru_cache(maxsize=1024)  # a client's headers are the same all day long
def _headers(lines: bytes) -> tuple[bytes, int | None] | None:
    """(request id, length of the body) as plain headers say; None: they are not plain."""
    match = _HEADERS.fullmatch(lines)
    if match is None:
        return None
    length, request_id = match.groups()
    names = _NAMES.findall(lines.lower())
    if b"host" not in names or len(set(names)) < len(names):
        return None
    return request_id or b"", None if length is None else int(length)


def plain_request(data: bytes) -> Plain | None:
    """None: it is something else, or not all of its head, or more."""
    first = _FIRST.match(data)
    if first is None:
        return None
    end = data.find(b"\r\n\r\n", first.end() - 2, MAX_HEAD_BYTES) + 4
    found = _headers(data[first.end() : end]) if end > 4 else None
    if found is None:
        return None
    method, path, query = first.groups()
    request_id, length = found
    if length is None and method == b"POST":
        return None
    missing_bytes = end + (length or 0) - len(data)
    if missing_bytes < 0:
        return None
    return Plain(method, path, query or b"", request_id, data[end:], missing_bytes)


class Client(Protocol):
    """The connection that an answer goes to."""

    def answered(self, response: bytes) -> None: ...


class Express:
    """The short way of one node."""

    def __init__(self, service: Service, metrics: Metrics, max_body_bytes: int) -> None:
        self._service = service
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._date = ""
        self._date_s = 0

    def begin(self, request: Plain, client: Client) -> bool:
        """Take `request`, and answer it now or later, once, whether or not the client waits for it.
        False: it is not for this way, and nothing happened."""
        if request.method == b"GET":
            return request.path == b"/read" and not request.body and self._read(request, client)
        decode = _CHANGES.get(request.path)
        if decode is None or request.query or len(request.body) > self._max_body_bytes:
            return False
        try:
            key, operation = decode(request.body)
        except ApiError:
            return False  # aiohttp's way meets the same error, and words the answer
        self._service.begin(key, operation, _Waiting(self, request, client, key, operation))
        return True

    def _read(self, request: Plain, client: Client) -> bool:
        query = request.query
        if not query.startswith(_QUERY):
            return False
        key = query[len(_QUERY) :].decode()
        if "=" in key:
            return False
        if "%" in key:
            key = unquote(key)
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return False
        found = self._service.lookup(key)
        if found is not None:
            self.answer(request, client, key, None, found)
        else:
            self._service.begin(key, None, _Waiting(self, request, client, key, None))
        return True

    def answer(
        self, request: Plain, client: Client, key: str, operation: Operation | None, answer: Answer
    ) -> None:
        """Write what `answer` means to a client."""
        status, more = 200, ""
        try:
            body = _encode(answer_of(key, operation, answer))
        except ApiError as e:
            status, body = e.status, _encode({"error": e.error, **e.details})
            more = "".join(f"{name}: {value}\r\n" for name, value in (e.headers or {}).items())
            self._metrics.errors += 1
        self._metrics.requests += 1
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s, self._date = now_s, formatdate(now_s, usegmt=True)
        request_id = request.request_id.decode() or next_request_id()
        head = (
            f"HTTP/1.1 {_STATUS[status]}\r\n{more}Content-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nServer: mesi-cache\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"Content-Length: {len(body)}\r\nDate: {self._date}\r\n\r\n"
        )
        client.answered(head.encode("latin-1") + body)

    def finished(self, operation: Operation | None, began_ms: float) -> None:
        """Take note of how long a miss or a change took."""
        kind = self._metrics.miss_ms if operation is None else self._metrics.write_ms
        kind.observe(now_ms() - began_ms)


class _Waiting:
    """Hears the answer to one call and writes it in the same turn of the loop: a future would tell
    it in the next one, behind whatever came in meanwhile."""

    __slots__ = ("_began_ms", "_client", "_express", "_key", "_operation", "_over", "_request")

    def __init__(
        self, express: Express, request: Plain, client: Client, key: str,
        operation: Operation | None,
    ) -> None:  # fmt: skip
        self._express = express
        self._request = request
        self._client = client
        self._key = key
        self._operation = operation
        self._began_ms = now_ms()
        self._over = False

    def done(self) -> bool:
        return self._over

    def set_result(self, answer: Answer, /) -> None:
        self._over = True
        self._express.finished(self._operation, self._began_ms)
        self._express.answer(self._request, self._client, self._key, self._operation, answer)
