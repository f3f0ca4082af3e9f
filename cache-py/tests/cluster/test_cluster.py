"""Real processes: the seed's walkthrough, kill -9, SIGSTOP, partitions."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.cluster import Cluster, Reply

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import LEASE_MS, argv, linked, until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for all tests that leave them as they found them, or broken and mendable."""
    cluster = Cluster(argv(), 3, root=tmp_path_factory.mktemp("shared"), proxied=("http",))
    cluster.prepare()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def cluster(running: Cluster) -> Cluster:
    """The shared nodes, all up, ready and linked."""
    running.heal()
    await running.start_all()
    await linked(running)
    return running


async def ok(reply: object) -> Reply:
    assert isinstance(reply, Reply), reply
    assert reply.status == 200, reply
    return reply


async def home_of(cluster: Cluster, key: str) -> int:
    async with cluster.client(0) as client:
        name = (await ok(await client.get(f"/directory?key={key}"))).json["home"]
    return "ABC".index(name[-1])


_fresh = itertools.count()


async def key_at(cluster: Cluster, home: int) -> str:
    """A new key whose home is node `home`."""
    while True:
        key = f"key{next(_fresh)}"
        if await home_of(cluster, key) == home:
            return key


async def test_the_seeds_walkthrough(tmp_path: Path) -> None:
    async with Cluster(argv(), 3, root=tmp_path) as cluster:
        async with cluster.client(0) as a, cluster.client(1) as b:
            written = await ok(await a.post("/write", {"key": "nama-kota", "value": "Balikpapan"}))
            assert written.json == {
                "status": "ok", "key": "nama-kota", "value": "Balikpapan", "state": "M",
                "version": 1,
            }  # fmt: skip
            hit = await ok(await a.get("/read?key=nama-kota"))
            assert hit.json == {
                "key": "nama-kota", "value": "Balikpapan", "state": "M", "hit": True,
                "source": "cache", "version": 1,
            }  # fmt: skip
            miss = await ok(await b.get("/read?key=nama-kota"))
            assert miss.json == {
                "key": "nama-kota", "value": "Balikpapan", "state": "S", "hit": False,
                "source": "memory", "version": 1,
            }  # fmt: skip
            again = await ok(await a.post("/write", {"key": "nama-kota", "value": "Samarinda"}))
            assert (again.json["state"], again.json["version"]) == ("M", 2)
            await cluster.nodes[1].wait_log("INVALIDATE key=nama-kota S->I from=nodeA")
            metrics = (await ok(await b.get("/metrics"))).json
            assert metrics["misses"] == 1
            assert metrics["invalidations_received"] == 1
            assert (await ok(await b.get("/read?key=nama-kota"))).json["value"] == "Samarinda"
        assert await cluster.terminate_all() == [0, 0, 0]


async def test_nodes_may_be_started_one_after_another(tmp_path: Path) -> None:
    cluster = Cluster(argv(), 3, root=tmp_path)
    cluster.prepare()
    try:
        cluster.start(0)
        await cluster.ready(0)
        async with cluster.client(0) as client:
            # Wherever the key's home is, the write is done as soon as that node is there.
            writing = asyncio.create_task(client.post("/write", {"key": "early", "value": 1}))
            cluster.start(1)
            await cluster.ready(1)
            cluster.start(2)
            await cluster.ready(2)
            reply = await writing
            if isinstance(reply, Reply) and reply.status == 503:  # a very slow machine
                reply = await client.post("/write", {"key": "early", "value": 1})
            await ok(reply)
    finally:
        cluster.close()


