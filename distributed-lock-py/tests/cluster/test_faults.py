"""Real processes that are killed, stopped and cut off while clients work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from testkit.checkers import locks as lock_checker
from testkit.cluster import NoReply, Reply
from testkit.history import History

from .lock_cluster import Client, LockCluster, make_cluster, until

pytestmark = pytest.mark.cluster


async def work(client: Client, stop: asyncio.Event, names: tuple[str, ...]) -> int:
    """Take and give back locks in turn until told to stop; how often that worked."""
    done = 0
    while not stop.is_set():
        for name in names:
            type_ = "shared" if done % 3 == 2 else "exclusive"
            if await client.acquire(name, type=type_) is not None:
                done += await client.release(name)
    client.close()
    return done


async def test_a_killed_leader_costs_nobody_a_lock_or_the_order_of_tokens(tmp_path: Path) -> None:
    history = History()
    async with make_cluster(tmp_path) as cluster:
        stop = asyncio.Event()
        clients = [Client(cluster, f"c{i}", history) for i in range(6)]
        keeper = Client(cluster, "keeper", history)
        kept = await keeper.acquire("kept")
        tasks = [
            asyncio.create_task(work(c, stop, ("a", "b") if i % 2 else ("b",)))
            for i, c in enumerate(clients)
        ]
        for _ in range(2):
            before = len(history)
            await until(lambda before=before: len(history) > before + 60)
            leader = await cluster.leader()
            cluster.kill(leader)
            before = len(history)
            await until(lambda before=before: len(history) > before + 60)
            cluster.start(leader)
            await cluster.ready(leader)
        stop.set()
        assert sum(await asyncio.gather(*tasks)) > 50
        reply = await cluster.ask(await cluster.leader(), "/locks/kept")
        assert [h["fencing_token"] for h in reply.json["holders"]] == [kept]
        keeper.close()
    history.save(tmp_path / "history.jsonl")
    lock_checker.check(history).require()


async def test_a_power_cut_loses_no_holder_no_token_and_no_lease_time(tmp_path: Path) -> None:
    async with make_cluster(tmp_path) as cluster:
        leader = await cluster.leader()
        held = (await cluster.ask(leader, "/acquire", _body("a", "ann"))).json["fencing_token"]
        leased = await cluster.ask(leader, "/acquire", _body("b", "bob", ttl_ms=60_000))
        leased_at = asyncio.get_running_loop().time()
        gone = await cluster.ask(leader, "/acquire", _body("c", "cyd"))
        await cluster.ask(leader, "/release", {"lock_name": "c", "client_id": "cyd"})
        first = asyncio.create_task(_post(cluster, leader, _body("a", "dan", request_id="r1")))
        await until(lambda: _waiters(cluster, leader, 1))
        second = asyncio.create_task(_post(cluster, leader, _body("a", "eve", request_id="r1")))
        await until(lambda: _waiters(cluster, leader, 2))
        # Long enough for the idle leader to log the time of its own accord.
        await until(lambda: asyncio.get_running_loop().time() > leased_at + 1.6)
        before_ms = (await cluster.ask(leader, "/locks/b")).json["holders"][0]["expires_in_ms"]
        cluster.power_cut()
        assert all(isinstance(reply, NoReply) for reply in (await first, await second))
        await cluster.start_all()
        leader = await cluster.leader()
        shown = (await cluster.ask(leader, "/locks/a")).json
        assert [h["fencing_token"] for h in shown["holders"]] == [held]
        assert [w["client_id"] for w in shown["waiters"]] == ["dan", "eve"]
        lease = (await cluster.ask(leader, "/locks/b")).json["holders"][0]
        assert lease["fencing_token"] == leased.json["fencing_token"]
        # The remainder is kept to a second: time is in the log, and stands still without a leader.
        assert 40_000 < lease["expires_in_ms"] <= before_ms + 1_000
        # Who retries rejoins at its place, also if it comes later than the one behind it.
        second = asyncio.create_task(_post(cluster, leader, _body("a", "eve", request_id="r1")))
        first = asyncio.create_task(_post(cluster, leader, _body("a", "dan", request_id="r1")))
        await cluster.ask(leader, "/release", {"lock_name": "a", "client_id": "ann"})
        granted = await first
        assert isinstance(granted, Reply)
        assert granted.json["fencing_token"] > gone.json["fencing_token"]
        assert not second.done()
        await cluster.ask(leader, "/release", {"lock_name": "a", "client_id": "dan"})
        assert (await second).status == 200


async def test_a_late_node_and_a_restart_go_on_from_a_snapshot(tmp_path: Path) -> None:
    async with make_cluster(tmp_path, more=("--snapshot_entries=40",)) as cluster:
        leader = await cluster.leader()
        late = (leader + 1) % 3
        cluster.kill(late)
        held = (await cluster.ask(leader, "/acquire", _body("a", "ann"))).json["fencing_token"]
        for i in range(60):
            await cluster.ask(leader, "/acquire", _body(f"lock-{i}", "ann", ttl_ms=600_000))
            await cluster.ask(leader, "/release", {"lock_name": f"lock-{i}", "client_id": "ann"})
        assert (await cluster.status(leader))["snapshot_index"] >= 40
        cluster.start(late)
        await cluster.ready(late)
        await until(lambda: _holder_there(cluster, late))
        assert (await cluster.status(late))["snapshot_index"] >= 40
        cluster.power_cut()
        await cluster.start_all()
        after = await cluster.ask(await cluster.leader(), "/acquire", _body("b", "bob"))
        assert after.json["fencing_token"] == held + 61
        for index in range(3):
            assert await until(lambda index=index: _holder_there(cluster, index)) == held


async def test_a_stopped_leader_answers_nothing_stale_when_it_wakes(tmp_path: Path) -> None:
    async with make_cluster(tmp_path) as cluster:
        old = await cluster.leader()
        first = await cluster.ask(old, "/acquire", _body("a", "ann", ttl_ms=30_000))
        async with cluster.client(old) as client:
            await client.get("/healthz")
            cluster.pause(old)
            read = asyncio.create_task(client.get("/locks/a", timeout_s=30))
            others = tuple(i for i in range(3) if i != old)
            new = await cluster.leader(others)
            await cluster.ask(new, "/release", {"lock_name": "a", "client_id": "ann"})
            second = await cluster.ask(new, "/acquire", _body("a", "bob"))
            assert second.json["fencing_token"] > first.json["fencing_token"]
            cluster.resume(old)
            outcome = await read
            assert isinstance(outcome, Reply)
            assert outcome.status in (307, 503), outcome.text
        await until(lambda: _follows(cluster, old, new))


async def test_a_leader_without_a_majority_neither_grants_nor_answers(tmp_path: Path) -> None:
    async with make_cluster(tmp_path, proxied=True) as cluster:
        old = await cluster.leader()
        others = tuple(i for i in range(3) if i != old)
        cluster.partition({old}, set(others))
        async with cluster.client(old) as client:
            lonely = await client.post("/acquire", _body("a", "ann"), timeout_s=20)
            assert isinstance(lonely, Reply)
            assert lonely.status == 503, lonely.text
        new = await cluster.leader(others)
        token = (await cluster.ask(new, "/acquire", _body("a", "bob"))).json["fencing_token"]
        await until(lambda: _state_is(cluster, old, {"FOLLOWER", "CANDIDATE"}))
        reply = await cluster.ask(old, "/locks/a")
        assert (reply.status, reply.json["error"]) == (503, "No leader")
        assert "retry-after" in reply.headers
        cluster.heal()
        await until(lambda: _follows(cluster, old, None))
        stale = await until(lambda: _holder_there(cluster, old))
        assert stale == token


def _body(lock: str, client: str, **more: object) -> dict[str, object]:
    return {"lock_name": lock, "client_id": client, **more}


async def _post(cluster: LockCluster, index: int, body: dict[str, object]) -> Reply | NoReply:
    async with cluster.client(index) as client:
        return await client.post("/acquire", body, timeout_s=15)


async def _waiters(cluster: LockCluster, index: int, count: int) -> bool:
    return len((await cluster.ask(index, "/locks/a")).json["waiters"]) == count


async def _state_is(cluster: LockCluster, index: int, states: set[str]) -> bool:
    return (await cluster.status(index)).get("state") in states


async def _follows(cluster: LockCluster, index: int, leader: int | None) -> bool:
    status = await cluster.status(index)
    found = status.get("leader_id")
    return found is not None and (leader is None or found == f"node{leader + 1}")


async def _holder_there(cluster: LockCluster, index: int) -> int | None:
    holders = (await cluster.ask(index, "/locks/a?consistency=stale")).json["holders"]
    return holders[0]["fencing_token"] if holders else None
