"""An owner whose disk is full: new messages are refused, acks go on, and then it recovers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from message_queue.core.placement.ring import Ring, partition_of
from testkit.cluster import Reply

from .nodes import queue_cluster, until

pytestmark = pytest.mark.cluster


def queue_owned_by(node: int) -> str:
    """A queue whose best owner is the node at this position."""
    ring = Ring(range(3), 128, 3)
    names = (f"full{n}" for n in range(1000))
    return next(q for q in names if ring.preference[partition_of(q)][0] == node)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data directory for node 0 on a file system of 16 MiB."""
    directory = tmp_path / "data0"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "queue-test", str(directory)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs Linux and the right to mount a tmpfs")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


async def test_a_full_disk_refuses_messages_takes_acks_and_recovers(
    tmp_path: Path, small_disk: Path
) -> None:
    queue = queue_owned_by(0)
    big = "x" * 200_000
    async with queue_cluster(tmp_path) as cluster:
        async with cluster.client(0) as client:
            await until("node 0 owns the queue", lambda: owned_by_first(client, queue))
            ids = []
            refused = None
            for n in range(200):
                reply = await client.post("/produce", {"queue": queue, "body": f"{n}{big}"})
                assert isinstance(reply, Reply)
                if reply.status == 507:
                    refused = reply
                    break
                # A busy machine may be too slow for one (503), and has room for the next.
                assert reply.status in (201, 503), reply
                if reply.status == 201:
                    ids.append(reply.json["id"])
            assert refused is not None, "16 MiB cannot hold 40 MB"
            assert refused.json["error"] == "Disk full"
            assert "retry-after" in refused.headers
            # Everything that was answered with 201 is there, and can be acked: that frees space.
            seen: set[str] = set()
            while True:
                reply = await client.get(f"/consume?queue={queue}&max=5")
                assert isinstance(reply, Reply)
                if reply.status == 204:
                    break
                batch = [message["id"] for message in reply.json["messages"]]
                seen |= set(batch)
                ack = await client.post("/ack", {"message_ids": batch})
                assert isinstance(ack, Reply)
                assert ack.status == 200, ack
            assert set(ids) <= seen

            async def recovered() -> bool:
                reply = await client.post("/produce", {"queue": queue, "body": "after"})
                return isinstance(reply, Reply) and reply.status == 201

            await until("the node takes messages again", recovered)
        assert cluster.nodes[0].running
        cluster.power_cut()
        await cluster.start_all()
        async with cluster.client(0) as client:
            reply = await client.get(f"/consume?queue={queue}&max=100")
            assert isinstance(reply, Reply)
            assert {m["body"] for m in reply.json["messages"]} == {"after"}


async def owned_by_first(client: object, queue: str) -> bool:
    """Node 0 answers for the queue itself."""
    reply = await client.get(f"/consume?queue={queue}&forward=false")  # type: ignore[attr-defined]
    return isinstance(reply, Reply) and reply.status == 204
