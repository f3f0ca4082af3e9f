"""QueueClient against real nodes: leases kept and lost, nodes killed and stopped under it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from message_queue import client_link
from message_queue.client import (
    LeaseLost,
    Message,
    OutcomeUnknown,
    QueueClient,
    Refused,
    Unavailable,
)
from testkit.cluster import Cluster, Reply

from .nodes import leftovers, owner_of, queue_cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with queue_cluster(tmp_path_factory.mktemp("client")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def q(cluster: Cluster) -> AsyncIterator[QueueClient]:
    async with QueueClient(cluster.urls) as q:
        yield q


async def figures(cluster: Cluster, queue: str) -> dict[str, Any]:
    async with cluster.client(0) as client:
        reply = await client.get(f"/queues/{queue}")
    assert isinstance(reply, Reply)
    return reply.json


async def first(q: QueueClient, queue: str, **options: Any) -> Message:
    async with aclosing(q.consume(queue, **options)) as messages:
        async for message in messages:
            return message
    raise AssertionError("the subscription ended")


async def test_a_message_is_acked_at_the_end_of_its_body(cluster: Cluster, q: QueueClient) -> None:
    message_id = await q.produce("simple", {"n": 1}, headers={"trace": "abc"}, priority=3)
    message = await first(q, "simple")
    async with message:
        assert (message.id, message.body) == (message_id, {"n": 1})
        assert message.headers == {"trace": "abc"}
        assert (message.queue, message.attempt) == ("simple", 1)
    assert (await figures(cluster, "simple"))["in_flight"] == 0
    assert await leftovers(cluster, "simple") == set()


async def test_a_body_that_fails_gives_its_message_back(q: QueueClient) -> None:
    await q.produce("fails", "x")
    with pytest.raises(ZeroDivisionError):
        async with await first(q, "fails"):
            raise ZeroDivisionError
    async with await first(q, "fails") as again:
        assert again.attempt == 2


async def test_no_more_is_held_than_prefetched_and_the_rest_goes_back_unattempted(
    cluster: Cluster, q: QueueClient
) -> None:
    await q.produce_many("prefetch", range(30))
    async with aclosing(q.consume("prefetch", prefetch=4)) as messages:
        async for message in messages:
            assert (await figures(cluster, "prefetch"))["in_flight"] <= 4
            await message.ack()
            if message.body == 9:
                break

    async def all_back() -> bool:
        counts = await figures(cluster, "prefetch")
        return (counts["ready"], counts["in_flight"]) == (20, 0)

    await until("what was fetched ahead is ready again", all_back)
    async with await first(q, "prefetch", prefetch=1) as message:
        assert (message.body, message.attempt) == (10, 1)


async def test_long_work_keeps_its_lease(cluster: Cluster, q: QueueClient) -> None:
    await q.produce("long", "x")
    async with await first(q, "long", visibility_ms=600) as message:
        for _ in range(6):
            await asyncio.sleep(0.3)
            assert (await figures(cluster, "long"))["in_flight"] == 1
        assert not message.lost
    assert (await figures(cluster, "long"))["ready"] == 0


async def test_who_lost_the_lease_is_told(cluster: Cluster, q: QueueClient) -> None:
    await q.produce("lost", "x")
    message = await first(q, "lost")

    async def work() -> None:
        async with message, cluster.client(1) as other:
            await other.post("/nack", {"message_id": message.id})  # an operator meddles
            taken = await other.get("/consume?queue=lost")
            assert isinstance(taken, Reply)
            assert taken.json["id"] == message.id

    with pytest.raises(LeaseLost):
        await work()
    assert message.lost
    assert (await figures(cluster, "lost"))["in_flight"] == 1  # the other one's, untouched


async def test_calls_side_by_side_share_frames(q: QueueClient) -> None:
    await q.produce("frames", "first")
    before = q.frames
    ids = await asyncio.gather(*(q.produce("frames", n) for n in range(100)))
    assert len(set(ids)) == 100
    assert q.frames - before <= 10


async def test_a_lone_call_waits_for_no_company(
    q: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "LINGER_S", 600.0)
    async with asyncio.timeout(60):
        for n in range(3):
            await q.produce("lone", n)


async def test_who_was_answered_together_waits_for_no_company(
    q: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them to go on finds the others answered, though they have not gone on yet."""
    await q.produce("rounds", 0)
    monkeypatch.setattr(client_link, "LINGER_S", 600.0)

    async def worker(number: int) -> None:
        for n in range(5):
            await q.produce("rounds", [number, n])

    async with asyncio.timeout(20):
        await asyncio.gather(*(worker(number) for number in range(8)))


