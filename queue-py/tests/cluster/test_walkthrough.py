"""The seed's walkthrough and the HTTP table, on three real nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from testkit.cluster import Cluster, Reply

from .http_calls import get, post, produce, put, somebody_waits
from .nodes import owner_of, queue_cluster, until
from .pipelining import Pipeline, get_request, post_request

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    cluster = queue_cluster(tmp_path_factory.mktemp("walkthrough"))
    cluster.prepare()
    try:
        cluster.start(0)
        cluster.start(1)
        await until("two founders name the third", lambda: _waits_for_the_third(cluster))
        await cluster.start_all()
        yield cluster
    finally:
        cluster.close()


async def _waits_for_the_third(cluster: Cluster) -> bool:
    async with cluster.client(0) as client:
        reply = await client.get("/readyz")
    if not isinstance(reply, Reply):
        return False  # it does not listen yet
    third = f"a new cluster waits for {cluster.views[2].bind()}"
    return reply.status == 503 and str(reply.json["reason"]).endswith(third)


@pytest.mark.parametrize("shift", [0, 1, 2])
async def test_the_seeds_walkthrough_works_through_any_nodes(cluster: Cluster, shift: int) -> None:
    nodes = [cluster.client((shift + n) % 3) for n in range(3)]
    queue = f"nama-antrean-{shift}"
    reply = await post(nodes[0], "/produce", {"queue": queue, "body": "isi pesan baru"})
    assert reply.status == 201
    assert reply.json == {"id": reply.json["id"], "queue": queue, "status": "created"}
    got = await get(nodes[1], f"/consume?queue={queue}")
    assert got.status == 200
    message = got.json
    assert message["id"] == reply.json["id"]
    assert message["body"] == "isi pesan baru"
    assert message["attempt"] == 1
    ack = await post(nodes[2], "/ack", {"message_id": message["id"]})
    assert (ack.status, ack.json) == (200, {"status": "acknowledged"})
    again = await post(nodes[0], "/ack", {"message_id": message["id"]})
    assert (again.status, again.json) == (200, {"status": "acknowledged"})
    assert (await get(nodes[0], f"/consume?queue={queue}")).status == 204
    for node in nodes:
        node.close()


async def test_only_the_owner_answers_without_forwarding(cluster: Cluster) -> None:
    owner = await owner_of(cluster, "stay")
    for index in range(3):
        async with cluster.client(index) as client:
            reply = await post(client, "/produce?forward=false", {"queue": "stay", "body": 1})
            if index == owner:
                assert reply.status == 201
            else:
                assert reply.status == 421
                expected = {"error": "Wrong node", "owner": cluster.views[owner].bind()}
                assert reply.json == expected


async def test_bodies_come_back_byte_for_byte_and_headers_with_them(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        body = {"nested": [1, 2.5, None, True, "æ\u2028\U0001f600"], "n": 12345678901234567}
        await produce(client, "bodies", body, headers={"kind": "test"})
        message = (await get(client, "/consume?queue=bodies")).json
        assert message["body"] == body
        assert message["headers"] == {"kind": "test"}


async def test_a_batch_is_stored_in_order_and_settled_in_one_request(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        messages = [{"body": n} for n in range(50)]
        reply = await post(client, "/produce", {"queue": "batch", "messages": messages})
        assert reply.status == 201
        ids = reply.json["ids"]
        got = (await get(client, "/consume?queue=batch&max=1000")).json["messages"]
        assert [m["body"] for m in got] == list(range(50))
        assert [m["id"] for m in got] == ids
        other = await produce(client, "other-partition", 1)
        reply = await post(client, "/ack", {"message_ids": [*ids, other, "made-up"]})
        results = reply.json["results"]
        assert [r["message_id"] for r in results] == [*ids, other, "made-up"]
        assert [r["status"] for r in results] == ["acknowledged"] * 51 + ["not found"]


async def test_an_overtaken_receipt_settles_nothing(cluster: Cluster) -> None:
    async with cluster.client(1) as client:
        await produce(client, "receipts", "x")
        first = (await get(client, "/consume?queue=receipts&visibility_ms=50")).json
        second = (await get(client, "/consume?queue=receipts&wait_ms=10000")).json
        assert second["id"] == first["id"]
        assert second["attempt"] == 2
        old = {"message_id": first["id"], "receipt": first["receipt"]}
        for path, more in (("/ack", {}), ("/nack", {}), ("/extend", {"visibility_ms": 1000})):
            assert (await post(client, path, {**old, **more})).status == 409
        new = {"message_id": second["id"], "receipt": second["receipt"]}
        assert (await post(client, "/ack", new)).status == 200
        assert (await post(client, "/ack", old)).status == 200


async def test_an_id_that_was_never_issued_is_not_found(cluster: Cluster) -> None:
    async with cluster.client(1) as client:
        name = await produce(client, "never", "x")
        changed = name[:-1] + ("0" if name[-1] != "0" else "1")
        for path, more in (("/ack", {}), ("/nack", {}), ("/extend", {"visibility_ms": 1000})):
            reply = await post(client, path, {"message_id": changed, **more})
            assert reply.status == 404, path


async def test_a_long_poll_is_woken_by_produce_delay_and_lease_end(cluster: Cluster) -> None:
    async with cluster.client(0) as waiting, cluster.client(2) as client:
        await put(client, "/queues/poll", {"visibility_ms": 30_000})
        for fields in ({}, {"delay_ms": 300}):
            poll = asyncio.create_task(get(waiting, "/consume?queue=poll&wait_ms=15000"))
            await until("somebody waits", lambda: somebody_waits(client, "poll"))
            await produce(client, "poll", "x", **fields)
            assert (await poll).status == 200
            first = (await poll).json
            nack = {"message_id": first["id"], "receipt": first["receipt"], "delay_ms": 200}
            poll = asyncio.create_task(get(waiting, "/consume?queue=poll&wait_ms=15000"))
            await until("somebody waits", lambda: somebody_waits(client, "poll"))
            assert (await post(client, "/nack", nack)).status == 200
            second = (await poll).json
            assert second["id"] == first["id"]
            assert (await post(client, "/ack", {"message_id": second["id"]})).status == 200
        assert (await get(waiting, "/consume?queue=poll&wait_ms=50")).status == 204


async def test_a_consumer_that_hung_up_has_leased_nothing(cluster: Cluster) -> None:
    owner = await owner_of(cluster, "hang-up")
    for index in (owner, (owner + 1) % 3):
        async with cluster.client(owner) as client:
            await put(client, "/queues/hang-up", {"visibility_ms": 30_000})
            gone = cluster.client(index)
            poll = asyncio.create_task(gone.get("/consume?queue=hang-up&wait_ms=15000"))
            await until("it waits", lambda: somebody_waits(client, "hang-up"))
            gone.close()
            poll.cancel()
            name = await produce(client, "hang-up", "x")
            got = (await get(client, "/consume?queue=hang-up&wait_ms=10000")).json
            assert got["id"] == name
            # Whatever the message did on its way, it was no attempt.
            assert got["attempt"] == 1
            await post(client, "/ack", {"message_id": name})


async def test_pipelined_requests_are_answered_in_their_order_by_any_node(
    cluster: Cluster,
) -> None:
    for index in range(3):
        queue = f"pipelined-{index}"
        sent = [post_request("/produce", {"queue": queue, "body": n}) for n in range(12)]
        fetch = get_request(f"/consume?queue={queue}&max=1000")
        client = await Pipeline.open(cluster, index)
        client.write([*sent, fetch, get_request("/status"), sent[0], fetch])
        answers = [await client.read() for _ in range(16)]
        assert [status for status, _ in answers] == [201] * 12 + [200, 200, 201, 200]
        names = [json.loads(body)["id"] for _, body in answers[:12] + answers[14:15]]
        # What was asked behind them sees all that is stored by then.
        taken = [[m["id"] for m in json.loads(answers[n][1])["messages"]] for n in (12, 15)]
        assert taken == [names[:12], names[12:]]
        settle = {"message_ids": names, "next": {"queue": queue}}
        client.write([post_request("/ack", settle), fetch])
        assert [(await client.read())[0] for _ in range(2)] == [204, 204]
        await client.close()


async def test_who_hung_up_with_more_behind_a_poll_has_leased_nothing(cluster: Cluster) -> None:
    owner = await owner_of(cluster, "hang-up-behind")
    poll = "/consume?queue=hang-up-behind&wait_ms=15000"
    async with cluster.client(owner) as client:
        await put(client, "/queues/hang-up-behind", {"visibility_ms": 30_000})
        for index in (owner, (owner + 1) % 3):
            gone = await Pipeline.open(cluster, index)
            gone.write([get_request(poll)] * 5)
            await until("it waits", lambda: somebody_waits(client, "hang-up-behind"))
            await gone.close()
            name = await produce(client, "hang-up-behind", "x")
            got = (await get(client, "/consume?queue=hang-up-behind&wait_ms=10000")).json
            assert (got["id"], got["attempt"]) == (name, 1)
            await post(client, "/ack", {"message_id": name})


async def test_dedupe_answers_with_the_first_id(cluster: Cluster) -> None:
    async with cluster.client(0) as one, cluster.client(1) as two:
        sent = [
            post(client, "/produce", {"queue": "once", "body": 1, "dedupe_id": "d"})
            for client in (one, two)
        ]
        replies = await asyncio.gather(*sent)
        assert sorted(r.status for r in replies) == [200, 201]
        assert replies[0].json["id"] == replies[1].json["id"]
        [repeated] = [r for r in replies if r.status == 200]
        assert repeated.json["duplicate"] is True
        await post(one, "/ack", {"message_id": repeated.json["id"]})
        late = await post(one, "/produce", {"queue": "once", "body": 1, "dedupe_id": "d"})
        assert late.status == 200
        assert (await get(one, "/consume?queue=once")).status == 204


async def test_an_exhausted_message_goes_to_the_dead_letter_queue(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        settings = {"max_deliveries": 2, "visibility_ms": 50}
        assert (await put(client, "/queues/poison", settings)).status == 200
        name = await produce(client, "poison", {"bad": True}, headers={"h": "v"})
        for _ in range(2):
            assert (await get(client, "/consume?queue=poison&wait_ms=10000")).status == 200
        dead = (await get(client, "/consume?queue=poison.dead&wait_ms=15000")).json
        assert dead["source_id"] == name
        assert (dead["source"], dead["reason"]) == ("poison", "max_deliveries")
        assert (dead["body"], dead["headers"]) == ({"bad": True}, {"h": "v"})
        shown = (await get(client, "/queues/poison")).json
        assert shown["dead"] == 1
        assert shown["settings"]["max_deliveries"] == 2


async def test_settings_are_checked(cluster: Cluster) -> None:
    async with cluster.client(2) as client:
        first = await put(client, "/queues/loop-a", {"dead_letter": "loop-b"})
        assert first.status == 200
        cycle = await put(client, "/queues/loop-b", {"dead_letter": "loop-a"})
        assert (cycle.status, cycle.json["error"]) == (400, "Dead letter cycle")
        unknown = await put(client, "/queues/loop-b", {"colour": "red"})
        assert (unknown.status, unknown.json["field"]) == (400, "colour")
        full = await put(client, "/queues/short", {"max_length": 1})
        assert full.status == 200
        await produce(client, "short", 1)
        reply = await post(client, "/produce", {"queue": "short", "body": 2})
        assert (reply.status, reply.json["error"]) == (429, "Queue is full")
        assert int(reply.headers["retry-after"]) >= 1


async def test_purge_peek_and_delete(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        for n in range(3):
            await produce(client, "browse", n)
        seen = (await get(client, "/queues/browse/peek?max=2")).json["messages"]
        assert [m["body"] for m in seen] == [0, 1]
        assert all("receipt" not in m for m in seen)
        purged = await client.request("DELETE", "/queues/browse/messages")
        assert (purged.status, purged.json["messages"]) == (200, 3)
        assert (await get(client, "/consume?queue=browse")).status == 204
        assert (await client.request("DELETE", "/queues/browse")).status == 200
        assert (await get(client, "/queues/browse")).status == 404


async def test_groups_and_priorities_order_deliveries(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        await produce(client, "ordered", "low", priority=1)
        await produce(client, "ordered", "high", priority=9)
        for n in range(2):
            await produce(client, "ordered", f"g{n}", group_id="g")
        got = (await get(client, "/consume?queue=ordered&max=10")).json["messages"]
        assert [m["body"] for m in got] == ["high", "low", "g0"]
        await post(client, "/ack", {"message_id": got[2]["id"]})
        assert (await get(client, "/consume?queue=ordered")).json["body"] == "g1"


async def test_a_redrive_sends_dead_letters_back_to_their_source(cluster: Cluster) -> None:
    async with cluster.client(1) as client:
        await put(client, "/queues/again", {"max_deliveries": 1, "visibility_ms": 50})
        for n in range(3):
            await produce(client, "again", n, priority=n)
        assert len((await get(client, "/consume?queue=again&max=10")).json["messages"]) == 3

        async def all_dead() -> bool:
            return (await get(client, "/queues/again")).json["dead"] == 3

        await until("all are dead", all_dead)
        await put(client, "/queues/again", {"max_deliveries": 5, "visibility_ms": 30_000})
        reply = await post(client, "/queues/again/redrive", {})
        assert (reply.status, reply.json["messages"]) == (200, 3)
        back = (await get(client, "/consume?queue=again&max=10&wait_ms=5000")).json["messages"]
        assert [m["body"] for m in back] == [2, 1, 0]
        assert all("source_id" not in m for m in back)

        async def none_dead() -> bool:
            return (await get(client, "/queues/again")).json["dead"] == 0

        await until("no dead letters are left", none_dead)


async def test_an_ack_may_fetch_the_next_message(cluster: Cluster) -> None:
    async with cluster.client(0) as client:
        first = await produce(client, "next", 1)
        second = await produce(client, "next", 2)
        got = (await get(client, "/consume?queue=next")).json
        body = {"message_id": got["id"], "receipt": got["receipt"], "next": {"queue": "next"}}
        reply = await post(client, "/ack", body)
        assert (got["id"], reply.json["id"]) == (first, second)
        body = {"message_id": second, "next": {"queue": "next", "max": 3}}
        assert (await post(client, "/ack", body)).status == 204
