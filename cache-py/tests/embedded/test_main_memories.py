"""`--store` and `--write_policy`, with a real Redis where there is one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from mesi_cache import CacheNode, CacheUnavailable
from mesi_cache.core.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))

from embedded_nodes import key_at, nodes, until, until_it
from other_stores import HttpOriginServer, http_origin, needs_redis, redis_command, redis_server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls give up after one second instead of four."""
    monkeypatch.setattr("mesi_cache.node.Settings", partial(Settings, call_ms=1_000))


@pytest.fixture
async def origin() -> AsyncIterator[HttpOriginServer]:
    async with http_origin() as server:
        yield server


async def again(*stopped: CacheNode) -> None:
    for node in stopped:
        await node.stop()
    for node in stopped:
        await node.start()


async def test_an_http_origin_is_read_through_and_written_back(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    origin.values = {"city": b'{"name": "Balikpapan"}', "text": b"plain text", "a/b ?": b"[1]"}
    async with nodes(2, tmp_path, store=origin.url, lease_ms=200) as (a, b):
        read = await a.entry("city")
        assert read is not None
        assert (read.value, read.version) == ({"name": "Balikpapan"}, 1)
        assert await b.get("city") == {"name": "Balikpapan"}
        assert origin.gets == 1
        assert await a.get("text") == "plain text"
        assert await a.get("a/b ?") == [1]
        assert await a.get("absent", "none") == "none"
        assert await b.set("city", "Samarinda") == 2
        await a.set("a/b ?", [2])
        await a.delete("text")
        expected = {"city": b'"Samarinda"', "a/b ?": b"[2]"}
        await until(lambda: origin.values == expected, "it is written back")
        await again(a, b)
        read = await b.entry("city")
        assert read is not None
        assert (read.value, read.version) == ("Samarinda", 2)


async def test_a_deadline_is_kept_beside_an_origin_that_knows_none(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    async with nodes(1, tmp_path, store=origin.url, lease_ms=200) as (a,):
        await a.set("k", 1, ttl=600)
        await until(lambda: "k" in origin.values, "it is written back")
        await again(a)
        left = await a.ttl("k")
        assert left is not None
        assert 500 < left <= 600


async def test_what_a_read_only_origin_refuses_is_kept_in_the_data_directory(
    tmp_path: Path, origin: HttpOriginServer
) -> None:
    origin.values, origin.read_only = {"k": b"1", "gone": b"1"}, True
    async with nodes(2, tmp_path, store=origin.url, lease_ms=200) as (a, b):
        await a.set("k", 2)
        await a.delete("gone")
        await again(a, b)
        assert await b.get("k") == 2
        assert await b.get("gone") is None
    assert origin.values == {"k": b"1", "gone": b"1"}


async def test_a_value_that_the_origin_cannot_give_fails_alone(
    tmp_path: Path, origin: HttpOriginServer, quick: None
) -> None:
    origin.values = {"good": b"1", "long": b"1" * 5000, "binary": b"\xff\xfe"}
    async with nodes(1, tmp_path, store=origin.url, max_body_bytes=2000) as (a,):
        failed = await asyncio.gather(a.get("long"), a.get("binary"), return_exceptions=True)
        assert all(isinstance(each, CacheUnavailable) for each in failed)
        assert await a.get("good") == 1
        assert await a.get("..") is None  # the folder above is not ours
        assert await a.set("..", 7) == 1
        assert await a.get("good") == 1
        assert a.metrics()["store_failures"]


async def test_write_through_has_stored_what_it_has_answered(
    tmp_path: Path, origin: HttpOriginServer, quick: None
) -> None:
    async with nodes(2, tmp_path, store=origin.url, write_policy="through") as (a, b):
        key = key_at([a, b], 0)
        for number in range(5):
            await (a, b)[number % 2].set(key, number)
            assert origin.values[key] == b"%d" % number
        origin.trouble = 503
        async with asyncio.timeout(20):
            with pytest.raises(CacheUnavailable) as failed:
                await a.set(key, 9)  # at its home, so everything about it waits there
        assert failed.value.definite is False
        with pytest.raises(CacheUnavailable) as failed:  # not the old value, not the new one
            await b.read("another")
        assert failed.value.definite is True
        origin.trouble = 0

        async def works_again() -> bool:
            try:
                return bool(await a.set(key, 10))
            except CacheUnavailable:
                return False

        await until_it(works_again, "the store is back")
        assert origin.values[key] == b"10"


async def test_back_unsafe_keeps_all_of_it_after_an_orderly_stop(tmp_path: Path) -> None:
    async with nodes(2, tmp_path, write_policy="back_unsafe", lease_ms=200) as (a, b):
        await a.set_many({f"k{number}": number for number in range(20)})
        assert sum(path.stat().st_size for path in tmp_path.rglob("log-*.bin")) == 0  # noqa: ASYNC240 - a handful
        await again(a, b)
        assert await b.get_many([f"k{number}" for number in range(20)]) == {
            f"k{number}": number for number in range(20)
        }


async def test_what_the_log_holds_is_not_lost_when_the_policy_becomes_unsafe(
    tmp_path: Path,
) -> None:
    async with nodes(1, tmp_path / "n", lease_ms=200) as (a,):
        config = a._config
        assert a._node is not None
        monkey = a._node._memory._store
        monkey.save = _never  # type: ignore[method-assign]  # so that only the log has it
        await a.set("k", "logged")
    unsafe = CacheNode(
        addr=str(config.addr), data_dir=config.data_dir, id=config.node_id,
        write_policy="back_unsafe",
    )  # fmt: skip
    async with unsafe:
        assert await unsafe.get("k") == "logged"


async def _never(_: object) -> None:
    from mesi_cache.storage.store import StoreUnavailable

    raise StoreUnavailable("not now")


@needs_redis
async def test_a_redis_is_read_through_and_written_back(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as port:
        await redis_command(port, "SET", "app:city", '{"name": "Balikpapan"}')
        store = f"redis://127.0.0.1:{port}/0?prefix=app:"
        async with nodes(2, tmp_path / "nodes", store=store, lease_ms=200) as (a, b):
            read = await a.entry("city")
            assert read is not None
            assert (read.value, read.version) == ({"name": "Balikpapan"}, 1)
            await b.set("city", "Samarinda")
            await b.incr("n", 41)
            await a.incr("n", 1)

            async def stored() -> bool:
                return (
                    await redis_command(port, "GET", "app:city") == b'$11\r\n"Samarinda"\r\n'
                    and await redis_command(port, "GET", "app:n") == b"$2\r\n42\r\n"
                )

            await until_it(stored, "it is written back")
            await a.delete("city")
            await again(a, b)

            async def removed() -> bool:
                return await redis_command(port, "EXISTS", "app:city") == b":0\r\n"

            await until_it(removed, "the delete is written back")
            assert await b.get("city") is None
            assert await b.set("city", 1) == 4
            assert await a.get("n") == 42


@needs_redis
async def test_a_redis_that_dies_makes_no_value_old_and_loses_nothing(
    tmp_path: Path, quick: None
) -> None:
    async with redis_server(tmp_path) as port:
        store = f"redis://127.0.0.1:{port}"
        async with nodes(2, tmp_path / "nodes", store=store) as (a, b):
            await a.set("k", 1)
            await redis_command(port, "SHUTDOWN", "NOSAVE")
            await a.set("k", 2)
            assert await b.get("k") == 2
            with pytest.raises(CacheUnavailable):
                await b.get("other")
            await until(
                lambda: any("redis" in str(each.status()["store_trouble"]) for each in (a, b)),
                "the trouble is said",
            )
