"""`--store` and `--write_policy` on real nodes, with a real Redis where there is one."""

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
from typing import Any

import pytest
from aiohttp import web

from testkit.cluster import Cluster, HttpClient, Reply

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import MAIN, argv, linked, until

pytestmark = pytest.mark.cluster


async def answer(reply: Any, status: int = 200) -> Any:
    got = await reply
    assert isinstance(got, Reply), got
    assert got.status == status, (got.status, got.text)
    return got.json


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


@pytest.fixture
async def origin() -> AsyncIterator[HttpOriginServer]:
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


@asynccontextmanager
async def pair(root: Path, *flags: str) -> AsyncIterator[tuple[Cluster, HttpClient, HttpClient]]:
    async with Cluster(argv(*flags), 2, root=root) as cluster:
        await linked(cluster)
        async with cluster.client(0) as a, cluster.client(1) as b:
            yield cluster, a, b


async def test_an_http_origin_is_read_through_and_written_back(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    origin.values = {"city": b'{"name": "Balikpapan"}', "text": b"plain text", "a/b ?": b"[1]"}
    async with pair(tmp_path, f"--store={origin.url}") as (cluster, a, b):
        read = await answer(a.get("/read?key=city"))
        assert (read["value"], read["version"], read["source"]) == (
            {"name": "Balikpapan"}, 1, "memory",
        )  # fmt: skip
        assert (await answer(b.get("/read?key=city")))["value"] == {"name": "Balikpapan"}
        assert origin.gets == 1
        assert (await answer(a.get("/read?key=text")))["value"] == "plain text"
        assert (await answer(a.get("/read", key="a/b ?")))["value"] == [1]
        await answer(a.get("/read?key=absent"), 404)
        written = await answer(b.post("/write", {"key": "city", "value": "Samarinda"}))
        assert written["version"] == 2
        await answer(a.post("/write", {"key": "a/b ?", "value": [2]}))
        await answer(a.post("/delete", {"key": "text"}))
        expected = {"city": b'"Samarinda"', "a/b ?": b"[2]"}
        await until(lambda: _same(origin, expected), "it is written back")
        cluster.power_cut()
        await cluster.start_all()
        again = await answer(b.get("/read?key=city"))
        assert (again["value"], again["version"]) == ("Samarinda", 2)


def log_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("log-*.bin"))


async def _same(origin: HttpOriginServer, expected: dict[str, bytes]) -> bool:
    return origin.values == expected


