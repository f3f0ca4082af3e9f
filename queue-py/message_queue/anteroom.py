"""What a node answers before it can serve: that it is alive, and why everything else must wait.

It may ask to be admitted for hours, and read a long log for seconds; whoever watches it should not
take it for dead meanwhile, and a client should not hang.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def answering(
    listening: socket.socket, server_ssl: ssl.SSLContext | None, reason: str
) -> AsyncIterator[None]:
    """On a copy of the listening socket, for as long as the body runs: 200 for /healthz, 503 with
    `reason` for the rest. Who connects after that waits in the socket's backlog for the service."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/healthz":
            return web.json_response({"status": "alive"})
        return web.json_response(
            {"error": "Not ready", "reason": reason}, status=503, headers={"Retry-After": "1"}
        )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, listening.dup(), ssl_context=server_ssl).start()
        yield
    finally:
        await runner.cleanup()
