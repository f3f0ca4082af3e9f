"""`/stream` on three real nodes: the rows of HTTP as items, credit, and hostile frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from testkit.cluster import Cluster, Reply

from .nodes import owner_of, queue_cluster, until
from .stream_client import StreamClient

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with queue_cluster(tmp_path_factory.mktemp("stream")) as cluster:
        yield cluster


async def figures(cluster: Cluster, queue: str) -> dict[str, Any]:
    async with cluster.client(0) as client:
        reply = await client.get(f"/queues/{queue}")
    assert isinstance(reply, Reply)
    assert reply.status == 200, reply
    return reply.json


@pytest.mark.parametrize("shift", [0, 1])
async def test_items_are_answered_like_http_by_any_node(cluster: Cluster, shift: int) -> None:
    queue = f"items-{shift}"
    index = (await owner_of(cluster, queue) + shift) % 3
    async with StreamClient(cluster, index) as stream:
        made = await stream.ask("produce", queue=queue, body={"n": [1, None]}, headers={"h": "é"})
        assert made["status"] == 201
        assert made["body"] == {"id": made["body"]["id"], "queue": queue, "status": "created"}
        several = await stream.ask("produce", queue=queue, messages=[{"body": 1}, {"body": 2}])
        assert (several["status"], len(several["body"]["ids"])) == (201, 2)
        first = await stream.ask("produce", queue=queue, body=3, dedupe_id="once")
        again = await stream.ask("produce", queue=queue, body=3, dedupe_id="once")
        assert (first["status"], again["status"], again["body"]["duplicate"]) == (201, 200, True)

        await stream.send({"op": "subscribe", "cid": "s", "queue": queue, "credit": 3})
        assert (await stream.answer("s"))["status"] == 200
        one, two, three = await stream.messages(3)
        assert (one["body"], one["headers"], one["attempt"]) == ({"n": [1, None]}, {"h": "é"}, 1)
        assert (two["body"], three["body"]) == (1, 2)
        assert (await figures(cluster, queue))["in_flight"] == 3

        done = await stream.ask("ack", message_id=one["id"], receipt=one["receipt"])
        assert (done["status"], done["body"]) == (200, {"status": "acknowledged"})
        longer = await stream.ask(
            "extend", message_id=two["id"], receipt=two["receipt"], visibility_ms=60_000
        )
        assert longer["status"] == 200
        back = await stream.ask("nack", message_id=two["id"], receipt=two["receipt"])
        assert back["status"] == 200
        await stream.send({"op": "credit", "subscription": "s", "credit": 1})
        (two_again,) = await stream.messages(1)
        assert (two_again["id"], two_again["attempt"]) == (two["id"], 2)
        late = await stream.ask("ack", message_id=two["id"], receipt=two["receipt"])
        assert late["status"] == 409
        ids = [two["id"], three["id"], "no-such-id"]
        receipts = [two_again["receipt"], three["receipt"], None]
        batch = await stream.ask("ack", message_ids=ids, receipts=receipts)
        assert [r["status"] for r in batch["body"]["results"]] == [
            "acknowledged", "acknowledged", "not found",
        ]  # fmt: skip
    counts = await figures(cluster, queue)
    assert (counts["ready"], counts["in_flight"]) == (1, 0)


async def test_many_items_are_under_way_at_once_and_keep_their_order(cluster: Cluster) -> None:
    async with StreamClient(cluster, 0) as stream:
        for attempt in range(5):
            queue = f"many-{attempt}"
            for start in range(0, 600, 200):
                numbers = range(start, start + 200)
                await stream.send(
                    *({"op": "produce", "cid": n, "queue": queue, "body": n} for n in numbers)
                )
            statuses = {(await stream.answer(n))["status"] for n in range(600)}
            assert statuses <= {201, 503}
            if statuses != {201}:
                continue
            await stream.send({"op": "subscribe", "cid": queue, "queue": queue, "credit": 600})
            got = await stream.messages(600)
            assert [message["body"] for message in got] == list(range(600))
            break
        else:
            pytest.fail("five queues in a row changed hands meanwhile")
        await stream.send(*(
            {"op": "ack", "cid": f"a{n}", "message_id": m["id"], "receipt": m["receipt"]}
            for n, m in enumerate(got)
        ))  # fmt: skip
        assert {(await stream.answer(f"a{n}"))["status"] for n in range(600)} == {200}


async def test_a_whole_delivery_is_acked_in_a_word_on_any_connection(cluster: Cluster) -> None:
    index = await owner_of(cluster, "whole")
    async with StreamClient(cluster, index) as stream, StreamClient(cluster, index - 1) as other:
        for start in (0, 30):
            bodies = [{"body": n} for n in range(start, start + 30)]
            made = await stream.ask("produce", queue="whole", messages=bodies)
            assert made["status"] == 201
        await stream.send({"op": "subscribe", "cid": "s", "queue": "whole", "credit": 40})
        held = await stream.messages(40)
        (receipt, count), *more = stream.receipts
        assert (receipt is not None, count, more) == (True, 40, [])
        # One of them is somebody else's by now, one was acked by itself.
        await stream.ask("nack", message_id=held[7]["id"], receipt=held[7]["receipt"])
        await stream.ask("ack", message_id=held[9]["id"], receipt=held[9]["receipt"])
        await other.send({"op": "subscribe", "cid": "s", "queue": "whole", "credit": 1})
        (again,) = await other.messages(1)
        assert (again["id"], again["attempt"]) == (held[7]["id"], 2)
        assert other.receipts == [(None, 1)], "one message needs no other receipt than its own"
        acked = await other.ask("ack", delivery=receipt)
        assert acked["status"] == 409
        assert acked["body"] == {
            "error": "Receipt overtaken by another delivery",
            "overtaken": [again["id"]],
            "acknowledged": 39,
        }
        late = await other.ask("ack", message_id=again["id"], receipt=again["receipt"])
        assert late["status"] == 200
        counts = await figures(cluster, "whole")
        assert (counts["ready"], counts["in_flight"]) == (20, 0)
        repeated = await stream.ask("ack", delivery=receipt)
        assert (repeated["status"], repeated["body"]) == (200, {"status": "acknowledged"})
        assert receipt is not None
        for wrong in ("", "x", receipt + "0", receipt.replace("-", "-0", 1), receipt[::-1]):
            refused = await stream.ask("ack", delivery=wrong)
            assert (refused["status"], refused["body"]["error"]) == (404, "Delivery not found")
        both = await stream.ask("ack", delivery=receipt, message_id=again["id"])
        assert both["status"] == 400


async def test_no_more_is_delivered_than_there_is_credit(cluster: Cluster) -> None:
    async with StreamClient(cluster, 1) as stream:
        await stream.ask("produce", queue="credit", messages=[{"body": n} for n in range(20)])
        await stream.send({"op": "subscribe", "cid": 9, "queue": "credit", "credit": 0})
        await stream.send({"op": "credit", "subscription": 9, "credit": 4})
        got = await stream.messages(4)
        # A question and its answer later, nothing more has come.
        assert (await stream.ask("produce", queue="credit", body="last"))["status"] == 201
        assert not stream.delivered
        assert (await figures(cluster, "credit"))["in_flight"] == 4
        await stream.send({"op": "credit", "subscription": 9, "credit": 2})
        got += await stream.messages(2)
        assert [message["body"] for message in got] == list(range(6))
        over = await stream.ask("credit", subscription=9, credit=1000)
        assert over["status"] == 200
        over = await stream.ask("credit", subscription=9, credit=1000)
        assert (over["status"], over["body"]["error"]) == (429, "Too much credit")


async def test_credit_beside_an_ack_is_used_at_once_only_by_who_needs_it(cluster: Cluster) -> None:
    index = await owner_of(cluster, "paced")
    async with StreamClient(cluster, index) as stream:
        await stream.ask("produce", queue="paced", messages=[{"body": n} for n in range(20)])
        await stream.send({"op": "subscribe", "cid": "s", "queue": "paced", "credit": 4})
        held = await stream.messages(4)
        await stream.answer("s")
        more = {"op": "credit", "subscription": "s", "credit": 1}

        def acked(message: dict[str, Any]) -> dict[str, Any]:
            receipt = message["receipt"]
            return {"op": "ack", "cid": "a", "message_id": message["id"], "receipt": receipt}

        # Three are left at the client: the next comes in the frame that answers the ack.
        await stream.send(acked(held.pop(0)), more)
        assert (await stream.answer("a"))["status"] == 200
        assert [message["body"] for message in stream.delivered] == [4]
        held += await stream.messages(1)
        # One is left, and the ack is not waited for: what there is credit for comes at once.
        await stream.send(more, more, *(acked(held.pop(0)) for _ in range(3)), more)
        held += await stream.messages(2)
        # The rest comes as well, with no word from the client.
        held += await stream.messages(1)
        assert [message["body"] for message in held] == [4, 5, 6, 7]
        # What no ack waits for is not put off.
        await stream.answer("a")
        await stream.send(more)
        assert [message["body"] for message in await stream.messages(1)] == [8]


async def test_what_was_not_sent_when_the_connection_closed_is_ready_again(
    cluster: Cluster,
) -> None:
    async with StreamClient(cluster, 0) as stream:
        await stream.send({"op": "subscribe", "cid": 1, "queue": "gone", "credit": 5})
        await stream.answer(1)

        async def waiting() -> bool:
            async with cluster.client(0) as client:
                reply = await client.get("/queues/gone")
            assert isinstance(reply, Reply)
            return reply.status == 200 and reply.json["waiting_consumers"] == 1

        async def nobody_waits() -> bool:
            return not await waiting()

        async with cluster.client(0) as client:
            await client.request("PUT", "/queues/gone", body=b"{}")
        await until("the subscription waits", waiting)
    await until("nobody waits any more", nobody_waits)
    async with cluster.client(1) as client:
        await client.post("/produce", {"queue": "gone", "body": 1})
        reply = await client.get("/consume?queue=gone")
        assert isinstance(reply, Reply)
        assert (reply.status, reply.json["attempt"]) == (200, 1)


async def test_a_released_message_was_no_attempt(cluster: Cluster) -> None:
    async with StreamClient(cluster, 2) as stream:
        await stream.ask("produce", queue="back", body="x")
        await stream.send({"op": "subscribe", "cid": "s", "queue": "back", "credit": 1})
        (message,) = await stream.messages(1)
        given = {"message_id": message["id"], "receipt": message["receipt"]}
        assert (await stream.ask("release", **given))["status"] == 200
        await stream.send({"op": "credit", "subscription": "s", "credit": 1})
        (again,) = await stream.messages(1)
        assert again["attempt"] == 1
        assert (await stream.ask("unsubscribe", subscription="s"))["status"] == 200
        assert (await stream.ask("unsubscribe", subscription="s"))["status"] == 404


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "Invalid JSON"),
        ("7", "Invalid JSON"),
        ('{"op":"fly","cid":1}', "Invalid field"),
        ('{"cid":1}', "Missing field"),
        ('{"op":"produce","cid":1,"queue":"q"}', "Missing field"),
        ('{"op":"produce","cid":1,"queue":"q","body":1,"bogus":1}', "Unknown field"),
        ('{"op":"produce","cid":1,"queue":"","body":1}', "Invalid field"),
        ('{"op":"produce","cid":1,"queue":"q","body":' + "[" * 99 + "]" * 99 + "}", "JSON nested"),
        ('{"op":"produce","cid":1,"queue":"q","body":' + "[" * 5000 + "]" * 5000 + "}", "JSON nes"),
        ('{"op":"produce","cid":1,"queue":"q","body":99999999999999999999}', "Invalid JSON"),
        ('{"op":"produce","cid":-1,"queue":"q","body":1}', "Invalid field"),
        ('{"op":"ack","cid":1}', "Missing field"),
        ('{"op":"ack","cid":1,"message_ids":["a"],"receipts":[null,null]}', "Invalid field"),
        ('{"op":"nack","cid":1,"message_id":"never"}', "Message not found"),
        ('{"op":"subscribe","queue":"q"}', "Missing field"),
        ('{"op":"credit","cid":1,"subscription":5,"credit":1}', "No such subscription"),
        ('{"op":"credit","cid":1,"subscription":5,"credit":100000}', "Invalid field"),
        ("[" + ",".join(['{"op":"credit","subscription":1,"credit":0}'] * 1001) + "]", "Too many"),
    ],
)
async def test_a_hostile_frame_is_answered_with_an_error(
    cluster: Cluster, frame: str, error: str
) -> None:
    async with StreamClient(cluster, 0) as stream:
        await stream.ws.send_str(frame)
        while not (stream.uncalled or stream.answers):
            assert await stream.take()
        (answer, *_) = [*stream.uncalled, *stream.answers.values()]
        assert 400 <= answer["status"] < 500
        assert answer["body"]["error"].startswith(error), answer
        stream.answers.clear()
        stream.uncalled.clear()
        assert (await stream.ask("produce", queue="after", body=1))["status"] == 201


async def test_a_bad_item_does_not_spoil_the_others_of_its_frame(cluster: Cluster) -> None:
    async with StreamClient(cluster, 0) as stream:
        await stream.send(
            {"op": "produce", "cid": "a", "queue": "mixed", "body": 1},
            {"op": "produce", "cid": "b", "queue": "mixed", "body": 1, "priority": 77},
            {"op": "produce", "cid": "c", "queue": "mixed", "body": 1},
        )
        assert [(await stream.answer(cid))["status"] for cid in "abc"] == [201, 400, 201]


async def test_binary_and_oversized_frames_close_with_a_code(cluster: Cluster) -> None:
    async with StreamClient(cluster, 0) as stream:
        await stream.ws.send_bytes(b"{}")
        assert not await stream.take()
        assert stream.ws.close_code == aiohttp.WSCloseCode.UNSUPPORTED_DATA
    async with StreamClient(cluster, 0) as stream:
        await stream.ws.send_str('{"op":"produce","cid":1,"body":"' + "x" * (1 << 20) + '"}')
        assert not await stream.take()
        assert stream.ws.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


async def test_a_foreign_origin_and_a_plain_get_are_refused(cluster: Cluster) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with StreamClient(cluster, 0, Origin="http://evil.example"):
            pass
    assert refused.value.status == 403
    own = {"Origin": f"http://{cluster.views[0].bind()}"}
    async with StreamClient(cluster, 0, **own) as stream:
        assert (await stream.ask("produce", queue="own", body=1))["status"] == 201
    async with cluster.client(0) as client:
        reply = await client.get("/stream")
    assert isinstance(reply, Reply)
    assert (reply.status, reply.json["error"]) == (426, "WebSocket upgrade required")


async def test_who_does_not_read_is_not_read_from(cluster: Cluster) -> None:
    """A client that only sends fills no memory of the node: what it is not told is bounded."""
    async with StreamClient(cluster, 0) as deaf:
        item = '{"op":"ack","cid":"' + "c" * 60 + '","message_id":"never-issued"}'
        frame = "[" + ",".join([item] * 1000) + "]"
        with suppress(TimeoutError):
            async with asyncio.timeout(4):
                for _ in range(5000):  # until both sockets' buffers and the node's bound are full
                    await deaf.ws.send_str(frame)
                pytest.fail("the node took half a gigabyte from a client that reads nothing")
        async with StreamClient(cluster, 0) as other:
            assert (await other.ask("produce", queue="deaf", body=1))["status"] == 201
        deaf.ws._response.close()  # no closing handshake with someone who reads nothing
