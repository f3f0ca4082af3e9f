"""The seed's walkthrough and the rows of the HTTP table, on one healthy cluster."""

from __future__ import annotations

import asyncio

import pytest

from testkit.cluster import Reply

from .lock_cluster import LockCluster, make_cluster, until

pytestmark = pytest.mark.cluster


@pytest.fixture
async def cluster(tmp_path):
    async with make_cluster(tmp_path) as cluster:
        yield cluster


async def test_the_seeds_walkthrough_and_every_row_of_the_table(cluster: LockCluster) -> None:
    leader = await cluster.leader()
    await _the_seeds_words(cluster, leader)
    await _a_follower_points_at_the_leader(cluster, leader)
    await _waiting_and_handing_over(cluster, leader)
    await _a_closed_connection_cancels_its_wait(cluster, leader)
    await _leases(cluster, leader)
    await _reads(cluster, leader)
    await _mistakes(cluster, leader)
    await _operators(cluster, leader)


async def _the_seeds_words(cluster: LockCluster, leader: int) -> None:
    output = cluster.nodes[leader].output()
    assert "WON election" in output
    assert "starting heartbeats" in output
    body = {"lock_name": "kunci-raft", "lock_type": "exclusive", "client_id": "klien-A"}
    reply = await cluster.ask(leader, "/acquire", body)
    assert reply.status == 200
    assert reply.json == {
        "status": "acquired",
        "lock_name": "kunci-raft",
        "lock_type": "exclusive",
        "client_id": "klien-A",
        "fencing_token": reply.json["fencing_token"],
        "expires_in_ms": None,
    }
    del body["lock_type"]
    reply = await cluster.ask(leader, "/release", body)
    assert (reply.status, reply.json["status"]) == (200, "released")
    reply = await cluster.ask(leader, "/release", body)
    assert (reply.status, reply.json["error"]) == (409, "Lock not held")


async def _a_follower_points_at_the_leader(cluster: LockCluster, leader: int) -> None:
    follower = (leader + 1) % 3
    url, leader_id = cluster.url(leader), f"node{leader + 1}"
    body = {"lock_name": "a", "client_id": "c"}
    for reply, path in (
        (await cluster.ask(follower, "/acquire", body), "/acquire"),
        (await cluster.ask(follower, "/locks/a%2Fb?consistency=linearizable"), "/locks/a%2Fb"),
    ):
        assert reply.status == 307
        assert reply.headers["location"].startswith(url + path)
        assert reply.json == {"error": "Not the leader", "leader_id": leader_id, "leader": url}
    assert (await cluster.ask(follower, "/locks?consistency=stale")).json == {"locks": []}
    status = (await cluster.ask(follower, "/status")).json
    assert (status["state"], status["leader_id"], status["leader"]) == ("FOLLOWER", leader_id, url)


async def _waiting_and_handing_over(cluster: LockCluster, leader: int) -> None:
    first = await cluster.ask(leader, "/acquire", {"lock_name": "w", "client_id": "c0"})
    waiting = []
    for i in range(1, 4):
        body = {"lock_name": "w", "client_id": f"c{i}"}
        waiting.append(asyncio.create_task(cluster.ask(leader, "/acquire", body)))
        await until(lambda i=i: _queue_has(cluster, leader, "w", i))
    shown = (await cluster.ask(leader, "/locks/w")).json
    assert [w["client_id"] for w in shown["waiters"]] == ["c1", "c2", "c3"]
    assert [w["position"] for w in shown["waiters"]] == [1, 2, 3]
    edges = (await cluster.ask(leader, "/wait-graph")).json["edges"]
    assert {"waiter": "c1", "blocker": "c0", "lock_name": "w"} in edges
    tokens = [first.json["fencing_token"]]
    for i in range(3):
        assert not waiting[i].done()
        await cluster.ask(leader, "/release", {"lock_name": "w", "client_id": f"c{i}"})
        tokens.append((await waiting[i]).json["fencing_token"])
    assert tokens == sorted(set(tokens))
    timed_out = await cluster.ask(
        leader, "/acquire", {"lock_name": "w", "client_id": "c9", "wait_ms": 150}
    )
    assert (timed_out.status, timed_out.json["error"], timed_out.json["status"]) == (
        409,
        "Timed out waiting for lock",
        "timeout",
    )
    held = await cluster.ask(
        leader, "/acquire", {"lock_name": "w", "client_id": "c9", "wait_ms": 0}
    )
    assert (held.status, held.json["error"], held.json["status"]) == (409, "Lock is held", "held")
    assert held.json["holders"] == [
        {
            "client_id": "c3",
            "lock_type": "exclusive",
            "fencing_token": tokens[-1],
            "expires_in_ms": None,
        }
    ]
    await cluster.ask(leader, "/acquire", {"lock_name": "v", "client_id": "c9"})
    closing = asyncio.create_task(
        cluster.ask(leader, "/acquire", {"lock_name": "v", "client_id": "c3"})
    )
    await until(lambda: _queue_has(cluster, leader, "v", 1))
    deadlock = await cluster.ask(leader, "/acquire", {"lock_name": "w", "client_id": "c9"})
    assert deadlock.status == 409
    assert deadlock.json == {
        "error": "Deadlock detected",
        "status": "deadlock",
        "cycle": ["c9", "c3"],
    }
    for client in ("c9", "c3"):
        await cluster.ask(leader, "/release_all", {"client_id": client})
    assert (await closing).status == 200
    await cluster.ask(leader, "/release_all", {"client_id": "c3"})