async def test_while_the_store_is_away_reads_are_503_and_what_is_written_waits(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    origin.values = {"old": b"1", "unread": b"1"}
    async with pair(tmp_path, f"--store={origin.url}") as (cluster, a, b):
        await answer(a.get("/read?key=old"))
        origin.trouble = 500
        assert (await answer(a.get("/read?key=old")))["hit"] is True  # it is still coherent
        written = await answer(a.post("/write", {"key": "old", "value": 2}))
        assert written["version"] == 2
        unread = await answer(b.get("/read?key=unread", timeout_s=10), 503)
        assert unread["definite"] is True
        cluster.power_cut()
        await cluster.start_all()

        async def newest() -> bool:
            reply = await b.get("/read?key=old", timeout_s=10)
            assert isinstance(reply, Reply)
            assert reply.status == 503 or reply.json["value"] == 2
            return reply.status == 200

        await until(newest, "the log still has it")
        origin.trouble = 0
        await until(lambda: _same(origin, {"old": b"2", "unread": b"1"}), "it is stored after all")
        assert (await answer(b.get("/read?key=unread")))["value"] == 1


async def test_what_a_read_only_origin_refuses_is_kept_in_the_data_directory(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    origin.values, origin.read_only = {"k": b"1", "gone": b"1"}, True
    async with pair(tmp_path, f"--store={origin.url}") as (cluster, a, b):
        await answer(a.post("/write", {"key": "k", "value": 2}))
        await answer(a.post("/delete", {"key": "gone"}))
        assert await cluster.terminate_all() == [0, 0]
        await cluster.start_all()
        assert (await answer(b.get("/read?key=k")))["value"] == 2
        await answer(b.get("/read?key=gone"), 404)
    assert origin.values == {"k": b"1", "gone": b"1"}


async def test_write_through_has_stored_what_it_has_answered(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    flags = (f"--store={origin.url}", "--write_policy=through")
    async with pair(tmp_path, *flags) as (_, a, b):
        for number in range(5):
            await answer((a, b)[number % 2].post("/write", {"key": "k", "value": number}))
            assert origin.values["k"] == b"%d" % number
        origin.trouble = 503
        loop = asyncio.get_running_loop()
        began = loop.time()
        failed = await answer(a.post("/write", {"key": "k", "value": 9}, timeout_s=10), 503)
        assert loop.time() - began < 5
        assert failed["definite"] is False
        origin.trouble = 0

        async def works_again() -> bool:
            reply = await a.post("/write", {"key": "k", "value": 10}, timeout_s=10)
            return isinstance(reply, Reply) and reply.status == 200

        await until(works_again, "the store is back")
        assert origin.values["k"] == b"10"


async def test_back_unsafe_keeps_what_it_has_stored_and_all_of_it_after_an_orderly_stop(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, "--write_policy=back_unsafe") as (cluster, a, b):
        for number in range(20):
            await answer(a.post("/write", {"key": f"k{number}", "value": number}))
        assert await cluster.terminate_all() == [0, 0]
        assert log_bytes(tmp_path) == 0
        await cluster.start_all()
        for number in range(20):
            assert (await answer(b.get(f"/read?key=k{number}")))["value"] == number


# --- Redis --------------------------------------------------------------------------------------

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

        await until(answers, "redis is up")
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


@needs_redis
async def test_a_redis_is_read_through_and_written_back(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as port:
        await redis_command(port, "SET", "app:city", '{"name": "Balikpapan"}')
        store = f"--store=redis://127.0.0.1:{port}/0?prefix=app:"
        async with pair(tmp_path / "nodes", store) as (cluster, a, b):
            read = await answer(a.get("/read?key=city"))
            assert (read["value"], read["version"]) == ({"name": "Balikpapan"}, 1)
            await answer(b.post("/write", {"key": "city", "value": "Samarinda"}))
            await answer(b.post("/incr", {"key": "n", "by": 41}))
            await answer(a.post("/incr", {"key": "n", "by": 1}))

            async def stored() -> bool:
                return (
                    await redis_command(port, "GET", "app:city") == b'$11\r\n"Samarinda"\r\n'
                    and await redis_command(port, "GET", "app:n") == b"$2\r\n42\r\n"
                )

            await until(stored, "it is written back")
            await answer(a.post("/delete", {"key": "city"}))
            assert await cluster.terminate_all() == [0, 0]
            assert await redis_command(port, "EXISTS", "app:city") == b":0\r\n"
            await cluster.start_all()
            await answer(b.get("/read?key=city"), 404)
            assert (await answer(b.post("/write", {"key": "city", "value": 1})))["version"] == 4
            assert (await answer(a.get("/read?key=n")))["value"] == 42


@needs_redis
async def test_a_redis_that_dies_makes_no_value_old_and_loses_nothing(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as port:
        store = f"--store=redis://127.0.0.1:{port}"
        async with pair(tmp_path / "nodes", store) as (_, a, b):
            await answer(a.post("/write", {"key": "k", "value": 1}))
            await redis_command(port, "SHUTDOWN", "NOSAVE")
            await answer(a.post("/write", {"key": "k", "value": 2}))
            assert (await answer(b.get("/read?key=k")))["value"] == 2
            await answer(b.get("/read?key=other", timeout_s=10), 503)
            trouble = [(await answer(each.get("/status")))["store_trouble"] for each in (a, b)]
            assert any("redis" in str(each) for each in trouble)


def test_redis_without_its_library_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'redis' else find(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, str(MAIN), "--addr=127.0.0.1:1", "--id=a", "--store=redis://127.0.0.1",
         f"--data_dir={tmp_path / 'data'}"],
        capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "main.py: error: --store: redis needs redis-py: pip install redis"
    assert not (tmp_path / "data").exists()