async def test_what_is_refused_says_why(q: QueueClient) -> None:
    with pytest.raises(Refused) as refused:
        await q.produce("q" * 300, 1)
    assert refused.value.status == 400
    with pytest.raises(Refused) as refused:
        await q.produce("big", "x" * (2 << 20))
    assert refused.value.status == 413
    assert await q.produce("big", "small")
    with pytest.raises(Refused):
        await first(q, "q" * 300)


async def test_without_any_node_nothing_was_done() -> None:
    async with QueueClient("127.0.0.1:1", timeout_s=0.3) as q:
        with pytest.raises(Unavailable):
            await q.produce("nowhere", 1)


async def test_nodes_die_and_come_back_and_everything_is_stored_once_and_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link.random, "shuffle", lambda _: None)  # the first url first
    async with queue_cluster(tmp_path) as cluster, QueueClient(cluster.urls) as q:
        async with cluster.client(0) as admin:  # however often a slow machine loses a lease
            reply = await admin.request("PUT", "/queues/jobs", body=b'{"max_deliveries":null}')
            assert isinstance(reply, Reply)
            assert reply.status == 200
        numbers = itertools.count()
        produced: dict[int, str] = {}
        seen: dict[int, set[str]] = {}
        stop = asyncio.Event()

        async def producer() -> None:
            while not stop.is_set():
                n = next(numbers)
                produced[n] = await q.produce("jobs", n)
                await asyncio.sleep(0.02)  # no more than a slow machine can eat

        async def work_on(message: Message) -> None:
            with suppress(LeaseLost):
                async with message:
                    seen.setdefault(message.body, set()).add(message.id)

        async def consumer() -> None:
            async with asyncio.TaskGroup() as group:
                async for message in q.consume("jobs", prefetch=20, visibility_ms=1500):
                    group.create_task(work_on(message))

        async def fifty_more(what: str) -> None:
            enough = len(produced) + 50

            async def grown() -> bool:
                return len(produced) >= enough

            await until(what, grown)

        work = [asyncio.create_task(producer()) for _ in range(6)]
        eating = asyncio.create_task(consumer())
        await fifty_more("it begins")
        for round_ in range(2):
            victim = 0 if round_ == 0 else await owner_of(cluster, "jobs", ask=0)
            if round_ == 0:
                cluster.kill(victim)  # the one that the client talks to
            else:
                assert await cluster.nodes[victim].terminate() == 0
            await fifty_more("it goes on without")
            cluster.start(victim)
            await cluster.ready(victim)
            await fifty_more("it goes on with")
        stop.set()
        await asyncio.gather(*work)

        async def all_seen() -> bool:
            return seen.keys() >= produced.keys()

        await until("all are consumed", all_seen)
        eating.cancel()
        await asyncio.gather(eating, return_exceptions=True)
        stored = Counter({n: len(ids) for n, ids in seen.items()})
        assert stored.most_common(1)[0][1] == 1, "a retried produce was stored twice"
        assert all(seen[n] == {message_id} for n, message_id in produced.items())
        assert q.connections >= 2


async def test_a_produce_that_may_not_be_repeated_is_of_unknown_outcome(tmp_path: Path) -> None:
    async with queue_cluster(tmp_path) as cluster, QueueClient(cluster.urls[:1]) as q:
        await q.produce("once", 0)
        for index in range(3):
            cluster.pause(index)
        asked = asyncio.create_task(q.produce("once", 1, once=False))
        await until("it is sent", lambda: sent(q))
        cluster.kill(0)
        with pytest.raises(OutcomeUnknown):
            await asked
        for index in (1, 2):
            cluster.resume(index)


async def sent(q: QueueClient) -> bool:
    return q.frames >= 2
