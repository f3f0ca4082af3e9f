"""`CacheNode` in the test's own process: what a Python program sees of the cache."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mesi_cache import (
    CacheNode,
    CacheUnavailable,
    ConfigError,
    KeyReused,
    NotAnInteger,
    VersionMismatch,
)
from mesi_cache.core.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))

from embedded_nodes import free_ports, key_at, nodes, until, until_it


async def test_what_is_set_on_one_node_is_got_on_the_other_and_never_old(tmp_path: Path) -> None:
    async with nodes(2, tmp_path) as (a, b):
        for home in (0, 1):
            key = key_at([a, b], home)
            for number in range(5):
                assert await a.set(key, {"n": number}) == 2 * number + 1
                assert await b.get(key) == {"n": number}
                assert await b.set(key, [number, None]) == 2 * number + 2
                assert await a.get(key) == [number, None]


async def test_a_hit_needs_no_message_and_gives_a_copy_of_its_own(tmp_path: Path) -> None:
    async with nodes(2, tmp_path) as (a, b):
        key = key_at([a, b], 1)
        await a.set(key, {"list": [1]})
        sent = a.metrics()["coherence_messages"]
        hits = a.metrics()["hits"]
        assert isinstance(hits, int)
        for _ in range(100):
            value = await a.get(key)
            assert value == {"list": [1]}
            value["list"].append(2)  # the caller's own copy
        assert a.metrics()["hits"] == hits + 100
        assert a.metrics()["coherence_messages"] == sent


async def test_the_whole_api(tmp_path: Path) -> None:
    async with nodes(2, tmp_path) as (a, b):
        assert await a.get("absent") is None
        assert await a.get("absent", "instead") == "instead"
        assert await a.entry("absent") is None
        assert await a.cas("k", 0, "one") == 1
        with pytest.raises(VersionMismatch) as mismatch:
            await b.cas("k", 0, "two")
        assert mismatch.value.version == 1
        entry = await b.entry("k")
        assert entry is not None
        assert (entry.value, entry.version, entry.ttl) == ("one", 1, None)
        assert await b.delete("k") is True
        assert await a.delete("k") is False
        assert await a.incr("n") == 1
        assert await b.incr("n", 41) == 42
        await a.set("text", "x")
        with pytest.raises(NotAnInteger):
            await a.incr("text")
        versions = await a.set_many({f"m{n}": n for n in range(50)})
        assert set(versions.values()) == {1}
        many = await b.get_many([*(f"m{n}" for n in range(50)), "absent"])
        assert many == {f"m{n}": n for n in range(50)}
        await a.set("none", None)
        assert await b.get("none", "instead") is None


async def test_a_change_with_a_name_counts_once_whichever_node_is_asked_again(
    tmp_path: Path,
) -> None:
    async with nodes(2, tmp_path) as (a, b):
        assert [await each.incr("n", 5, once="one") for each in (a, b, a)] == [5, 5, 5]
        assert [await each.set("k", "x", once="two") for each in (b, a)] == [1, 1]
        assert [await each.cas("k", 1, "y", once="three") for each in (a, b)] == [2, 2]
        assert [await each.delete("k", once="four") for each in (a, b)] == [True, True]
        for node in (a, b):
            with pytest.raises(KeyReused):
                await node.incr("n", 6, once="one")
            with pytest.raises(KeyReused):  # nor for another key, whose home has never seen it
                await node.incr(f"other of {node.url}", 5, once="one")
        with pytest.raises(ValueError, match="once"):
            await a.incr("n", once="")
        assert await a.get("n") == 5
        assert [key for key in a._lines if key.startswith("\x00")] == []  # a claim holds no slot


async def test_a_deadline_is_kept_on_every_node(tmp_path: Path) -> None:
    async with nodes(2, tmp_path) as (a, b):
        await a.set("short", 1, ttl=0.3)
        await a.set("longer", 1, ttl=600)
        left = await b.ttl("longer")
        assert left is not None
        assert 500 < left <= 600
        await a.set("long", 1)
        assert await b.ttl("long") is None
        with pytest.raises(KeyError):
            await b.ttl("absent")

        async def gone() -> bool:
            return await b.get("short") is None and await a.get("short") is None

        await until_it(gone, "its time is over on both")
        assert await b.ttl("longer") is not None


@pytest.mark.parametrize("key", ["", "x" * 257, "ö" * 129, "a\x00b"])
async def test_what_is_no_key_is_refused(key: str, tmp_path: Path) -> None:
    async with nodes(1, tmp_path) as (a,):
        for call in (a.get(key), a.set(key, 1), a.delete(key), a.get_many([key])):
            with pytest.raises(ValueError, match="key"):
                await call


async def test_what_is_no_value_is_refused(tmp_path: Path) -> None:
    async with nodes(1, tmp_path, max_body_bytes=1000) as (a,):
        with pytest.raises(TypeError):
            await a.set("k", object())
        with pytest.raises(ValueError, match="max_body_bytes"):
            await a.set("k", "x" * 1000)
        for ttl in (0, -1, float("nan"), 1e12):
            with pytest.raises(ValueError, match="ttl"):
                await a.set("k", 1, ttl=ttl)
        for by in (True, 1.5, 1 << 60):
            with pytest.raises(ValueError, match="by"):
                await a.incr("k", by)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(TypeError):
            await a.get_many([1])  # type: ignore[list-item]  # that is the point
        assert await a.get("k") is None


async def test_it_takes_nothing_that_belongs_to_the_process(tmp_path: Path) -> None:
    def belongings() -> tuple[Any, ...]:
        return (
            [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
            list(logging.getLogger().handlers), logging.getLogger().level,
            logging.getLogger("aiohttp").level, gc.get_threshold(), gc.get_freeze_count(),
            asyncio.get_event_loop_policy(),
        )  # fmt: skip

    before = belongings()
    async with nodes(1, tmp_path) as (a,):
        await a.set("k", 1)
        assert belongings() == before
    assert belongings() == before


async def test_its_port_speaks_the_same_http_api(tmp_path: Path) -> None:
    async with nodes(1, tmp_path) as (a,):
        await a.set("k", "x")

        def read() -> Any:
            with urllib.request.urlopen(a.url + "/read?key=k") as answer:  # noqa: S310 - http
                return json.load(answer)

        shown = await asyncio.to_thread(read)
        assert (shown["value"], shown["hit"], shown["state"]) == ("x", True, "M")


async def test_what_was_set_is_there_after_a_new_start(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    node = CacheNode(addr=f"127.0.0.1:{port}", data_dir=tmp_path, lease_ms=200)
    async with node:
        await node.set("k", "kept")
    with pytest.raises(RuntimeError, match="not running"):
        await node.get("k")
    async with node:
        assert await node.get("k") == "kept"


async def test_a_home_that_is_away_is_said_and_nothing_old_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesi_cache.node.Settings", partial(Settings, call_ms=1_000))
    async with nodes(2, tmp_path, lease_ms=300) as (a, b):
        key = key_at([a, b], 1)
        await a.set(key, 1)
        await b.stop()
        began = asyncio.get_running_loop().time()

        async def reads() -> None:
            while asyncio.get_running_loop().time() < began + 10:  # until the lease is over
                assert await a.get(key) == 1
                await asyncio.sleep(0.01)

        with pytest.raises(CacheUnavailable) as unavailable:
            await reads()
        assert unavailable.value.definite is True
        assert asyncio.get_running_loop().time() - began < 10


async def test_each_worker_takes_the_first_free_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    addrs = [f"127.0.0.1:{port}" for port in free_ports(2)]
    async with CacheNode(addr=addrs) as a, CacheNode(addr=addrs) as b:
        assert [a.url, b.url] == [f"http://{addr}" for addr in addrs]
        await until(lambda: bool(a.status()["peers_connected"]), "they are linked")
        await a.set("k", 1)
        assert await b.get("k") == 1
        with pytest.raises(ConfigError, match="already in use"):
            await CacheNode(addr=addrs).start()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"capacity": 0}, "--capacity"),
        ({"colour": "red"}, "--colour"),
        ({"addr": "0.0.0.0:1"}, "beyond loopback"),
        ({"addr": []}, "no address"),
        ({"addr": ["127.0.0.1:1", "127.0.0.1:2"], "id": "x"}, "one node"),
        ({"peers": ["somewhere"]}, "--peers"),
    ],
)
def test_what_main_py_would_refuse_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CacheNode(**{"addr": "127.0.0.1:9000", **flags})
