"""A start that takes long: the node says so, and can be stopped."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from testkit.cluster import HttpClient, Reply

from .nodes import queue_cluster, until

pytestmark = pytest.mark.cluster


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes to wait for")
async def test_a_node_that_reads_its_log_is_alive_and_says_why_it_cannot_serve(
    tmp_path: Path,
) -> None:
    """Its index snapshot is a pipe that nobody writes to: no log takes longer to read."""
    log = tmp_path / "data0" / "log"
    log.mkdir(parents=True)
    os.mkfifo(log / "index.snapshot")
    cluster = queue_cluster(tmp_path, size=1)
    cluster.prepare()
    try:
        cluster.start(0)
        async with cluster.client(0) as client:
            await until("it is alive", lambda: answers(client, "/healthz", 200, ""))
            await until("it says why", lambda: answers(client, "/readyz", 503, "reading its log"))
            reply = await client.post("/produce", {"queue": "q", "body": 1})
            assert isinstance(reply, Reply)
            assert (reply.status, reply.json["error"]) == (503, "Not ready")
            assert "retry-after" in reply.headers
        assert await cluster.nodes[0].terminate() == 0

        cluster.start(0)
        async with cluster.client(0) as client:
            await until("it says why", lambda: answers(client, "/readyz", 503, "reading its log"))
            # Opened for writing and closed again: an empty snapshot, which is no good one.
            await asyncio.to_thread((log / "index.snapshot").write_bytes, b"")
            await until("it serves", lambda: answers(client, "/readyz", 200, ""))
        assert not (log / "index.snapshot").exists()
    finally:
        cluster.close()


async def answers(client: HttpClient, path: str, status: int, reason: str) -> bool:
    reply = await client.get(path)
    if not isinstance(reply, Reply) or reply.status != status:
        return False
    return not reason or reply.json["reason"] == reason
