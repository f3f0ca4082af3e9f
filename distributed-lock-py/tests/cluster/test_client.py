"""LockClient against a real cluster, also while its leader is killed under it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lock_manager.client import (
    DeadlockDetected,
    LeaseLost,
    LockClient,
    LockHeld,
    LockTimeout,
    Unavailable,
)

from .lock_cluster import LockCluster, make_cluster, until

pytestmark = pytest.mark.cluster


async def holders(cluster: LockCluster, name: str) -> list[str]:
    reply = await cluster.ask(await cluster.leader(), f"/locks/{name}")
    return [holder["client_id"] for holder in reply.json["holders"]]


async def test_locks_are_held_for_the_block_and_kept_alive(tmp_path: Path) -> None:
    async with (
        make_cluster(tmp_path) as cluster,
        LockClient(cluster.urls, client_id="ann") as ann,
        LockClient(cluster.urls[:1], client_id="bob") as bob,
    ):
        await _hold_and_fail(cluster, ann, bob)
        await _lose(cluster, ann)
        await _survive_a_killed_leader(cluster, ann, bob)
        await _no_majority(cluster, ann)


async def _hold_and_fail(cluster: LockCluster, ann: LockClient, bob: LockClient) -> None:
    loop = asyncio.get_running_loop()
    async with ann.lock("a", ttl_ms=1_000) as held:
        assert await holders(cluster, "a") == ["ann"]
        with pytest.raises(LockHeld) as taken:
            async with bob.lock("a", wait_ms=0):
                pass
        assert taken.value.holders[0]["fencing_token"] == held.fencing_token
        with pytest.raises(LockTimeout):
            async with bob.lock("a", wait_ms=100):
                pass
        with pytest.raises(LockHeld):  # another task of the same client
            async with ann.lock("a", wait_ms=0):
                pass
        over_two_leases = loop.time() + 2.1
        await until(lambda: loop.time() > over_two_leases)
        assert not held.lost
        assert await holders(cluster, "a") == ["ann"]
    async with bob.locks(["a", {"lock_name": "b", "lock_type": "shared"}], ttl_ms=None) as both:
        assert both.fencing_token > held.fencing_token
        async with ann.lock("c"):
            waiting = asyncio.create_task(_take(ann, "a"))
            reply = f"/locks/{'a'}"
            leader = await cluster.leader()

            async def queued() -> bool:
                return bool((await cluster.ask(leader, reply)).json["waiters"])

            await until(queued)
            with pytest.raises(DeadlockDetected) as deadlock:
                async with bob.lock("c"):
                    pass
            assert deadlock.value.cycle == ["bob", "ann"]
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    assert await holders(cluster, "a") == []


async def _take(client: LockClient, name: str, **more: int) -> int:
    async with client.lock(name, **more) as held:
        return held.fencing_token


async def _lose(cluster: LockCluster, ann: LockClient) -> None:
    """An operator takes the lock away: the body is cancelled, and only the body."""
    bodies = []

    async def hold() -> None:
        async with ann.lock("l", ttl_ms=600) as held:
            bodies.append(held)
            freed = {"lock_name": "l", "reason": "test"}
            await cluster.ask(await cluster.leader(), "/admin/force_release", freed)
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await hold()
    assert bodies[0].lost
    await asyncio.sleep(0)  # this task itself is not cancelled


async def _survive_a_killed_leader(cluster: LockCluster, ann: LockClient, bob: LockClient) -> None:
    async with ann.lock("k", ttl_ms=20_000) as held:
        waiting = asyncio.create_task(_take(bob, "k", wait_ms=20_000))
        leader = await cluster.leader()

        async def queued() -> bool:
            return bool((await cluster.ask(leader, "/locks/k")).json["waiters"])

        await until(queued)
        cluster.kill(leader)
        await cluster.leader(tuple(i for i in range(3) if i != leader))
        assert not held.lost
    assert await waiting > held.fencing_token
    cluster.start(leader)
    await cluster.ready(leader)


async def _no_majority(cluster: LockCluster, ann: LockClient) -> None:
    """The lease cannot be kept: the holder learns of it in time, by its own clock."""

    async def hold() -> None:
        async with ann.lock("m", ttl_ms=1_500):
            cluster.power_cut()
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await asyncio.wait_for(hold(), 15)
    async with LockClient(cluster.urls, persist_s=0.3) as alone:
        with pytest.raises(Unavailable):
            await _take(alone, "m", wait_ms=0)
