"""The short way: produce, consume, ack, nack and extend without aiohttp's router, middleware,
request, response and task, which cost more than what is done with them.

```
bytes ─▶ aiohttp's parser ─▶ plain? ── no ─▶ aiohttp's way: routes.py
                               │ yes
                               ▼
                      a Turn: service.begin(operation, done) … done ─▶ the same bytes as there
```

HTTP is parsed by aiohttp alone, in C: nothing here has an opinion of where a request ends. A
request is *plain* when method, path, query and each of its headers are known to mean nothing
unusual; all others go aiohttp's way, untouched. One that was taken is answered here, errors
included, with the functions that the handlers use as well (`requests.py`); an unexpected exception
is a logged 500.

Only a consume that finds nothing ready, or whose queue is another node's, has a task: it may wait.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import msgspec
from aiohttp import HttpVersion11
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD

from message_queue.api.answers import Answers
from message_queue.api.errors import REQUEST_ID_PATTERN, ApiError, new_request_id
from message_queue.api.keys import Delivered, Service
from message_queue.api.requests import (
    ack_of,
    acked,
    consume_of,
    error_of,
    extend_of,
    nack_of,
    produce_of,
)
from message_queue.api.schemas import AckBody, ConsumeQuery, NextBody
from message_queue.core.acks import shares, statuses_of
from message_queue.core.operations import Answer, Consume
from message_queue.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 256 * 1024
"""Longer ones go aiohttp's way. Below the mark at which its streams stop the connection until
somebody reads: here nobody reads before all is there."""
MAX_QUERIES: Final = 1024
MAX_PATH: Final = 512
"""Queries that are remembered, and how long they may be: a consumer asks the same all day long."""
_CONSUME = "/consume?"
_POSTS = frozenset(("/produce", "/ack", "/nack", "/extend"))
_HARMLESS = frozenset(
    b"host user-agent accept-encoding accept-language content-type cache-control pragma via "
    b"traceparent tracestate forwarded".split()
)
_REQUEST_ID = re.compile(REQUEST_ID_PATTERN.encode())
_UNSEEN: Final = Consume("")
_UNANSWERED: Final = Answer(0)


class Plain(msgspec.Struct, frozen=True, gc=False):
    """A request for the short way."""

    path: str
    request_id: bytes
    """Empty: it brought none."""
    consume: Consume | None = None


class Client(Protocol):
    """The connection that a request came by."""

    @property
    def is_gone(self) -> bool:
        """It is closed, or about to be: nothing written reaches anybody."""

    def answered(self, response: bytes) -> None:
        """The turn is over: write this. Called once, unless the client hung up."""

    def broken(self) -> None:
        """An answer could not be written as a whole: close."""


def plain_headers(raw: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, int] | None:
    """(request id, length of the body); None: something in them could change the answer, or what is
    to be done before it."""
    request_id, length = b"", 0
    for given, value in raw:
        name = given.lower()
        if name in _HARMLESS:
            continue
        if name == b"content-length":
            if not value.isdigit():
                return None
            length = int(value)
        elif name == b"accept":
            if b"application/problem+json" in value:
                return None
        elif name == b"connection":
            if value.lower() != b"keep-alive":
                return None
        elif name == b"x-request-id":
            if request_id or not _REQUEST_ID.fullmatch(value):
                return None
            request_id = value
        elif not name.startswith(b"x-"):  # others mean something to proxies and tracers only
            return None
    return request_id, length


class Express:
    """The short way of one node."""

    def __init__(self, service: Service, metrics: Metrics, max_body_bytes: int) -> None:
        self.service = service
        self.metrics = metrics
        self.answers = Answers()
        self.loop = asyncio.get_running_loop()
        self._max_body_bytes = min(max_body_bytes, MAX_BODY_BYTES)
        self._queries: dict[str, Consume | None] = {}

    def plain(self, message: object, payload: object) -> Plain | None:
        """Whether this request is one for the short way. Nothing is done yet."""
        if (
            not isinstance(message, RawRequestMessage)
            or message.version != HttpVersion11
            or message.should_close
            or message.upgrade
            or message.chunked
            or message.compression is not None
        ):
            return None
        path: str = message.path
        consume = None
        if message.method == "POST":
            if path not in _POSTS or payload is EMPTY_PAYLOAD:
                return None
        elif message.method == "GET":
            if payload is not EMPTY_PAYLOAD or not path.startswith(_CONSUME):
                return None
            consume = self._query(path, message.url)
            if consume is None:
                return None
        else:
            return None
        found = plain_headers(message.raw_headers)
        if found is None or found[1] > self._max_body_bytes:
            return None
        return Plain(path, found[0], consume)

    def _query(self, path: str, url: Any) -> Consume | None:
        """What a GET /consume asks for, read as its handler reads it; None: a mistake is in it, or
        something for aiohttp's way."""
        found = self._queries.get(path, _UNSEEN)
        if found is not _UNSEEN:
            return found
        if len(path) > MAX_PATH:
            return None
        if len(self._queries) >= MAX_QUERIES:
            self._queries.clear()
        found = self._queries[path] = _consume_in(url.query)
        return found

    def turn(self, request: Plain, client: Client) -> Turn:
        """A request has come; `begin` it when its body is there."""
        self.metrics.requests += 1
        return Turn(self, request, client)


