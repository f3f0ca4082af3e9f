"""What a client sees that speaks broken HTTP: JSON as everywhere, no banner, no traceback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp's connection, with its own error page replaced."""

    __slots__ = ()

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


def factory(runner: web.AppRunner) -> Callable[[], Connection]:
    """The protocol factory for `loop.create_server`, after `runner.setup()`."""
    manager, loop = runner.server, asyncio.get_running_loop()
    if manager is None:
        raise RuntimeError("runner.setup() comes first")
    no_log: Any = None  # aiohttp's own callers pass None, its annotation forgot that
    return lambda: Connection(manager, loop=loop, access_log=no_log)
