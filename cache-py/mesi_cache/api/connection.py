"""A client's connection: aiohttp's, with a short way for plain requests and our own error page.

A client that speaks broken HTTP sees JSON as everywhere, no banner, no traceback. Requests on one
connection are answered in order, whichever way each of them takes (see express.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from mesi_cache.api.express import Express, plain_request

log = logging.getLogger(__name__)


# What a client may send ahead while its request on the short way is not answered, and the longest
# request that is put together from pieces here.
MAX_HELD_BYTES = 64 << 10


class Connection(web.RequestHandler):
    """One connection. With `express` None, every request goes aiohttp's way."""

    __slots__ = ("_at_boundary", "_begun", "_express", "_held", "_under_way")

    def __init__(
        self, manager: web.Server, loop: asyncio.AbstractEventLoop, express: Express | None
    ) -> None:
        no_log: Any = None  # aiohttp's own callers pass None, its annotation forgot that
        super().__init__(manager, loop=loop, access_log=no_log)
        self._express = express
        # The next chunk begins a request, as far as is known: aiohttp's parser holds no piece of
        # one. Once that is not certain any more, all that follows is aiohttp's.
        self._at_boundary = express is not None
        self._begun = b""  # of a plain request: all that came, but its body goes on
        self._under_way = False  # a request on the short way is not answered
        self._held = b""  # what came while it was

    def data_received(self, data: bytes) -> None:
        if self._under_way:
            self._hold(data)
            return
        if self._at_boundary and data and self._express is not None:
            begun, self._begun = self._begun, b""
            whole = begun + data
            request = plain_request(whole)
            if request is not None and request.missing_bytes:
                if self._is_idle and len(whole) + request.missing_bytes <= MAX_HELD_BYTES:
                    self._begun = whole
                    return
                request = None
            self._at_boundary = request is not None
            if request is not None and self._is_idle:
                self._under_way = True
                if self._express.begin(request, self):
                    return
                self._under_way = False
            if begun:  # as it came: what follows a request can spoil it if they come together
                super().data_received(begun)
        super().data_received(data)

    @property
    def _is_idle(self) -> bool:
        """Whether aiohttp has answered all that it was given, and the client takes its answers."""
        waiting = self._waiter is not None and not self._waiter.done()
        return waiting and not (self._messages or self._close or self._force_close or self._paused)

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > MAX_HELD_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def answered(self, response: bytes) -> None:
        """The request on the short way is answered; called once."""
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(response)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._held:  # not now: the node is in the middle of telling its answers
            self._loop.call_soon(self._go_on)
        else:
            self._under_way = False

    def _go_on(self) -> None:
        self._under_way = False
        held, self._held = self._held, b""
        if self._buffer_paused:
            self._resume_reading_for_buffer()
        self.data_received(held)

    def _process_keepalive(self) -> None:
        if self._under_way or self._begun:  # not idle: it waits for its answer, or we for its end
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

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
            headers={"Server": "mesi-cache", "X-Content-Type-Options": "nosniff"},
        )
        response.force_close()
        return response


def factory(runner: web.AppRunner, express: Express | None) -> Callable[[], Connection]:
    """The protocol factory for `loop.create_server`, after `runner.setup()`."""
    manager, loop = runner.server, asyncio.get_running_loop()
    if manager is None:
        raise RuntimeError("runner.setup() comes first")
    return lambda: Connection(manager, loop, express)