async def test_kill_9_of_all_nodes_loses_no_acknowledged_change(cluster: Cluster) -> None:
    async with cluster.client(0) as a, cluster.client(1) as b:
        for number in range(40):
            writer = (a, b)[number % 2]
            await ok(await writer.post("/write", {"key": f"k{number % 13}", "value": number}))
        await ok(await a.post("/incr", {"key": "n", "by": 7}))
        await ok(await b.post("/write", {"key": "gone", "value": 1}))
        await ok(await a.post("/delete", {"key": "gone"}))
    cluster.power_cut()
    await cluster.start_all()
    async with cluster.client(2) as c:
        for number in range(27, 40):
            reply = await ok(await c.get(f"/read?key=k{number % 13}"))
            assert reply.json["value"] == number
        assert (await ok(await c.get("/read?key=n"))).json["value"] == 7
        gone = await c.get("/read?key=gone")
        assert isinstance(gone, Reply)
        assert gone.status == 404
        again = await ok(await c.post("/write", {"key": "gone", "value": 2}))
        assert again.json["version"] > 1  # a version never means two values


async def test_a_paused_sharer_delays_a_writer_by_one_lease_and_is_never_stale(
    cluster: Cluster,
) -> None:
    key = await key_at(cluster, 0)
    async with cluster.client(1) as b, cluster.client(2) as c:
        await ok(await b.post("/write", {"key": key, "value": "old"}))
        assert (await ok(await c.get(f"/read?key={key}"))).json["state"] == "S"
        cluster.pause(2)
        try:
            began = time.monotonic()
            await ok(await b.post("/write", {"key": key, "value": "new"}))
            assert time.monotonic() - began < LEASE_MS / 1000 + 1.0
        finally:
            cluster.resume(2)
        # Its copy was never taken away by a message, and yet it must not show it.
        reply = await c.get(f"/read?key={key}")
        assert isinstance(reply, Reply)
        assert reply.status == 503 or reply.json["value"] == "new", reply


