"""aiohttp's connection, with two differences: a client that speaks broken HTTP sees JSON as
everywhere, no banner, no traceback; and plain reads are answered at once (express.py).

The second rests on names that aiohttp does not call public, like reply.py does: tests hold every
version to it (tests/unit/test_express.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD

from secure_store.api.express import NOTHING, Get, Remembered, plain_token

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_addr", "_express", "_remembered")

    def __init__(self, *args: Any, express: Get, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._express = express
        self._addr: str | None = None
        self._remembered: Remembered = NOTHING

    def data_received(self, data: bytes) -> None:
        """Parse; answer a plain read that is alone and finds the connection idle; wake aiohttp for
        everything else."""
        waiter = self._waiter
        if waiter is None or self._messages or self._paused:
            super().data_received(data)
            return
        self._waiter = None  # so that nobody is woken before it is known what came
        try:
            super().data_received(data)
        finally:
            self._waiter = waiter
        messages = self._messages
        if not messages or (len(messages) == 1 and self._answer(*messages[0])):
            return
        if not waiter.done():
            waiter.set_result(None)

    def _answer(self, message: Any, payload: object) -> bool:
        """Whether this request has been answered: True is the end of it."""
        if (
            payload is not EMPTY_PAYLOAD
            or not isinstance(message, RawRequestMessage)
            or message.method != "GET"
            or message.version != HttpVersion11
            or message.should_close
            or message.upgrade
        ):
            return False
        token = self._token(message)
        transport, parser, manager = self.transport, self._parser, self._manager
        if token is None or transport is None or parser is None or manager is None:
            return False
        answer = self._express(message.path, token, self._peer())
        if answer is None:
            return False
        self._messages.clear()
        parser.message_consumed()
        manager.requests_count += 1
        transport.write(answer)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        return True

    def _token(self, message: RawRequestMessage) -> str | None:
        """Whoever keeps a connection sends the same headers again: they are looked at once.
        (Whether the token still counts is asked each time.)"""
        raw, token = self._remembered
        if raw != message.raw_headers or not raw:
            token = plain_token(message.headers)
            self._remembered = message.raw_headers, token
        return token

    def _peer(self) -> str:
        if self._addr is None:
            peer = self.peername
            self._addr = str(peer[0]) if isinstance(peer, list | tuple) else str(peer or "")
        return self._addr

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that could not be parsed, or that failed below the middleware."""
        if request.writer.output_size > 0:  # a half-sent answer cannot be mended, only cut off
            raise ConnectionError("an error after the answer had begun") from exc
        if status >= 500:
            log.error("error in a connection from %s", request.remote, exc_info=exc)
        else:
            log.debug("malformed request from %s: %s", request.remote, exc)
        error = "Internal error" if status >= 500 else "Malformed HTTP request"
        response = web.Response(
            body=msgspec.json.encode({"error": error}),
            status=status,
            content_type="application/json",
            headers={"Server": "secure-store", "X-Content-Type-Options": "nosniff"},
        )
        response.force_close()
        return response


def factory(runner: web.AppRunner, express: Get) -> Callable[[], Connection]:
    """The protocol factory for `loop.create_server`, after `runner.setup()`."""
    manager, loop = runner.server, asyncio.get_running_loop()
    if manager is None:
        raise RuntimeError("runner.setup() comes first")
    no_log: Any = None  # aiohttp's own callers pass None, its annotation forgot that
    return lambda: Connection(manager, loop=loop, access_log=no_log, express=express)
