"""Real processes: the seed's walkthrough, kill -9, SIGSTOP, partitions."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.checkers import linearizable
from testkit.cluster import Cluster, Reply

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import LEASE_MS, Recorder, argv, linked, until

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


async def load(cluster: Cluster, recorder: Recorder, keys: list[str], stop: asyncio.Event) -> None:
    """Six clients on all nodes; whoever finds his node gone goes on at the next."""

    async def client(number: int) -> None:
        me, at = f"c{number}", number % cluster.size
        turn = 0
        while not stop.is_set():
            key = keys[(turn + number) % len(keys)]
            async with cluster.client(at) as http:
                for _ in range(10):
                    turn += 1
                    if (turn + number) % 3:
                        reply = await recorder.read(http, me, key)
                    else:
                        reply = await recorder.write(http, me, key)
                    if reply is None:
                        at = (at + 1) % cluster.size
                        await asyncio.sleep(0.02)
                        break
                    await asyncio.sleep(0.002)

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(client(number))


@pytest.mark.parametrize("role", ["home", "owner"])
async def test_kill_9_of_one_node_under_load_stays_linearizable(
    role: str, cluster: Cluster
) -> None:
    recorder, stop = Recorder(), asyncio.Event()
    keys = [await key_at(cluster, 0), await key_at(cluster, 1)]
    running = asyncio.create_task(load(cluster, recorder, keys, stop))
    await until(lambda: _size(recorder, 60), "the load has begun")
    victim = 0
    if role == "owner":  # node 2 is home of none of them, but often the owner
        victim = 2
    cluster.kill(victim)
    before = len(recorder.history)
    await until(lambda: _size(recorder, before + 40), "the others go on")
    await cluster.start_all()
    before = len(recorder.history)
    await until(lambda: _size(recorder, before + 60), "all go on")
    stop.set()
    await asyncio.wait_for(running, 20)
    linearizable.check(recorder.history, linearizable.VersionedRegister()).require()


async def _size(recorder: Recorder, at_least: int) -> bool:
    return len(recorder.history) >= at_least


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


async def test_a_node_cut_off_one_way_answers_503_rather_than_an_old_value(
    cluster: Cluster,
) -> None:
    key = await key_at(cluster, 0)
    async with cluster.client(1) as b, cluster.client(2) as c:
        await ok(await b.post("/write", {"key": key, "value": "old"}))
        await ok(await c.get(f"/read?key={key}"))
        # The home no longer reaches node 2, whose own messages still arrive.
        cluster.blackhole(0, 2, one_way=True)
        await ok(await b.post("/write", {"key": key, "value": "new"}))
        began = time.monotonic()
        reply = await c.get(f"/read?key={key}", timeout_s=8.0)
        assert isinstance(reply, Reply)
        assert time.monotonic() - began < 5.0
        assert reply.status == 503, reply
        assert reply.json["definite"] is True
        cluster.heal()

        async def healed() -> bool:
            again = await c.get(f"/read?key={key}", timeout_s=8.0)
            return isinstance(again, Reply) and again.status == 200

        await until(healed, "the healed node reads again")
        assert (await ok(await c.get(f"/read?key={key}"))).json["value"] == "new"


async def test_an_increment_asked_for_once_happens_once_whoever_dies(cluster: Cluster) -> None:
    key = await key_at(cluster, 0)
    recorder = Recorder()

    async def count(number: int) -> None:
        async with cluster.client(1 + number % 2) as http:
            for _ in range(40):
                await recorder.incr(http, f"c{number}", key)
                await asyncio.sleep(0.01)

    async def disturb() -> None:
        await until(lambda: _size(recorder, 30), "counting has begun")
        cluster.kill(0)
        await cluster.start_all()

    await asyncio.gather(count(0), count(1), count(2), disturb())
    linearizable.check(recorder.history, linearizable.VersionedRegister()).require()


async def test_another_member_list_is_refused_and_said(tmp_path: Path) -> None:
    def two_lists(view: object) -> list[str]:
        command = argv()(view)  # type: ignore[arg-type]  # the cluster's view
        if view.index == 2:  # type: ignore[attr-defined]
            command = [c for c in command if not c.startswith("--dial")]
            peers = next(c for c in command if c.startswith("--peers"))
            command[command.index(peers)] = peers.split(",")[0]
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