def _consume_in(query: Mapping[str, str]) -> Consume | None:
    fields = dict(query)
    if len(fields) != len(query):  # a key given twice
        return None
    try:
        asked = msgspec.convert(fields, ConsumeQuery, strict=False)
        return consume_of(asked) if asked.forward else None
    except (msgspec.ValidationError, ApiError, UnicodeError):
        return None


class Turn:
    """One request on the short way. Its connection begins no other before this one is answered."""

    __slots__ = ("_client", "_express", "_id", "_over", "_request", "_task")

    def __init__(self, express: Express, request: Plain, client: Client) -> None:
        self._express = express
        self._request = request
        self._client = client
        self._id = request.request_id or new_request_id().encode()
        self._task: asyncio.Task[None] | None = None
        self._over = False

    def begin(self, body: bytes) -> None:
        """All of it is here. It is answered now or later, once; never raises."""
        service, request = self._express.service, self._request
        try:
            if request.consume is not None:
                self.fetch(request.consume)
            elif request.path == "/produce":
                service.begin(produce_of(body), self.answer)
            elif request.path == "/ack":
                _Acking(self, self._express, *ack_of(body)).begin()
            elif request.path == "/nack":
                service.begin(nack_of(body), self.answer)
            else:
                service.begin(extend_of(body), self.answer)
        except ApiError as error:
            self.refuse(error)
        except Exception:
            log.exception("unexpected error in %s", self)
            self.fail()

    def hung_up(self) -> None:
        """The client is gone: what it waits for, or was about to be given, goes back."""
        self._over = True
        if self._task is not None:
            self._task.cancel()

    # ── consume ─────────────────────────────────────────────────────────────────────────────────

    def fetch(self, operation: Consume) -> None:
        """Lease and deliver, in this very turn of the loop if something is ready here."""
        delivered = self._express.service.consume_now(operation)
        if delivered is not None:
            self._deliver(delivered)
        else:
            self._task = self._express.loop.create_task(self._wait(operation))

    def fetch_next(self, query: NextBody) -> None:
        """What an ack brings beside its own."""
        if self._over:
            return
        try:
            self.fetch(consume_of(query))
        except ApiError as error:
            self.refuse(error)
        except Exception:
            log.exception("unexpected error in %s", self)
            self.fail()

    async def _wait(self, operation: Consume) -> None:
        try:
            self._deliver(await self._express.service.consume(operation))
        except Exception:
            log.exception("unexpected error in %s", self)
            self.fail()

    def _deliver(self, delivered: Delivered) -> None:
        if self._over or self._client.is_gone:
            self._over = True
            delivered.undo()
        else:
            self.answer(delivered.answer)

    # ── the answer ──────────────────────────────────────────────────────────────────────────────

    def answer(self, reply: Answer) -> None:
        """Write what the owner answered, unless nobody waits for it any more. Never raises: it is
        called in the middle of the owner's work."""
        if self._over:
            return
        try:
            if reply.status >= 400:
                self.refuse(error_of(reply))
            else:
                self._write(self._express.answers.whole(reply.status, self._id, reply.body))
        except Exception:
            log.exception("unexpected error in %s", self)
            self.fail()

    def refuse(self, error: ApiError) -> None:
        """Write an error."""
        self._express.metrics.errors += 1
        self._write(self._express.answers.refusal(error, self._id))

    def fail(self) -> None:
        """Something happened that nobody expected (and that was logged): 500, as everywhere."""
        if self._over:  # a half-sent answer cannot be mended, only cut off
            self._client.broken()
        else:
            self.refuse(ApiError(500, "Internal error", definite=False))

    def _write(self, response: bytes) -> None:
        self._over = True
        self._client.answered(response)

    def __str__(self) -> str:
        method = "POST" if self._request.consume is None else "GET"
        path = self._request.path.partition("?")[0]
        return f"{method} {path} (request {self._id.decode()})"


class _Acking:
    """An ack on its way: its ids may belong to several partitions. What `Service.ack` does, with
    callbacks."""

    __slots__ = ("_answers", "_asked", "_express", "_ids", "_open", "_shares", "_turn")

    def __init__(self, turn: Turn, express: Express, asked: AckBody, ids: Sequence[str]) -> None:
        self._turn = turn
        self._express = express
        self._asked = asked
        self._ids = ids
        self._shares = shares(ids, asked.receipt)
        self._answers = [_UNANSWERED] * len(self._shares)
        self._open = len(self._shares)

    def begin(self) -> None:
        """Ask the owners. Raises what the service raises."""
        if not self._shares:
            self._settled()
            return
        begin = self._express.service.begin
        for number, share in enumerate(self._shares):
            begin(share.settle, partial(self._answered, number))

    def _answered(self, number: int, reply: Answer) -> None:
        self._answers[number] = reply
        self._open -= 1
        if not self._open:
            try:
                self._settled()
            except Exception:
                log.exception("unexpected error in %s", self._turn)
                self._turn.fail()

    def _settled(self) -> None:
        """All have answered."""
        statuses = statuses_of(len(self._ids), zip(self._shares, self._answers, strict=True))
        if isinstance(statuses, Answer):
            self._turn.answer(statuses)
            return
        done = statuses.count(200)
        self._express.metrics.acked += done
        if self._asked.next is not None and done == len(statuses):
            # Not now: the owner is in the middle of telling its answers.
            self._express.loop.call_soon(self._turn.fetch_next, self._asked.next)
        else:
            self._turn.answer(acked(self._asked, self._ids, statuses))
