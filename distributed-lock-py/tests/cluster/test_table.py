"""Each row of the HTTP table on a real cluster, what the walkthrough does not show: conversions,
semaphores and several locks in deadlocks, retries, operators, the stream of events, wrong input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from testkit.cluster import Reply

from .lock_cluster import LockCluster, make_cluster, until

pytestmark = pytest.mark.cluster


class Talk:
    """Short words for requests to the leader."""

    def __init__(self, cluster: LockCluster, leader: int) -> None:
        self.cluster = cluster
        self.leader = leader

    async def post(self, path: str, **body: Any) -> Reply:
        return await self.cluster.ask(self.leader, path, body)

    async def get(self, path: str) -> Any:
        reply = await self.cluster.ask(self.leader, path)
        assert reply.status == 200, reply
        return reply.json

    async def acquire(self, client: str, *locks: str, **more: Any) -> Reply:
        """`a` exclusive, `a:s` shared, `a:2/3` two of three permits; several: all or none."""
        asks = [self._ask(lock) for lock in locks]
        body = asks[0] if len(asks) == 1 else {"locks": asks}
        return await self.post("/acquire", client_id=client, **body, **more)

    @staticmethod
    def _ask(text: str) -> dict[str, Any]:
        name, _, kind = text.partition(":")
        if kind == "s":
            return {"lock_name": name, "lock_type": "shared"}
        if not kind:
            return {"lock_name": name}
        permits, _, limit = kind.partition("/")
        semaphore = {"permits": int(permits), "limit": int(limit)}
        return {"lock_name": name, "lock_type": "semaphore", **semaphore}

    async def token(self, client: str, *locks: str, **more: Any) -> int:
        reply = await self.acquire(client, *locks, **more)
        assert reply.status == 200, reply
        return int(reply.json["fencing_token"])

    async def refused(self, status: int, error: str, reply: Reply) -> Any:
        assert (reply.status, reply.json["error"]) == (status, error), reply
        return reply.json

    async def waits(self, client: str, *locks: str, **more: Any) -> asyncio.Task[Reply]:
        """An acquire that stands in its queues by the time this returns."""
        task = asyncio.create_task(self.acquire(client, *locks, **more))
        await until(lambda: self._stands(client, locks))
        return task

    async def _stands(self, client: str, locks: tuple[str, ...]) -> bool:
        names = [lock.partition(":")[0] for lock in locks]
        shown = [await self.get(f"/locks/{name}") for name in names]
        return all(client in [w["client_id"] for w in one["waiters"]] for one in shown)

    async def free(self, *clients: str) -> None:
        for client in clients:
            assert (await self.post("/release_all", client_id=client)).status == 200


@asynccontextmanager
async def talking(tmp_path: Any, *more: str) -> AsyncIterator[Talk]:
    async with make_cluster(tmp_path, more=more) as cluster:
        yield Talk(cluster, await cluster.leader())


async def test_deadlocks_conversions_retries_and_operators(tmp_path) -> None:
    async with talking(tmp_path) as talk:
        await _deadlocks(talk)
        await _conversions(talk)
        await _retries(talk)
        await _fencing(talk)
        await _keepalive(talk)
        await _followers(talk)
        await _wrong_input(talk)
        await _operators(talk)


async def _deadlocks(talk: Talk) -> None:
    # Over a semaphore: nobody can go on, though permits are free.
    await talk.token("ann", "s:2/3")
    await talk.token("bob", "x")
    first = await talk.waits("ann", "x")
    cycle = await talk.refused(409, "Deadlock detected", await talk.acquire("bob", "s:2/3"))
    assert (cycle["status"], cycle["cycle"]) == ("deadlock", ["bob", "ann"])
    # With one permit it is none.
    await talk.token("bob", "s:1/3")
    await talk.free("bob")
    assert (await first).status == 200
    await talk.free("ann", "bob")
    # Over several locks at once, with a third client in between.
    await talk.token("ann", "a")
    await talk.token("bob", "b")
    await talk.token("cyd", "c")
    both = await talk.waits("ann", "b", "d")
    one = await talk.waits("bob", "c")
    cycle = await talk.refused(409, "Deadlock detected", await talk.acquire("cyd", "a", "d"))
    assert cycle["cycle"] in (["cyd", "ann", "bob"], ["cyd", "bob", "ann"])
    edges = (await talk.get("/wait-graph"))["edges"]
    assert {"waiter": "ann", "blocker": "bob", "lock_name": "b"} in edges
    assert {"waiter": "bob", "blocker": "cyd", "lock_name": "c"} in edges
    await talk.free("cyd")
    assert (await one).status == 200
    await talk.free("bob")
    granted = (await both).json
    assert [lock["lock_name"] for lock in granted["locks"]] == ["b", "d"]
    assert (await talk.get("/wait-graph")) == {"edges": []}
    await talk.free("ann", "bob")


async def _conversions(talk: Talk) -> None:
    shared = await talk.token("ann", "a:s")
    assert await talk.token("ann", "a:s") == shared
    assert await talk.token("bob", "a:s") > shared
    behind = await talk.waits("eve", "a")
    upgrade = await talk.waits("ann", "a")  # before eve, who only waits
    positions = [w["client_id"] for w in (await talk.get("/locks/a"))["waiters"]]
    assert positions == ["ann", "eve"]
    second = await talk.acquire("bob", "a")
    assert (await talk.refused(409, "Deadlock detected", second))["cycle"] == ["bob", "ann"]
    await talk.free("bob")
    upgraded = (await upgrade).json
    assert upgraded["lock_type"] == "exclusive"
    assert upgraded["fencing_token"] > shared
    assert not behind.done()
    down = (await talk.acquire("ann", "a:s")).json
    assert (down["lock_type"], down["fencing_token"]) == ("shared", upgraded["fencing_token"])
    # A downgrade lets sharers in at once, but none past eve.
    assert (await talk.acquire("bob", "a:s", wait_ms=0)).json["status"] == "held"
    await talk.free("ann")
    assert (await behind).status == 200
    kind = await talk.acquire("bob", "a:1/2")
    await talk.refused(409, "Lock is in use as another kind", kind)
    await talk.free("eve")


async def _retries(talk: Talk) -> None:
    first = await talk.acquire("ann", "r", request_id="1")
    assert (await talk.acquire("ann", "r", request_id="1")).json == first.json
    await talk.refused(
        422, "Request id reused with another body", await talk.acquire("ann", "q", request_id="1")
    )
    other = await talk.post("/release", lock_name="r", client_id="ann", request_id="1")
    await talk.refused(422, "Request id reused with another body", other)
    # An id is the client's own.
    failed = await talk.acquire("bob", "r", request_id="1", wait_ms=0)
    assert failed.json["status"] == "held"
    release = {"lock_name": "r", "client_id": "ann", "request_id": "2"}
    released = await talk.post("/release", **release)
    assert released.json == {"status": "released", "lock_name": "r", "client_id": "ann"}
    again = await talk.acquire("bob", "r", request_id="1", wait_ms=0)
    assert again.json["status"] == "held", "a try that failed stays a failure"
    await talk.token("bob", "r")
    assert (await talk.post("/release", **release)).json == released.json
    assert [h["client_id"] for h in (await talk.get("/locks/r"))["holders"]] == ["bob"]
    lost = await talk.refused(409, "Lease lost", await talk.acquire("ann", "r", request_id="1"))
    assert (lost["status"], lost["lost"]) == ("lost", ["r"])
    # Two requests of one client for one lock are one wait, and both are answered.
    two = [await talk.waits("ann", "r", request_id=f"w{i}") for i in range(2)]
    assert len((await talk.get("/locks/r"))["waiters"]) == 1
    await talk.refused(
        409, "Already waiting for lock in another way", await talk.acquire("ann", "r:s")
    )
    await talk.free("bob")
    answers = [(await one).json["fencing_token"] for one in two]
    assert answers[0] == answers[1]
    await talk.free("ann")


async def _fencing(talk: Talk) -> None:
    old = await talk.token("ann", "f")
    await talk.post("/release", lock_name="f", client_id="ann")
    new = await talk.token("ann", "f")
    stale = await talk.post("/release", lock_name="f", client_id="ann", fencing_token=old)
    await talk.refused(409, "Lock not held", stale)
    for token, valid in ((old, False), (new, True), (new + 1_000, False)):
        path = f"/validate?lock_name=f&fencing_token={token}"
        assert (await talk.get(path)) == {"valid": valid}
    right = await talk.post("/release", lock_name="f", client_id="ann", fencing_token=new)
    assert right.status == 200


async def _keepalive(talk: Talk) -> None:
    assert (await talk.post("/keepalive", client_id="nobody")).json == {
        "status": "renewed",
        "locks": 0,
    }
    await talk.token("ann", "k1", ttl_ms=60_000)
    await talk.token("ann", "k2")
    longer = await talk.post("/keepalive", client_id="ann", ttl_ms=120_000)
    assert longer.json == {"status": "renewed", "locks": 1}  # k2 has no lease, and gets none
    (lease,) = (await talk.get("/locks/k1"))["holders"]
    assert 100_000 < lease["expires_in_ms"] <= 120_000
    (held,) = (await talk.get("/locks/k2"))["holders"]
    assert held["expires_in_ms"] is None
    freed = await talk.post("/admin/force_release", lock_name="k1", reason="test", client_id="ann")
    assert freed.json == {"status": "released", "count": 1}
    lost = await talk.refused(409, "Lease lost", await talk.post("/keepalive", client_id="ann"))
    assert lost["lost"] == ["k1"]
    await talk.token("ann", "k3")  # whoever acquires again knows
    assert (await talk.post("/keepalive", client_id="ann")).status == 200
    assert (await talk.post("/release_all", client_id="ann")).json == {
        "status": "released",
        "count": 2,
    }


async def _followers(talk: Talk) -> None:
    follower = Talk(talk.cluster, (talk.leader + 1) % 3)
    leader = talk.cluster.url(talk.leader)
    for path in ("/locks", "/locks/a", "/wait-graph", "/validate?lock_name=a&fencing_token=1"):
        reply = await talk.cluster.ask(follower.leader, path)
        assert reply.status == 307, path
        assert reply.headers["location"] == leader + path
        assert reply.json["leader"] == leader
    for path in ("/locks", "/locks/a", "/wait-graph"):
        await follower.get(path + "?consistency=stale")
    for path, body in (
        ("/release", {"lock_name": "a", "client_id": "c"}),
        ("/release_all", {"client_id": "c"}),
        ("/keepalive", {"client_id": "c"}),
        ("/admin/force_release", {"lock_name": "a", "reason": "test"}),
        ("/admin/transfer", {}),
        ("/admin/members", {"action": "remove", "id": "node9"}),
    ):
        reply = await follower.post(path, **body)
        assert (reply.status, reply.json["error"]) == (307, "Not the leader"), path
        assert reply.headers["location"] == leader + path


async def _wrong_input(talk: Talk) -> None:
    name = {"lock_name": "a", "client_id": "c"}
    members = {"action": "add", "id": "node9", "raft_addr": "127.0.0.1:1"}
    for path, body, field in (
        ("/release", {"lock_name": "a"}, "client_id"),
        ("/release", {**name, "fencing_token": 0}, "fencing_token"),
        ("/release", {**name, "fencing_token": "7"}, "fencing_token"),
        ("/release", {**name, "token": 7}, "token"),
        ("/release_all", {}, "client_id"),
        ("/release_all", {"client_id": 5}, "client_id"),
        ("/keepalive", {"client_id": "c", "ttl_ms": -1}, "ttl_ms"),
        ("/keepalive", {"client_id": "c", "ttl_ms": 1.5}, "ttl_ms"),
        ("/acquire", {**name, "wait_ms": True}, "wait_ms"),
        ("/acquire", {**name, "lock_type": "Exclusive"}, "lock_type"),
        ("/acquire", {"client_id": "c", "locks": []}, "locks"),
        ("/acquire", {"client_id": "c", "locks": [{"lock_type": "shared"}]}, "locks[0].lock_name"),
        ("/acquire", {"client_id": "c"}, "lock_name"),
        ("/acquire", {**name, "client_id": "a\0b"}, "client_id"),
        ("/admin/force_release", {"lock_name": "a"}, "reason"),
        ("/admin/transfer", {"target": 3}, "target"),
        ("/admin/members", {"action": "replace", "id": "node1"}, "action"),
        ("/admin/members", members, "http_addr"),
    ):
        reply = await talk.post(path, **body)
        assert (reply.status, reply.json.get("field")) == (400, field), (path, body, reply.text)
    for path, field in (
        ("/locks?most=0", "most"),
        ("/locks?consistency=linearizable&most=x", "most"),
        ("/wait-graph?consistency=", "consistency"),
        ("/validate?lock_name=a&fencing_token=x", "fencing_token"),
        ("/validate?fencing_token=1", "lock_name"),
        ("/locks/a?limit=3", "limit"),
    ):
        reply = await talk.cluster.ask(talk.leader, path)
        assert (reply.status, reply.json.get("field")) == (400, field), (path, reply.text)


async def _operators(talk: Talk) -> None:
    for client in ("ann", "bob"):
        await talk.token(client, "o:s")
    waiting = await talk.waits("cyd", "o")
    all_freed = await talk.post("/admin/force_release", lock_name="o", reason="both are gone")
    assert all_freed.json == {"status": "released", "count": 2}
    assert (await waiting).status == 200
    nothing = await talk.post("/admin/force_release", lock_name="o", reason="x", client_id="ann")
    assert nothing.json == {"status": "released", "count": 0}
    await talk.refused(
        409, "Not a member", await talk.post("/admin/members", action="remove", id="node9")
    )
    addresses = {"raft_addr": "127.0.0.1:1", "http_addr": "127.0.0.1:2"}
    await talk.refused(
        409,
        "Already a member",
        await talk.post("/admin/members", action="add", id="node1", **addresses),
    )
    for target in (f"node{talk.leader + 1}", "node9"):
        reply = await talk.post("/admin/transfer", target=target)
        await talk.refused(409, "No such voter to hand leadership to", reply)


async def test_events_tell_of_grants_waits_releases_expiries_and_deadlocks_after_a_delay(
    tmp_path,
) -> None:
    async with talking(tmp_path, "--lock_delay_ms=700") as talk:
        seen: list[tuple[str, dict[str, Any]]] = []
        listening = asyncio.create_task(_listen(talk.cluster.url(talk.leader), seen))
        try:
            await until(lambda: _heard(talk, seen))
            await talk.token("ann", "e", ttl_ms=150)
            behind = await talk.waits("bob", "e")
            await until(lambda: any(kind == "expired" for kind, _ in seen))
            # The lease is over, and the lock stays free for a while: for a try as for a waiter.
            free = await talk.acquire("cyd", "e", wait_ms=0)
            assert (free.json["status"], free.json["holders"]) == ("held", [])
            assert (await behind).status == 200
            await talk.token("ann", "g")
            closing = await talk.waits("bob", "g")
            await talk.refused(409, "Deadlock detected", await talk.acquire("ann", "e"))
            await talk.post("/release", lock_name="g", client_id="ann")
            assert (await closing).status == 200
            await until(lambda: seen and seen[-1][0] == "granted")
        finally:
            listening.cancel()
        told = [kind for kind, _ in seen if kind != "granted" or _["lock_name"] in "eg"]
        assert told[1:] == [
            "granted",
            "waiting",
            "expired",
            "granted",
            "granted",
            "waiting",
            "deadlock",
            "released",
            "granted",
        ]
        expired = next(fields for kind, fields in seen if kind == "expired")
        assert (expired["client_id"], expired["reason"]) == ("ann", "lease")
        deadlock = next(fields for kind, fields in seen if kind == "deadlock")
        assert deadlock["cycle"] == ["ann", "bob"]


async def _heard(talk: Talk, seen: list[Any]) -> bool:
    """Whether the stream is open: what happens now is told."""
    await talk.free("nobody")
    return bool(seen)


async def _listen(url: str, seen: list[tuple[str, dict[str, Any]]]) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET /events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        kind = ""
        while line := (await reader.readline()).decode():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ").strip()
            elif line.startswith("data: ") and (kind != "released_many" or not seen):
                seen.append((kind, json.loads(line.removeprefix("data: "))))
    finally:
        writer.close()
