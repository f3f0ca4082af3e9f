"""Real nodes, started as users start them, with a breakable link per ordered pair."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from testkit.cluster import Cluster, HttpClient, NodeView, Reply
from testkit.history import History, Operation

MAIN = Path(__file__).resolve().parents[2] / "main.py"
LEASE_MS = 1_000


def argv(*extra: str) -> Callable[[NodeView], list[str]]:
    def command(view: NodeView) -> list[str]:
        members = [f"http://{view.real(other)}" for other in view.others()]
        dials = [f"--dial=http://{view.real(o)}=http://{view.dial(o)}" for o in view.others()]
        flags = [
            f"--addr={view.bind()}",
            f"--peers={','.join(members)}",
            "--capacity=10",
            f"--id=node{'ABC'[view.index]}",
            f"--data_dir={view.data_dir}",
            f"--lease_ms={LEASE_MS}",
        ]
        return [sys.executable, str(MAIN), *flags, *dials, *extra]

    return command


async def until(condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 20.0) -> Any:
    """Poll until `condition` gives something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        got = await condition()
        if got:
            return got
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)


async def linked(cluster: Cluster) -> None:
    """All links are up."""

    async def up(index: int) -> bool:
        async with cluster.client(index) as client:
            reply = await client.get("/status")
            peers = reply.json["peers_connected"] if isinstance(reply, Reply) else ()
            return len(peers) == cluster.size - 1

    for index in range(cluster.size):
        await until(lambda i=index: up(i), f"node {index} has links to all others")


class Recorder:
    """Clients whose calls and answers become a history."""

    def __init__(self) -> None:
        self.history = History()
        self._value = 0

    async def read(self, client: HttpClient, me: str, key: str) -> Reply | None:
        call = self.history.invoke(me, "read", key)
        reply = await client.get(f"/read?key={key}", timeout_s=8.0)
        match reply:
            case Reply(status=200):
                shown = {"value": reply.json["value"], "version": reply.json["version"]}
                self.history.ok(call, shown)
            case Reply(status=404):
                self.history.ok(call, None)
            case _:
                self.history.fail(call)
        return reply if isinstance(reply, Reply) else None

    async def write(self, client: HttpClient, me: str, key: str) -> Reply | None:
        self._value += 1
        call = self.history.invoke(me, "write", key, self._value)
        reply = await client.post("/write", {"key": key, "value": self._value}, timeout_s=8.0)
        if isinstance(reply, Reply) and reply.status == 200:
            self.history.ok(call, reply.json["version"])
        else:
            self.lost(call, reply)
        return reply if isinstance(reply, Reply) else None

    async def incr(self, client: HttpClient, me: str, key: str) -> None:
        call = self.history.invoke(me, "incr", key, 1)
        reply = await client.post("/incr", {"key": key, "by": 1}, timeout_s=8.0)
        if isinstance(reply, Reply) and reply.status == 200:
            shown = {"value": reply.json["value"], "version": reply.json["version"]}
            self.history.ok(call, shown)
        else:
            self.lost(call, reply)

    def lost(self, call: Operation, reply: Any) -> None:
        (self.history.fail if reply.definite else self.history.unknown)(call)
