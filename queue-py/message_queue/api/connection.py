"""A client's connection: aiohttp's, with two differences. Plain requests take the short way
(express.py), and a client that speaks broken HTTP sees JSON as everywhere, no banner, no traceback.

aiohttp's parser puts what came into a queue and wakes its task. Here it is asked first what came:
a plain request that is next is taken out of the queue, and that task is woken for others only. So
requests are answered in their order, one after the other, whichever way each of them takes, and
what a client may send ahead is bounded by aiohttp (32 requests). All of that rests on names that
aiohttp does not call public: its version is pinned, and tests/unit/test_express_queue.py holds
both ways to the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from message_queue.api.express import Express, Turn

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One connection. With `express` None, every request goes aiohttp's way."""

    __slots__ = ("_answered", "_body", "_express", "_turn")

    def __init__(
        self, manager: web.Server, loop: asyncio.AbstractEventLoop, express: Express | None
    ) -> None:
        no_log: Any = None  # aiohttp's own callers pass None, its annotation forgot that
        super().__init__(manager, loop=loop, access_log=no_log)
        self._express = express
        self._turn: Turn | None = None
        """The request that is under way on the short way,"""
        self._body: StreamReader | None = None
        """and its body, while that is not all there."""
        self._answered: asyncio.Future[None] | None = None
        """Somebody waits for its end."""

    # ── in ──────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():  # aiohttp's task is at work: it takes what comes
            super().data_received(data)
            return
        self._waiter = None  # so that it is not woken before it is known what came
        try:
            super().data_received(data)
        finally:
            self._waiter = waiter
        self._go_on()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Called for every body, paused or not; aiohttp would ask its parser and the transport."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _go_on(self) -> None:
        """Begin what is next, unless something is under way: its answer comes first."""
        waiter, express = self._waiter, self._express
        if waiter is None or waiter.done() or self._close or self._force_close:
            return
        if self._body is not None and self._turn is not None and self._body.is_eof():
            body, self._body = self._body, None
            self._turn.begin(body.read_nowait())
        while self._turn is None and self._messages and not self._paused:
            message, payload = self._messages[0]
            request = express.plain(message, payload) if express is not None else None
            if request is None or express is None:
                waiter.set_result(None)
                return
            turn = self._turn = express.turn(request, self)
            self._taken()
            if payload is EMPTY_PAYLOAD:
                turn.begin(b"")
            elif payload.is_eof():
                turn.begin(payload.read_nowait())
            else:
                self._body = payload

    def _taken(self) -> None:
        """The first of the queue is taken out of it, as aiohttp's task would do it."""
        self._messages.popleft()
        if self._manager is not None:
            self._manager.requests_count += 1
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()

    # ── out ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_gone(self) -> bool:
        """See `express.Client`."""
        return self.transport is None or self.transport.is_closing()

    def answered(self, response: bytes) -> None:
        """See `express.Client`."""
        self._over()
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        transport.write(response)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._close or self._force_close:
            transport.close()
        elif self._messages:  # not now: the node may be in the middle of telling its answers
            self._loop.call_soon(self._go_on)

    def broken(self) -> None:
        """See `express.Client`."""
        self._over()
        self.force_close()

    def _over(self) -> None:
        self._turn = None
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def resume_writing(self) -> None:
        """The client takes its answers again: its next request may be looked at."""
        super().resume_writing()
        if self._messages:
            self._loop.call_soon(self._go_on)

    # ── its end ─────────────────────────────────────────────────────────────────────────────────

    def connection_lost(self, exc: BaseException | None) -> None:
        self._hang_up()
        super().connection_lost(exc)

    def _hang_up(self) -> None:
        turn = self._turn
        self._body = None
        self._over()
        if turn is not None:
            turn.hung_up()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """The node stops: what is under way is answered first, within `timeout`."""
        if self._turn is not None and self._body is None:
            self._answered = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._answered
        self._hang_up()
        await super().shutdown(timeout)

    def _process_keepalive(self) -> None:
        if self._turn is not None:  # not idle: it waits for its answer, or we for its end
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
            headers={"Server": "message-queue", "X-Content-Type-Options": "nosniff"},
        )
        response.force_close()
        return response


def factory(runner: web.AppRunner, express: Express | None) -> Callable[[], Connection]:
    """The protocol factory for `loop.create_server`, after `runner.setup()`."""
    manager, loop = runner.server, asyncio.get_running_loop()
    if manager is None:
        raise RuntimeError("runner.setup() comes first")
    return lambda: Connection(manager, loop, express)
