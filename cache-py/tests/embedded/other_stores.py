"""Stores to talk to: a little HTTP origin in the test's process, and a real Redis."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))

from embedded_nodes import until_it


class HttpOriginServer:
    """A little origin: a dict behind GET, PUT, DELETE. `trouble`: the status it answers with."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.trouble = 0
        self.read_only = False
        self.gets = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        key = request.match_info["key"]
        if self.trouble:
            return web.Response(status=self.trouble)
        if request.method == "GET":
            self.gets += 1
            value = self.values.get(key)
            return web.Response(status=404) if value is None else web.Response(body=value)
        if self.read_only:
            return web.Response(status=405)
        if request.method == "PUT":
            self.values[key] = await request.read()
        else:
            self.values.pop(key, None)
        return web.Response(status=204)


@asynccontextmanager
async def http_origin() -> AsyncIterator[HttpOriginServer]:
    server = HttpOriginServer()
    app = web.Application()
    app.router.add_route("*", "/base/{key}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # asyncio's own
    server.url = f"http://127.0.0.1:{port}/base"
    yield server
    await runner.cleanup()


REDIS = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(
    REDIS is None or find_spec("redis") is None, reason="no redis-server (apt) or redis-py (pip)"
)


@asynccontextmanager
async def redis_server(root: Path) -> AsyncIterator[int]:
    assert REDIS is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
        [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(root),
         "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:

        async def answers() -> bool:
            return await redis_command(port, "PING") == b"+PONG\r\n"

        await until_it(answers, "redis is up")
        yield port
    finally:
        process.kill()
        process.wait()


async def redis_command(port: int, *words: str) -> bytes:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    try:
        encoded = [word.encode() for word in words]
        writer.write(
            b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in encoded)
        )
        async with asyncio.timeout(5):
            return await reader.read(4096)
    finally:
        writer.close()
