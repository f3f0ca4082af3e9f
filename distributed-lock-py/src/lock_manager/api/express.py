"""A short way for the requests that are nearly all requests: acquire, release, keepalive, one lock.

aiohttp costs 60 to 100 us a request, most of it for what a lock's client never sends. So a chunk
that is exactly one plain request for one of those paths is decoded and answered here. Plain means
what `_PLAIN` says: a few harmless headers, each spelled simply, a Content-Length that ends with the
chunk. Everything else (other paths and headers, bodies in pieces, pipelined requests, input that is
refused) goes aiohttp's way, which alone knows HTTP. Both ways give the same answers.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol

import msgspec

from lock_manager.api.answers import body_of
from lock_manager.api.errors import ApiError, NotLeader, redirection, request_ids
from lock_manager.api.keys import Service
from lock_manager.api.schemas import (
    MAX_NAME_BYTES,
    AcquireBody,
    KeepaliveBody,
    ReleaseBody,
    acquire_command,
    decode_json,
    keepalive_command,
    release_command,
)
from lock_manager.core.locks.commands import Command
from lock_manager.core.locks.replies import Reply
from lock_manager.metrics import Metrics

# No Origin, Cookie, Authorization, Expect, Transfer-Encoding or Upgrade; no obs-fold, no spaces
# before a colon, no Accept that could ask for problem+json.
_PLAIN = re.compile(
    rb"(GET|POST) (/[A-Za-z0-9._~/-]*) HTTP/1\.1\r\n"
    rb"(?:(?i:host|user-agent|accept-encoding|accept-language|content-type):[\x20-\x7e]*+\r\n"
    rb"|(?i:accept): ?(?:\*/\*|application/json)\r\n"
    rb"|(?i:connection): ?(?i:keep-alive)\r\n"
    rb"|(?i:content-length): ?(?P<length>[0-9]{1,7})\r\n"
    rb"|(?i:x-request-id): ?(?P<id>[A-Za-z0-9._:-]{1,128})\r\n)*\r\n"
)
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_NAMES = re.compile(rb"\r\n([a-z-]+):")
MAX_HEAD_BYTES = 2048
_LOCK = b"/locks/"
_encode = msgspec.json.Encoder().encode
_acquire = msgspec.json.Decoder(AcquireBody)
_release = msgspec.json.Decoder(ReleaseBody)
_keepalive = msgspec.json.Decoder(KeepaliveBody)

_COMMANDS: dict[bytes, Callable[[bytes], Command]] = {
    b"/acquire": lambda body: acquire_command(decode_json(body, _acquire)),
    b"/release": lambda body: release_command(decode_json(body, _release)),
    b"/keepalive": lambda body: keepalive_command(decode_json(body, _keepalive)),
}


class Plain(msgspec.Struct, frozen=True):
    """A chunk that is exactly one plain request."""

    method: bytes
    path: bytes
    request_id: bytes  # empty: it brought none
    body: bytes


@lru_cache(maxsize=4096)  # a client's heads are the same all day long
def _head(head: bytes) -> tuple[bytes, bytes, bytes, int] | None:
    """(method, path, request id, length of the body) of a plain head; None: it is not plain."""
    match = _PLAIN.fullmatch(head)
    if match is None:
        return None
    method, path, length, request_id = match.groups()
    names = _NAMES.findall(head.lower())
    if b"host" not in names or len(set(names)) < len(names):
        return None
    if length is None and method == b"POST":
        return None
    return method, path, request_id or b"", int(length or 0)


def plain_request(data: bytes) -> Plain | None:
    """None: it is something else, or not all of it, or more."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
    found = _head(data[:end]) if end > 4 else None
    if found is None or len(data) != end + found[3]:
        return None
    return Plain(found[0], found[1], found[2], data[end:])


class Client(Protocol):
    """The connection that an answer goes to."""

    def answered(self, response: bytes) -> None: ...


class Express:
    """The short way of one node."""

    def __init__(self, service: Service, metrics: Metrics, max_body_bytes: int) -> None:
        self._service = service
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._ids = request_ids()
        self._date = ""
        self._date_s = 0

    def begin(self, request: Plain, client: Client) -> Callable[[], object] | None:
        """Start on `request`. Returns what to call if the client hangs up; else it is answered
        later, never before this returns. None: not a request for this way, and nothing happened."""
        try:
            if request.method == b"POST":
                return self._command(request, client)
            if request.path.startswith(_LOCK) and not request.body:
                return self._read(request, client)
        except (ApiError, NotLeader):
            return None  # aiohttp's way meets the same error, and words the answer
        return None

    def _command(self, request: Plain, client: Client) -> Callable[[], object] | None:
        make = _COMMANDS.get(request.path)
        if make is None or len(request.body) > self._max_body_bytes:
            return None
        answer = _Answer(self, request, client)
        pending = self._service.begin(make(request.body), answer)

        def hung_up() -> None:
            answer.over = True
            self._service.abandon(pending)

        return hung_up

    def _read(self, request: Plain, client: Client) -> Callable[[], object] | None:
        name = request.path[len(_LOCK) :].decode()
        if not name[:1].isalnum() or "/" in name or len(name) > MAX_NAME_BYTES:
            return None
        confirmed = self._service.confirmation()

        def view() -> object:
            confirmed.result()
            return self._service.lock(name)

        def answer(future: asyncio.Future[None]) -> None:
            if not future.cancelled():
                self.answer(request, client, view)

        confirmed.add_done_callback(answer)
        return confirmed.cancel

    def answer(self, request: Plain, client: Client, body_of_answer: Callable[[], object]) -> None:
        """Write what `body_of_answer` returns, or the error that it raises."""
        status, more = 200, ""
        try:
            body = _encode(body_of_answer())
        except (ApiError, NotLeader) as e:
            error = redirection(request.path.decode(), e) if isinstance(e, NotLeader) else e
            status, body = error.status, _encode({"error": error.error, **error.details})
            more = "".join(f"{name}: {value}\r\n" for name, value in (error.headers or {}).items())
            self._metrics.errors += 1
        self._metrics.requests += 1
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s, self._date = now_s, formatdate(now_s, usegmt=True)
        request_id = request.request_id.decode() or next(self._ids)
        head = (
            f"HTTP/1.1 {_STATUS[status]}\r\n{more}Content-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nServer: lock_manager\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"Content-Length: {len(body)}\r\nDate: {self._date}\r\n\r\n"
        )
        client.answered(head.encode("latin-1") + body)


class _Answer:
    """Listens for the reply to one command and writes it in the same turn of the loop: a future
    would tell it in the next one, behind whatever came in meanwhile."""

    __slots__ = ("_client", "_express", "_request", "over")

    def __init__(self, express: Express, request: Plain, client: Client) -> None:
        self._express = express
        self._request = request
        self._client = client
        self.over = False

    def done(self) -> bool:
        return self.over

    def set_result(self, reply: Reply, /) -> None:
        self.over = True
        self._express.answer(self._request, self._client, lambda: body_of(reply))

    def set_exception(self, error: Exception, /) -> None:
        def fail() -> object:
            raise error

        self.over = True
        self._express.answer(self._request, self._client, fail)