async def _queue_has(cluster: LockCluster, leader: int, lock: str, count: int) -> bool:
    return len((await cluster.ask(leader, f"/locks/{lock}")).json["waiters"]) == count


async def _a_closed_connection_cancels_its_wait(cluster: LockCluster, leader: int) -> None:
    await cluster.ask(leader, "/acquire", {"lock_name": "x", "client_id": "ann"})
    async with cluster.client(leader) as gone:
        body = {"lock_name": "x", "client_id": "bob", "wait_ms": 60_000}
        waiting = asyncio.create_task(gone.post("/acquire", body, timeout_s=60))
        await until(lambda: _queue_has(cluster, leader, "x", 1))
    await until(lambda: _queue_has(cluster, leader, "x", 0))
    waiting.cancel()
    assert (await cluster.ask(leader, "/release_all", {"client_id": "ann"})).json["count"] == 1


async def _leases(cluster: LockCluster, leader: int) -> None:
    body = {"lock_name": "l", "client_id": "ann", "ttl_ms": 400, "request_id": "r1"}
    token = (await cluster.ask(leader, "/acquire", body)).json["fencing_token"]
    renewed = await cluster.ask(leader, "/keepalive", {"client_id": "ann"})
    assert renewed.json == {"status": "renewed", "locks": 1}
    valid = f"/validate?lock_name=l&fencing_token={token}"
    assert (await cluster.ask(leader, valid)).json == {"valid": True}
    after = {"lock_name": "l", "client_id": "bob"}
    assert (await cluster.ask(leader, "/acquire", after)).json["fencing_token"] > token
    assert (await cluster.ask(leader, valid)).json == {"valid": False}
    lost = await cluster.ask(leader, "/keepalive", {"client_id": "ann"})
    assert (lost.status, lost.json["error"], lost.json["lost"]) == (409, "Lease lost", ["l"])
    again = await cluster.ask(leader, "/acquire", body)
    assert (again.status, again.json["error"], again.json["status"]) == (409, "Lease lost", "lost")
    body["lock_name"] = "m"
    assert (await cluster.ask(leader, "/acquire", body)).status == 422


async def _reads(cluster: LockCluster, leader: int) -> None:
    several = {
        "client_id": "eve",
        "locks": [{"lock_name": "s1"}, {"lock_name": "s2", "lock_type": "shared"}],
    }
    grant = (await cluster.ask(leader, "/acquire", several)).json
    assert [one["lock_name"] for one in grant["locks"]] == ["s1", "s2"]
    permits = {"lock_name": "p", "client_id": "eve", "lock_type": "semaphore", "permits": 2}
    reply = await cluster.ask(leader, "/acquire", {**permits, "limit": 3})
    assert (reply.json["permits"], reply.json["limit"]) == (2, 3)
    assert (await cluster.ask(leader, "/acquire", {**permits, "limit": 4})).status == 409
    names = {row["lock_name"] for row in (await cluster.ask(leader, "/locks")).json["locks"]}
    assert {"s1", "s2", "p", "l"} <= names
    assert (await cluster.ask(leader, "/locks/unknown")).json == {
        "lock_name": "unknown",
        "holders": [],
        "waiters": [],
    }


async def _mistakes(cluster: LockCluster, leader: int) -> None:
    ok = {"lock_name": "a", "client_id": "c"}
    for change, field in (
        ({"lock_type": "exclusve"}, "lock_type"),
        ({"lock_type": "semaphore"}, "limit"),
        ({"lock_type": "semaphore", "permits": 3, "limit": 2}, "permits"),
        ({"permits": 1}, "permits"),
        ({"wait_ms": -1}, "wait_ms"),
        ({"ttl_ms": 0}, "ttl_ms"),
        ({"lock_name": ""}, "lock_name"),
        ({"lock_name": "ü" * 200}, "lock_name"),
        ({"locks": [{"lock_name": "b"}]}, "locks"),
        ({"request_id": ""}, "request_id"),
        ({"unknown": 1}, "unknown"),
    ):
        reply = await cluster.ask(leader, "/acquire", {**ok, **change})
        assert (reply.status, reply.json.get("field")) == (400, field), reply.text
    twice = {"client_id": "c", "locks": [{"lock_name": "b"}, {"lock_name": "b"}]}
    assert (await cluster.ask(leader, "/acquire", twice)).json["field"] == "locks"
    assert (await cluster.ask(leader, "/locks/a?consistency=no")).json["field"] == "consistency"
    assert (await cluster.ask(leader, "/validate?lock_name=a")).json["field"] == "fencing_token"


async def _operators(cluster: LockCluster, leader: int) -> None:
    freed = await cluster.ask(
        leader, "/admin/force_release", {"lock_name": "p", "reason": "holder is gone"}
    )
    assert freed.json == {"status": "released", "count": 1}
    assert "holder is gone" in cluster.nodes[leader].output()
    target = (leader + 1) % 3
    moved = await cluster.ask(leader, "/admin/transfer", {"target": f"node{target + 1}"})
    assert moved.json == {"status": "transferred", "leader_id": f"node{target + 1}"}
    assert await cluster.leader() == target
    code = await cluster.nodes[target].terminate()
    assert code == 0
    others = tuple(i for i in range(3) if i != target)
    assert await cluster.leader(others) in others
    reply = await cluster.ask(await cluster.leader(others), "/locks/l")
    assert isinstance(reply, Reply)
    assert [holder["client_id"] for holder in reply.json["holders"]] == ["bob"]
