"""What is deep in line, many letters, and what a start makes of it: real nodes, little memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from testkit.cluster import HttpClient, Reply

from .nodes import owner_of, queue_cluster, until

pytestmark = pytest.mark.cluster


async def ask(client: HttpClient, method: str, path: str, body: object = None) -> Reply:
    """An answer that says something for certain; tried again while a partition changes hands."""
    give_up = time.monotonic() + 20
    while True:
        reply = await (client.get(path) if method == "GET" else client.post(path, body))
        if isinstance(reply, Reply) and reply.status not in (503, 429):
            return reply
        assert time.monotonic() < give_up, reply
        await asyncio.sleep(0.05)


async def fill(client: HttpClient, queue: str, count: int, size: int = 10) -> None:
    for start in range(0, count, 500):
        bodies = [{"body": f"{n}/" + "x" * size} for n in range(start, min(start + 500, count))]
        reply = await ask(client, "POST", "/produce", {"queue": queue, "messages": bodies})
        assert reply.status == 201, reply


def number_of(message: dict[str, str]) -> int:
    return int(message["body"].partition("/")[0])


async def test_messages_beyond_the_memory_keep_their_order_through_a_power_cut(
    tmp_path: Path,
) -> None:
    """One megabyte of memory, five of messages, with headers, a purge and an early ack among
    them; the next life begins with a snapshot."""
    flags = ("--memory_bytes=1000000", "--segment_bytes=1000000")
    async with queue_cluster(tmp_path, flags=flags) as cluster:
        async with cluster.client(0) as client:
            first = {"queue": "deep", "body": "0/", "headers": {"k": "v"}}
            assert (await ask(client, "POST", "/produce", first)).status == 201
            for start in range(1, 2501, 500):
                messages = [{"body": f"{n}/" + "x" * 2000, "headers": {"n": n}}
                            for n in range(start, start + 500)]  # fmt: skip
                made = await ask(
                    client, "POST", "/produce", {"queue": "deep", "messages": messages}
                )
                assert made.status == 201, made
            # One from the depth is acked by name, another made to wait, without being delivered.
            ids = made.json["ids"]
            assert (await ask(client, "POST", "/ack", {"message_id": ids[0]})).status == 200
            late = {"message_id": ids[1], "delay_ms": 3_600_000}
            assert (await ask(client, "POST", "/nack", late)).status == 200
            status = (await ask(client, "GET", "/queues/deep")).json
            assert (status["ready"], status["delayed"]) == (2499, 1)
            assert status["oldest_age_ms"] is not None
        cluster.power_cut()
        await cluster.start_all()
        seen: list[int] = []
        async with cluster.client(1) as client:
            while len(seen) < 2500:
                reply = await ask(client, "GET", "/consume?queue=deep&max=500&wait_ms=5000")
                assert reply.status == 200
                got = reply.json["messages"]
                assert all(m["headers"] == {"n": number_of(m)} for m in got if number_of(m))
                seen += [number_of(m) for m in got]
                ids = [m["id"] for m in got]
                assert (await ask(client, "POST", "/ack", {"message_ids": ids})).status == 200
        # A delay that nobody stored ends with the power; the ack does not.
        assert seen == [n for n in range(2501) if n != 2001]


async def test_a_redrive_of_thousands_goes_on_under_the_next_owner_without_a_duplicate(
    tmp_path: Path,
) -> None:
    count = 3000
    async with queue_cluster(tmp_path) as cluster, cluster.client(0) as client:
        settings = {"max_deliveries": 1, "visibility_ms": 0}
        reply = await client.request("PUT", "/queues/sick", body=msgspec.json.encode(settings))
        assert isinstance(reply, Reply)
        assert reply.status == 200
        await fill(client, "sick", count)
        for _ in range(count // 1000):
            await ask(client, "GET", "/consume?queue=sick&max=1000")

        async def all_dead() -> bool:
            return (await ask(client, "GET", "/queues/sick")).json["dead"] == count  # type: ignore[no-any-return]

        await until("all are dead letters", all_dead)
        peek = (await ask(client, "GET", "/queues/sick.dead/peek?max=1")).json["messages"][0]
        assert (peek["source"], peek["reason"]) == ("sick", "max_deliveries")
        settings = {"max_deliveries": 5, "visibility_ms": 600_000}
        await client.request("PUT", "/queues/sick", body=msgspec.json.encode(settings))
        owner = await owner_of(cluster, "sick.dead")
        async with cluster.client((owner + 1) % 3) as other:
            third = cluster.client((owner + 2) % 3)
            running = asyncio.create_task(third.post("/queues/sick/redrive", {}))

            async def some_are_back() -> bool:
                return (await ask(other, "GET", "/queues/sick")).json["ready"] > 0  # type: ignore[no-any-return]

            await until("the first letters are back", some_are_back)
            cluster.nodes[owner].kill()
            await running
            third.close()
            await until("all are back", lambda: _is_back(other, count))
            seen: list[int] = []
            while len(seen) < count:
                reply = await ask(other, "GET", "/consume?queue=sick&max=1000&wait_ms=5000")
                assert reply.status == 200, f"{len(seen)} of {count}"
                seen += [number_of(m) for m in reply.json["messages"]]
            assert sorted(seen) == list(range(count))
            # It is over: the next one finds nothing, and is not refused.
            again = await ask(other, "POST", "/queues/sick/redrive", {})
            assert (again.status, again.json["messages"]) == (200, 0)


async def _is_back(client: HttpClient, count: int) -> bool:
    figures = (await ask(client, "GET", "/queues/sick")).json
    return bool(figures["dead"] == 0 and figures["ready"] >= count)
