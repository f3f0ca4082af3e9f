"""An owner whose memory is full: new messages wait, all else goes on, and then it recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from message_queue.core.delivery.stock import ENTRY_BYTES
from testkit.cluster import HttpClient, Reply

from .nodes import MAIN, owner_of, queue_cluster, until

pytestmark = pytest.mark.cluster

SMALL = f"""
import sys
sys.path.insert(0, {str(MAIN.parent)!r})
from message_queue import memory, server
memory.METADATA_LEAST = 1 << 20  # 256 MiB are more than a test should fill
sys.exit(server.main(sys.argv[1:]))
"""
AT_ONCE = 500


async def post(client: HttpClient, path: str, body: object) -> Reply:
    reply = await client.post(path, body)
    assert isinstance(reply, Reply), reply
    return reply


async def test_a_full_memory_puts_new_messages_off_takes_acks_and_recovers(tmp_path: Path) -> None:
    """Filled with what cannot leave it: delayed, grouped, mortal and leased messages."""
    flags = ("--memory_bytes=500000",)
    async with queue_cluster(tmp_path, flags=flags, main=("-c", SMALL)) as cluster:
        owner = await owner_of(cluster, "full")
        async with cluster.client(owner) as client, cluster.client((owner + 1) % 3) as other:
            kinds = ({"delay_ms": 3_600_000}, {"group_id": "g"}, {"ttl_ms": 3_600_000}, {})
            stored: list[str] = []
            leased: list[dict[str, str]] = []
            refused = None
            for n in range(100):
                batch = [{"body": n, **kinds[n % len(kinds)]} for _ in range(AT_ONCE)]
                reply = await post(client, "/produce", {"queue": "full", "messages": batch})
                if reply.status == 429:
                    refused = reply
                    break
                assert reply.status == 201, reply
                stored += reply.json["ids"]
                taken = await client.get("/consume?queue=full&max=100")
                assert isinstance(taken, Reply)
                leased += taken.json["messages"] if taken.status == 200 else []
            assert refused is not None, f"{len(stored)} messages in play fit into 1.5 MB"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json["error"] == "Node's memory is full of messages"
            status = (await client.get("/status")).json  # type: ignore[union-attr]
            # The node looks at its memory ten times a second: some batches more may have come.
            assert status["message_memory_bytes"] < 1_500_000 + 16 * AT_ONCE * ENTRY_BYTES
            again = await post(other, "/produce", {"queue": "full", "body": "through another node"})
            assert (again.status, "retry-after" in again.headers) == (429, True)

            # What is there goes on: settled, put back, kept longer, settled with a fetch.
            one, two, three = leased[:3]
            named = {"message_id": one["id"], "receipt": one["receipt"]}
            assert (await post(client, "/ack", named)).status == 200
            named = {"message_id": two["id"], "receipt": two["receipt"], "delay_ms": 60_000}
            assert (await post(client, "/nack", named)).status == 200
            named = {"message_id": three["id"], "receipt": three["receipt"]}
            assert (await post(client, "/extend", {**named, "visibility_ms": 60_000})).status == 200
            fetch = {**named, "next": {"queue": "full", "max": 1}}
            assert (await post(client, "/ack", fetch)).status == 200

            for start in range(0, len(stored), 1000):
                ids = stored[start : start + 1000]
                acked = await post(client, "/ack", {"message_ids": ids})
                assert acked.status == 200

            async def recovered() -> bool:
                reply = await post(other, "/produce", {"queue": "full", "body": "after"})
                return reply.status == 201

            await until("the node takes messages again", recovered)