class Watch:
    """How long calls take, and how long the machine itself takes for one that costs nothing."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.slowest_s = self.lag_s = 0.0

    async def call(self, node: int, path: str, body: object, name: str) -> Reply:
        """One call on a connection of its own."""
        began = time.monotonic()
        async with self._cluster.client(node) as client:
            reply = await client.request(
                "POST" if body is not None else "GET", path, timeout_s=30,
                body=None if body is None else json.dumps(body).encode(),
                headers={"Idempotency-Key": name} if name else {},
            )  # fmt: skip
        assert isinstance(reply, Reply), reply
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        return reply

    async def machine(self, *nodes: int) -> None:
        """Until it is cancelled."""
        while True:
            for node in nodes:
                began = time.monotonic()
                async with self._cluster.client(node) as client:
                    await client.get("/healthz", timeout_s=30)
                self.lag_s = max(self.lag_s, time.monotonic() - began)
            await asyncio.sleep(0.05)


async def test_every_call_is_answered_within_five_seconds_by_the_truth_or_503(
    cluster: Cluster,
) -> None:
    """Node 1 is dead. Node 2 is no longer reached by node 0, whose own messages still arrive."""
    cut_off, dead = await key_at(cluster, 0), [await key_at(cluster, 1) for _ in range(6)]
    async with cluster.client(0) as a, cluster.client(2) as c:
        for key in (cut_off, dead[0]):
            await ok(await a.post("/write", {"key": key, "value": "old"}))
            await ok(await c.get(f"/read?key={key}"))
        cluster.blackhole(0, 2, one_way=True)
        cluster.kill(1)
        await ok(await a.post("/write", {"key": cut_off, "value": "new"}))
        calls: list[tuple[int, str, object, str]] = [(2, f"/read?key={cut_off}", None, "")]
        for node, name in ((0, ""), (0, "name"), (2, "")):
            calls += [
                (node, "/write", {"key": dead[1], "value": 1}, name and f"{name}1"),
                (node, "/incr", {"key": dead[2]}, name and f"{name}2"),
                (node, "/delete", {"key": dead[3]}, name and f"{name}3"),
                (node, "/cas", {"key": dead[4], "expected_version": 0, "value": 1}, name),
            ]
            if not name:
                calls += [(node, f"/read?key={key}", None, "") for key in (*dead, "other")]
                calls += [(node, f"/directory?key={dead[5]}", None, "")]
        watch = Watch(cluster)
        machine = asyncio.create_task(watch.machine(0, 2))
        *replies, read, written = await asyncio.gather(
            *(watch.call(*call) for call in calls),
            watch.call(0, "/mread", {"keys": [cut_off, *dead]}, ""),
            watch.call(0, "/mwrite", {"items": [{"key": dead[1], "value": 1}]}, ""),
        )
        machine.cancel()
        assert watch.slowest_s < 5.0 + watch.lag_s
        for (node, path, body, _), reply in zip(calls, replies, strict=True):
            if "other" in path:  # its home may be well
                assert reply.status in (404, 503), reply
                continue
            assert reply.status == 503, (node, path, reply)
            assert reply.json["error"] == "Unavailable"
            assert reply.json["reason"]
            # A read has done nothing; a change may have been done, once its home is back.
            assert reply.json["definite"] in ((True,) if body is None else (True, False)), reply
        batch = [*read.json["results"], *written.json["results"]]
        assert [each.get("value", each.get("error")) for each in batch] == [
            "new", *["Unavailable"] * 7,
        ]  # fmt: skip
        cluster.heal()
        await cluster.start_all()

        async def value_of(key: str) -> object:
            again = await c.get(f"/read?key={key}", timeout_s=8.0)
            return again.json["value"] if isinstance(again, Reply) and again.status == 200 else None

        assert await until(lambda: value_of(cut_off), "the healed node reads again") == "new"
        assert await until(lambda: value_of(dead[0]), "the dead home is back") == "old"


async def test_the_least_recently_used_line_goes_and_is_read_again_from_memory(
    cluster: Cluster,
) -> None:
    async with cluster.client(1) as b:
        before = (await ok(await b.get("/metrics"))).json

        async def lines() -> list[str]:
            shown = (await ok(await b.get("/lines"))).json["lines"]
            return [line["key"] for line in shown]

        for number in range(10):
            await ok(await b.post("/write", {"key": f"slot{number}", "value": number}))
        await ok(await b.get("/read?key=slot0"))
        async with cluster.client(2) as c:  # what another node does is no use of it here
            await ok(await c.get("/read?key=slot1"))
        for number in range(10, 13):
            await ok(await b.post("/write", {"key": f"slot{number}", "value": number}))
        assert await lines() == [f"slot{n}" for n in (4, 5, 6, 7, 8, 9, 0, 10, 11, 12)]
        again = (await ok(await b.get("/read?key=slot2"))).json
        assert (again["value"], again["hit"], again["source"]) == (2, False, "memory")
        assert (await lines())[-1] == "slot2"
        after = (await ok(await b.get("/metrics"))).json
        assert after["lines"] == after["capacity"] == 10
        assert after["evictions"] - before["evictions"] >= 4
        assert after["writebacks"] - before["writebacks"] >= 3


async def test_another_member_list_is_refused_and_said(tmp_path: Path) -> None:
    def two_lists(view: object) -> list[str]:
        command = argv()(view)  # type: ignore[arg-type]  # the cluster's view
        if view.index == 2:  # type: ignore[attr-defined]
            command = [c for c in command if not c.startswith("--dial")]
            peers = next(c for c in command if c.startswith("--peers"))
            command[command.index(peers)] = peers.split(",")[0]  # without itself and the other
        return command

    cluster = Cluster(two_lists, 3, root=tmp_path)
    cluster.prepare()
    try:
        for index in range(3):
            cluster.start(index)

        async def differs() -> bool:
            async with cluster.client(0) as client:
                reply = await client.get("/readyz")
                return isinstance(reply, Reply) and reply.status == 503 and "--peers" in reply.text

        await until(differs, "/readyz tells that the member lists differ")
        async with cluster.client(0) as client:
            reply = await client.get("/read?key=x")
            assert isinstance(reply, Reply)
            assert reply.status == 503
    finally:
        cluster.close()
