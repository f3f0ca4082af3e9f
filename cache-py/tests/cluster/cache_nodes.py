"""Real nodes, started as users start them, with a breakable link per ordered pair."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from testkit.cluster import Cluster, HttpClient, NodeView, Reply
from testkit.cluster.http import Outcome
from testkit.history import History, Operation

MAIN = Path(__file__).resolve().parents[2] / "main.py"
LEASE_MS = 500


def argv(*extra: str) -> Callable[[NodeView], list[str]]:
    def command(view: NodeView) -> list[str]:
        members = [f"http://{view.real(other)}" for other in view.others()]
        if view.index == 2:  # one that names itself as well, which is ignored
            members.insert(1, f"http://{view.bind()}")
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


async def until(condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 60.0) -> Any:
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

    def fresh(self) -> int:
        """A value that was never written before."""
        self._value += 1
        return self._value

    async def read(
        self, client: HttpClient, me: str, key: str, limit_s: float = 8.0
    ) -> Reply | None:
        call = self.history.invoke(me, "read", key)
        reply = await client.get(f"/read?key={key}", timeout_s=limit_s)
        match reply:
            case Reply(status=200):
                shown = {"value": reply.json["value"], "version": reply.json["version"]}
                self.history.ok(call, shown)
            case Reply(status=404):
                self.history.ok(call, None)
            case _:
                self.history.fail(call)
        return reply if isinstance(reply, Reply) else None

    async def write(
        self, client: HttpClient, me: str, key: str, limit_s: float = 8.0
    ) -> Reply | None:
        body = {"key": key, "value": self.fresh()}
        call = self.begin(me, "/write", body)
        reply = await client.post("/write", body, timeout_s=limit_s)
        self.end(call, reply, definite=reply.definite)
        return reply if isinstance(reply, Reply) else None

    def begin(self, me: str, path: str, body: dict[str, Any]) -> Operation:
        """A change is asked for."""
        key, kind = body["key"], path.removeprefix("/")
        match kind:
            case "write":
                return self.history.invoke(me, kind, key, body["value"])
            case "incr":
                return self.history.invoke(me, kind, key, body["by"])
            case "cas":
                wanted = {name: body[name] for name in ("expected_version", "value")}
                return self.history.invoke(me, kind, key, wanted)
            case _:
                return self.history.invoke(me, kind, key)

    def end(self, call: Operation, reply: Outcome, *, definite: bool) -> None:
        """What became of it. `definite`: if it was not answered, it certainly did nothing."""
        match reply:
            case Reply(status=200) if call.kind == "incr":
                shown = {"value": reply.json["value"], "version": reply.json["version"]}
                self.history.ok(call, shown)
            case Reply(status=200):
                self.history.ok(call, reply.json.get("version"))
            case Reply(status=409) if call.kind == "cas":
                self.history.ok(call, False)
            case _:
                (self.history.fail if definite else self.history.unknown)(call)
