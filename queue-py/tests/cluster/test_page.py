"""The HTTP table of queue.md, row by row and sentence by sentence, as an outsider reads it: three
real nodes and HTTP. ``test_walkthrough.py`` has the way through; faults are in ``test_faults.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from testkit.cluster import Cluster, HttpClient, Reply

from .http_calls import delete, get, post, produce, put, somebody_waits
from .nodes import owner_of, queue_cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]
MESSAGE = {"id", "queue", "body", "headers", "attempt", "receipt", "enqueued_at"}
HALF_A_DAY_MS = 12 * 3600 * 1000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with queue_cluster(tmp_path_factory.mktemp("page")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: Cluster) -> AsyncIterator[HttpClient]:
    async with cluster.client(1) as client:
        yield client


async def take(client: HttpClient, queue: str, **query: Any) -> Any:
    """One message."""
    asked = "".join(f"&{key}={value}" for key, value in query.items())
    reply = await get(client, f"/consume?queue={queue}{asked}")
    assert reply.status == 200, reply
    return reply.json


# --- POST /produce --------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, False, 0, "", [], {}, -1.5e-7])
async def test_a_body_is_any_json(client: HttpClient, body: object) -> None:
    name = await produce(client, "any", body)
    message = await take(client, "any")
    assert message["body"] == body
    assert type(message["body"]) is type(body)
    assert message.keys() == MESSAGE
    assert await settle(client, name) == 200


async def settle(client: HttpClient, name: str, receipt: str | None = None) -> int:
    body = {"message_id": name} | ({"receipt": receipt} if receipt else {})
    return (await post(client, "/ack", body)).status


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"queue": "bad"}, "body"),
        ({"body": 1}, "queue"),
        ({"queue": "bad", "body": 1, "priority": 10}, "priority"),
        ({"queue": "bad", "body": 1, "delay_ms": -1}, "delay_ms"),
        ({"queue": "bad", "body": 1, "ttl_ms": "1"}, "ttl_ms"),
        ({"queue": "bad", "body": 1, "colour": "red"}, "colour"),
        ({"queue": "x" * 257, "body": 1}, "queue"),
        ({"queue": "bad", "messages": []}, "messages"),
        ({"queue": "bad", "messages": [{"body": n} for n in range(1001)]}, "messages"),
        ({"queue": "bad", "messages": [{"body": 1}, {"priority": 3}]}, "messages[1].body"),
        ({"queue": "bad", "messages": [{"body": 1}, {"body": 2, "priority": 11}]}, "priority"),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_stored(
    client: HttpClient, wrong: object, field: str
) -> None:
    reply = await post(client, "/produce", wrong)
    assert reply.status == 400
    assert field in reply.json["field"]
    assert (await get(client, "/consume?queue=bad")).status == 204


async def test_a_delay_holds_back_a_ttl_ends_and_a_priority_goes_first(client: HttpClient) -> None:
    await produce(client, "times", "later", delay_ms=60_000)
    await produce(client, "times", "late", delay_ms=1_000)
    await produce(client, "times", "gone", ttl_ms=1)
    await produce(client, "times", "low")
    await produce(client, "times", "high", priority=9)
    assert [(await take(client, "times", wait_ms=10_000))["body"] for _ in range(3)] == [
        "high",
        "low",
        "late",
    ]
    assert (await get(client, "/consume?queue=times")).status == 204
    shown = (await get(client, "/queues/times")).json
    assert (shown["ready"], shown["in_flight"], shown["delayed"]) == (0, 3, 1)


async def ready_is(client: HttpClient, queue: str, count: int) -> bool:
    reply = await get(client, f"/queues/{queue}")
    return reply.status == 200 and reply.json["ready"] == count


async def test_a_batch_of_duplicates_answers_with_the_first_ids(client: HttpClient) -> None:
    batch = {"queue": "twice", "messages": [{"body": n, "dedupe_id": f"d{n}"} for n in range(2)]}
    first = await post(client, "/produce", batch)
    again = await post(client, "/produce", batch)
    assert (first.status, again.status) == (201, 200)
    assert again.json["ids"] == first.json["ids"]
    assert len((await get(client, "/consume?queue=twice&max=10")).json["messages"]) == 2


async def test_a_full_queue_refuses_a_whole_batch_and_drops_nothing(client: HttpClient) -> None:
    await put(client, "/queues/narrow", {"max_length": 2})
    kept = await produce(client, "narrow", "kept")
    batch = {"queue": "narrow", "messages": [{"body": n} for n in range(2)]}
    refused = await post(client, "/produce", batch)
    assert refused.status == 429
    assert refused.json.get("definite", True) is True
    assert int(refused.headers["retry-after"]) >= 1
    message = await take(client, "narrow")
    assert message["id"] == kept
    assert (await get(client, "/consume?queue=narrow")).status == 204
    await settle(client, kept)
    assert (await post(client, "/produce", batch)).status == 201


# --- GET /consume ---------------------------------------------------------------------------------


async def test_one_or_many_depends_on_max_being_given(client: HttpClient) -> None:
    await produce(client, "most", 1)
    many = (await get(client, "/consume?queue=most&max=1")).json
    assert [m["body"] for m in many["messages"]] == [1]
    for query in ("max=0", "max=1001", "max=x", "wait_ms=20001", "wait_ms=-1", "visibility_ms=-1"):
        reply = await get(client, f"/consume?queue=most&{query}")
        assert (reply.status, reply.json["field"]) == (400, query.partition("=")[0])
    assert (await get(client, "/consume?queue=most&max=1000")).status == 204


async def test_large_messages_come_in_as_many_answers_as_can_be_carried(
    cluster: Cluster, client: HttpClient
) -> None:
    owner = await owner_of(cluster, "large")
    for n in range(8):
        await produce(client, "large", f"{n}" * 1_000_000)
    bodies: list[str] = []
    async with cluster.client((owner + 1) % 3) as other:
        peeked = (await get(other, "/queues/large/peek?max=1000")).json["messages"]
        assert [m["body"][0] for m in peeked] == ["0", "1", "2", "3"]
        while len(bodies) < 8:
            reply = await get(other, "/consume?queue=large&max=1000")
            assert reply.status == 200
            bodies += [m["body"][0] for m in reply.json["messages"]]
    assert bodies == list("01234567")


async def test_an_unknown_queue_is_empty_and_a_long_poll_waits_for_it(
    cluster: Cluster, client: HttpClient
) -> None:
    assert (await get(client, "/consume?queue=unheard")).status == 204
    assert (await get(client, "/queues/unheard")).status == 404  # asking made none
    async with cluster.client(2) as other:
        poll = asyncio.create_task(get(other, "/consume?queue=unheard&wait_ms=20000"))
        await asyncio.sleep(0.1)
        assert not poll.done()
        name = await produce(client, "unheard", "first")
        assert (await poll).json["id"] == name


async def test_a_long_poll_is_woken_by_a_lease_that_ends(
    cluster: Cluster, client: HttpClient
) -> None:
    name = await produce(client, "lease", "x")
    first = await take(client, "lease", visibility_ms=500)
    async with cluster.client(0) as other:
        began_s = time.monotonic()
        second = await take(other, "lease", wait_ms=20_000)
        assert time.monotonic() - began_s < 15
    assert (second["id"], second["attempt"]) == (name, 2)
    assert second["receipt"] != first["receipt"]


async def test_a_long_poll_that_gets_nothing_ends_in_time(client: HttpClient) -> None:
    began_s = time.monotonic()
    assert (await get(client, "/consume?queue=silent&wait_ms=300")).status == 204
    assert 0.25 < time.monotonic() - began_s < 10


# --- POST /ack, /nack, /extend --------------------------------------------------------------------


async def test_a_ready_message_is_acked_without_a_receipt_and_so_is_one_that_is_held_no_more(
    client: HttpClient,
) -> None:
    ready = await produce(client, "acks", "ready")
    assert await settle(client, ready) == 200
    assert await settle(client, ready) == 200
    purged = await produce(client, "acks", "purged")
    assert (await delete(client, "/queues/acks/messages")).status == 200
    assert await settle(client, purged) == 200
    assert (await get(client, "/consume?queue=acks")).status == 204


async def test_a_batch_of_acks_says_of_each_what_became_of_it(client: HttpClient) -> None:
    one = await produce(client, "each", 1)
    reply = await post(client, "/ack", {"message_ids": [one, "0-1-1-0000", one]})
    assert reply.status == 200
    assert [r["message_id"] for r in reply.json["results"]] == [one, "0-1-1-0000", one]
    found = [r["status"] for r in reply.json["results"]]
    assert found == ["acknowledged", "not found", "acknowledged"]
    bad: list[dict[str, Any]] = [{}, {"message_id": one, "message_ids": [one]}, {"message_ids": []}]
    for wrong in bad:
        assert (await post(client, "/ack", wrong)).status == 400


async def test_a_nack_gives_back_at_once_or_later_and_only_by_who_has_it(
    client: HttpClient,
) -> None:
    name = await produce(client, "back", "x")
    first = await take(client, "back")
    given = {"message_id": name, "receipt": first["receipt"]}
    assert (await post(client, "/nack", given)).status == 200
    second = await take(client, "back")
    assert (second["id"], second["attempt"]) == (name, 2)
    assert (await post(client, "/nack", given)).status == 409
    later = {"message_id": name, "receipt": second["receipt"], "delay_ms": 60_000}
    assert (await post(client, "/nack", later)).status == 200
    assert (await get(client, "/consume?queue=back")).status == 204
    assert (await get(client, "/queues/back")).json["delayed"] == 1


async def test_a_lease_is_extended_to_twelve_hours_in_total_and_no_longer(
    client: HttpClient,
) -> None:
    name = await produce(client, "long", "x")
    message = await take(client, "long", visibility_ms=1_000)
    body = {"message_id": name, "receipt": message["receipt"]}
    reply = await post(client, "/extend", {**body, "visibility_ms": HALF_A_DAY_MS + 1})
    assert (reply.status, reply.json["field"]) == (400, "visibility_ms")
    reply = await post(client, "/extend", {**body, "visibility_ms": HALF_A_DAY_MS - 600_000})
    assert reply.status == 200
    # Counted from the delivery: what has gone by meanwhile is not to be had again.
    await asyncio.sleep(0.05)
    reply = await post(client, "/extend", {**body, "visibility_ms": HALF_A_DAY_MS})
    assert reply.status == 400, reply
    assert await settle(client, name, message["receipt"]) == 200


async def test_an_ack_with_next_settles_and_then_fetches_like_consume(
    cluster: Cluster, client: HttpClient
) -> None:
    for n in range(3):
        await produce(client, "and-next", n)
    first = await take(client, "and-next")
    ack = {"message_id": first["id"], "receipt": first["receipt"]}
    reply = await post(client, "/ack", {**ack, "next": {"queue": "and-next", "max": 2}})
    assert [m["body"] for m in reply.json["messages"]] == [1, 2]
    # What was not settled fetches nothing.
    never = {"message_id": "0-1-1-0000", "next": {"queue": "and-next"}}
    assert (await post(client, "/ack", never)).status == 404
    poll = {**ack, "next": {"queue": "and-next", "wait_ms": 20_000, "visibility_ms": 60_000}}
    waiting = asyncio.create_task(post(client, "/ack", poll))
    async with cluster.client(0) as other:
        await produce(other, "and-next", "late")
    assert (await waiting).json["body"] == "late"
    held = {"message_id": await produce(client, "and-next", "held")}
    for wrong in ({"wait_ms": 20_001}, {"queue": "é" * 200}, {"queue": "a\0"}, {"max": 1001}):
        body = {**held, "next": {"queue": "and-next", **wrong}}
        reply = await post(client, "/ack", body)
        assert (reply.status, reply.json["field"]) == (400, f"next.{next(iter(wrong))}")
    assert (await take(client, "and-next"))["id"] == held["message_id"], "400 changes nothing"


async def test_a_receipt_that_was_never_given_settles_nothing(client: HttpClient) -> None:
    name = await produce(client, "invented", 1)
    given = (await take(client, "invented"))["receipt"]
    for receipt in (given + "1", "9" * 15 + ".1", "1", "receipt", ""):
        for path, more in (("/ack", {}), ("/nack", {}), ("/extend", {"visibility_ms": 9})):
            body = {"message_id": name, "receipt": receipt, **more}
            assert (await post(client, path, body)).status == 409
    for receipt in (1, ["1.1"], "1" * 65):
        reply = await post(client, "/ack", {"message_id": name, "receipt": receipt})
        assert (reply.status, reply.json["field"]) == (400, "receipt")
    assert await settle(client, name, given) == 200
    assert await settle(client, name, "whatever") == 200, "it is gone, and stays so"


async def test_a_full_queue_takes_a_retry_of_what_filled_it(client: HttpClient) -> None:
    await put(client, "/queues/brim", {"max_length": 1})
    fields = {"queue": "brim", "body": 1, "dedupe_id": "once"}
    first = await post(client, "/produce", fields)
    again = await post(client, "/produce", fields)
    assert (first.status, again.status) == (201, 200)
    assert (again.json["id"], again.json["duplicate"]) == (first.json["id"], True)
    assert (await post(client, "/produce", {**fields, "dedupe_id": "two"})).status == 429


# --- queues ---------------------------------------------------------------------------------------


async def test_a_queue_shows_its_figures_owner_replicas_and_settings(
    cluster: Cluster, client: HttpClient
) -> None:
    settings: dict[str, Any] = {"visibility_ms": 5_000, "max_deliveries": 3, "max_length": 100}
    settings |= {"retention_ms": 60_000, "dead_letter": "figures-morgue"}
    reply = await put(client, "/queues/figures", settings)
    assert (reply.status, reply.json["settings"]) == (200, settings)
    await put(client, "/queues/figures", {"max_deliveries": None})
    for n in range(3):
        await produce(client, "figures", "x" * 100, delay_ms=60_000 if n == 2 else 0)
    await take(client, "figures")
    shown = (await get(client, "/queues/figures")).json
    assert (shown["ready"], shown["in_flight"], shown["delayed"], shown["dead"]) == (1, 1, 1, 0)
    assert shown["bytes"] >= 300
    assert shown["settings"] == {**settings, "max_deliveries": None}
    addresses = {view.bind() for view in cluster.views}
    assert shown["owner"] in addresses
    assert set(shown["replicas"]) == addresses
    assert any("oldest" in key for key in shown)
    listed = (await get(client, "/queues")).json["queues"]
    assert [q["ready"] for q in listed if q["queue"] == "figures"] == [1]


async def test_a_dead_letter_cycle_of_any_length_is_refused(client: HttpClient) -> None:
    assert (await put(client, "/queues/self", {"dead_letter": "self"})).status == 400
    for source, target in (("c1", "c2"), ("c2", "c3")):
        assert (await put(client, f"/queues/{source}", {"dead_letter": target})).status == 200
    cycle = await put(client, "/queues/c3", {"dead_letter": "c1"})
    assert (cycle.status, cycle.json["error"]) == (400, "Dead letter cycle")


async def test_a_purge_takes_what_is_in_flight_or_delayed_and_forgets_dedupe_ids(
    client: HttpClient,
) -> None:
    first = await produce(client, "purge", 0, dedupe_id="d")
    await produce(client, "purge", 1, delay_ms=60_000)
    await produce(client, "purge", 2)
    leased = await take(client, "purge")
    purged = await delete(client, "/queues/purge/messages")
    assert (purged.status, purged.json["messages"]) == (200, 3)
    shown = (await get(client, "/queues/purge")).json
    assert (shown["ready"], shown["in_flight"], shown["delayed"]) == (0, 0, 0)
    assert await settle(client, leased["id"], leased["receipt"]) == 200
    again = await produce(client, "purge", 3, dedupe_id="d")  # 201: a new message
    assert again != first
    assert (await take(client, "purge"))["body"] == 3


async def test_a_deleted_queue_is_gone_with_its_settings(client: HttpClient) -> None:
    await put(client, "/queues/del", {"max_length": 1})
    await produce(client, "del", 1)
    assert (await delete(client, "/queues/del")).status == 200
    assert (await get(client, "/queues/del")).status == 404
    await produce(client, "del", 2)
    await produce(client, "del", 3)


async def test_peek_leases_nothing(client: HttpClient) -> None:
    await produce(client, "look", 1)
    for _ in range(2):
        seen = (await get(client, "/queues/look/peek?max=10")).json["messages"]
        assert [m["body"] for m in seen] == [1]
    assert (await take(client, "look"))["attempt"] == 1


async def test_dead_letters_bear_their_source_and_one_redrive_runs_at_a_time(
    cluster: Cluster, client: HttpClient
) -> None:
    await put(client, "/queues/work", {"max_deliveries": 1, "visibility_ms": 10})
    batch = {"queue": "work", "messages": [{"body": n, "headers": {"n": n}} for n in range(300)]}
    ids = (await post(client, "/produce", batch)).json["ids"]
    assert len((await get(client, "/consume?queue=work&max=1000")).json["messages"]) == 300
    await until("all are dead", lambda: ready_is(client, "work.dead", 300))
    letters = (await get(client, "/queues/work.dead/peek?max=1000")).json["messages"]
    assert sorted(letter["source_id"] for letter in letters) == sorted(ids)
    assert {(letter["source"], letter["reason"]) for letter in letters} == {
        ("work", "max_deliveries")
    }
    assert not {letter["id"] for letter in letters} & set(ids)
    assert all(letter["headers"] == {"n": letter["body"]} for letter in letters)
    await put(client, "/queues/work", {"max_deliveries": 5, "visibility_ms": 30_000})
    unknown = await post(client, "/queues/work/redrive", {"most": 1})
    assert (unknown.status, unknown.json["field"]) == (400, "most")
    some = await post(client, "/queues/work/redrive", {"max": 3})
    assert (some.status, some.json["messages"]) == (200, 3)
    await until("three are back", lambda: ready_is(client, "work", 3))

    owner = await owner_of(cluster, "work.dead")
    others = [cluster.client(owner) for _ in range(6)]
    replies = await asyncio.gather(*(post(c, "/queues/work/redrive", {}) for c in others))
    for other in others:
        other.close()
    statuses = sorted(reply.status for reply in replies)
    assert statuses[0] == 200
    assert statuses[-1] == 409
    await until("all are back", lambda: ready_is(client, "work", 300))
    assert (await get(client, "/consume?queue=work.dead")).status == 204


async def test_letters_are_sent_back_by_the_name_of_their_queue_whatever_it_is_called(
    client: HttpClient,
) -> None:
    await put(client, "/queues/mill", {"max_deliveries": 1, "dead_letter": "morgue"})
    ids = [await produce(client, "mill", n, headers={"source_id": 1}) for n in range(3)]
    for name in ids:
        await take(client, "mill")
        assert (await post(client, "/nack", {"message_id": name})).status == 200
    await until("all are dead", lambda: ready_is(client, "morgue", 3))
    none = await post(client, "/queues/unrelated/redrive", {})
    assert (none.status, none.json["messages"]) == (200, 0)
    for where, most in (("morgue", 1), ("mill", 2)):
        sent = await post(client, f"/queues/{where}/redrive", {"max": most})
        assert (sent.status, sent.json["messages"], sent.json["queue"]) == (200, most, "morgue")
    assert [(await take(client, "mill"))["body"] for _ in range(3)] == [0, 1, 2]


# --- who answers ----------------------------------------------------------------------------------


async def test_whoever_is_not_the_owner_says_so_when_told_not_to_forward(
    cluster: Cluster, client: HttpClient
) -> None:
    name = await produce(client, "mine", 1)
    owner = await owner_of(cluster, "mine")
    expected = {"error": "Wrong node", "owner": cluster.views[owner].bind()}
    async with cluster.client((owner + 1) % 3) as other, cluster.client(owner) as it:
        named = {"message_id": name}
        asked: list[Reply] = [
            await get(other, "/consume?queue=mine&forward=false"),
            await get(other, "/queues/mine/peek?forward=false"),
            await post(other, "/ack?forward=false", named),
            await post(other, "/nack?forward=false", named),
            await post(other, "/extend?forward=false", {**named, "visibility_ms": 1}),
            await delete(other, "/queues/mine/messages?forward=false"),
        ]
        assert [(reply.status, reply.json) for reply in asked] == [(421, expected)] * 6
        assert (await get(it, "/consume?queue=mine&forward=false")).json["id"] == name


async def test_the_ring_names_nodes_virtual_nodes_partitions_owners_and_epochs(
    cluster: Cluster, client: HttpClient
) -> None:
    ring = (await get(client, "/ring")).json
    addresses = {view.bind() for view in cluster.views}
    assert {node["addr"] for node in ring["nodes"]} == addresses
    assert ring["virtual_nodes"] == 128
    assert [p["partition"] for p in ring["partitions"]] == list(range(64))
    assert all(p["owner"] in addresses and p["epoch"] > 0 for p in ring["partitions"])
    one = (await get(client, "/ring?queue=mine")).json["partitions"]
    assert len(one) == 1
    assert one[0] in ring["partitions"]


async def test_no_answer_says_what_it_is_made_with(cluster: Cluster) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "x" * 22 + "=="
    async with aiohttp.ClientSession() as session:
        for path, headers in (("/events", {}), ("/stream", upgrade), ("/status", {})):
            async with session.get(cluster.url(0) + path, headers=headers) as answer:
                assert answer.headers["Server"] == "message-queue", path


async def test_a_waiting_consumer_of_a_configured_queue_is_shown(
    cluster: Cluster, client: HttpClient
) -> None:
    await put(client, "/queues/patience", {"visibility_ms": 30_000})
    async with cluster.client(0) as other:
        poll = asyncio.create_task(get(other, "/consume?queue=patience&wait_ms=20000"))
        await until("it waits", lambda: somebody_waits(client, "patience"))
        await produce(client, "patience", 1)
        assert (await poll).status == 200
