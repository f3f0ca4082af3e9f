"""The examples in README.md run as they stand there (on free ports, in a scratch directory)."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))

from embedded_nodes import free_ports, until

README = Path(__file__).resolve().parents[2] / "README.md"


def example(name: str, ports: list[int]) -> ModuleType:
    """The example as a module; its ports 9000 and 9001 become `ports`."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    source = found[1].replace(":9000", f":{ports[0]}").replace(":9001", f":{ports[1]}")
    module = ModuleType(f"example_{name}")
    exec(compile(source, f"README.md {name}", "exec"), module.__dict__)  # noqa: S102 - our own text
    return module


async def linked(cache: Any) -> None:
    await until(lambda: len(cache.status()["peers_connected"]) == 1, "the nodes are linked")


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # asyncio's own
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def test_the_aiohttp_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ports = free_ports(2)
    one, two = example("aiohttp", ports), example("aiohttp", ports[::-1])
    two.names = one.names  # both have the same database
    async with serving(one.app) as first, serving(two.app) as second:
        await linked(one.cache)
        await linked(two.cache)
        async with aiohttp.ClientSession() as http:

            async def show(url: str) -> Any:
                async with http.get(url + "/profile/7") as answer:
                    return await answer.json()

            for url in (first, second):
                assert await show(url) == {"user": 7, "name": "Siti"}
            async with http.post(second + "/rename/7", data="Budi") as answer:
                assert await answer.json() == {"renamed": 7, "times": 1}
            for url in (first, second):
                assert await show(url) == {"user": 7, "name": "Budi"}


@pytest.mark.skipif(find_spec("fastapi") is None, reason="fastapi is not installed")
async def test_the_fastapi_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ports = free_ports(2)
    workers = [example("fastapi", ports) for _ in range(2)]

    async def visit(app: Any) -> Any:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "path": "/visit/home", "raw_path": b"/visit/home", "query_string": b"", "headers": [],
            "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        async with asyncio.timeout(20):
            await app(scope, receive, send)
        assert sent[0]["status"] == 200
        return json.loads(b"".join(message.get("body", b"") for message in sent[1:]))

    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.app.router.lifespan_context(worker.app))
        assert {worker.cache.url for worker in workers} == {
            f"http://127.0.0.1:{port}" for port in ports
        }
        for worker in workers:
            await linked(worker.cache)
        for number in range(1, 5):
            answered = await visit(workers[number % 2].app)
            assert answered == {"visits": number, "last": {"number": number}}
