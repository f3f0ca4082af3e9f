"""A real three-node cluster, and clients that find the leader, retry and record a history."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testkit.cluster import Cluster, HttpClient, NodeView, NoReply, Reply
from testkit.history import History

MAIN = Path(__file__).resolve().parents[2] / "src" / "main.py"
DEADLINE_S = 20.0


def make_cluster(root: Path, *, size: int = 3, proxied: bool = False, more: tuple[str, ...] = ()):
    def argv(view: NodeView) -> list[str]:
        return [
            sys.executable,
            str(MAIN),
            f"--id=node{view.index + 1}",
            f"--raft_addr={view.bind('raft')}",
            f"--http_addr={view.bind('http')}",
            f"--peers={','.join(view.dials('raft'))}",
            f"--peer_http_addrs={','.join(view.reals('http'))}",
            f"--data_dir={view.data_dir}",
            *more,
        ]

    return LockCluster(
        argv, size, root=root, channels=("http", "raft"), proxied=("raft",) if proxied else ()
    )


class LockCluster(Cluster):
    async def status(self, index: int) -> dict[str, Any]:
        """A node's /status; empty if it does not answer."""
        async with self.client(index) as client:
            match await client.get("/status", timeout_s=1.0):
                case Reply(status=200) as reply:
                    return reply.json
        return {}

    async def leader(self, among: tuple[int, ...] | None = None) -> int:
        """The index of the node that leads (of those named) with the highest term; waits for it."""
        indices = among if among is not None else tuple(range(self.size))

        async def find() -> int | None:
            found = [(i, await self.status(i)) for i in indices]
            leading = [(s["term"], i) for i, s in found if s.get("state") == "LEADER"]
            return max(leading)[1] if leading else None

        return await until(find)

    async def ask(self, index: int, path: str, body: dict[str, Any] | None = None) -> Reply:
        """One request to one node, which must answer."""
        async with self.client(index) as client:
            reply = await (client.get(path) if body is None else client.post(path, body))
        assert isinstance(reply, Reply), reply
        return reply


async def until(condition: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Poll until `condition()` gives something that is not None or False; that is returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.02)


class Client:
    """One client: finds the leader, retries with the same request id, records what happened.

    A request id makes every retry harmless, so an operation is unknown only if the time is over.
    """

    def __init__(self, cluster: LockCluster, name: str, history: History) -> None:
        self.cluster = cluster
        self.name = name
        self.history = history
        self._clients = [cluster.client(i) for i in range(cluster.size)]
        self._at = 0
        self._requests = 0

    async def acquire(
        self,
        lock: str,
        *,
        wait_ms: int = 10_000,
        ttl_ms: int | None = None,
        type: str = "exclusive",
    ) -> int | None:
        """The fencing token; None if it was refused or nothing is known."""
        body: dict[str, Any] = {"lock_name": lock, "lock_type": type, "wait_ms": wait_ms}
        argument: dict[str, Any] = {"type": type}
        if ttl_ms is not None:
            body["ttl_ms"] = argument["ttl_ms"] = ttl_ms
        operation = self.history.invoke(self.name, "acquire", lock, argument)
        reply = await self._persist("/acquire", body)
        if reply is None:
            self.history.unknown(operation)
            return None
        if reply.status != 200:
            self.history.fail(operation, reply.json)
            return None
        self.history.ok(operation, reply.json["fencing_token"])
        return reply.json["fencing_token"]

    async def release(self, lock: str) -> bool:
        operation = self.history.invoke(self.name, "release", lock)
        reply = await self._persist("/release", {"lock_name": lock})
        if reply is None:
            self.history.unknown(operation)
            return False
        (self.history.ok if reply.status == 200 else self.history.fail)(operation, reply.json)
        return reply.status == 200

    async def _persist(self, path: str, body: dict[str, Any]) -> Reply | None:
        """The definite answer to one request, however often it must be sent."""
        self._requests += 1
        body = {**body, "client_id": self.name, "request_id": f"r{self._requests}"}
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            outcome = await self._clients[self._at].post(path, body, timeout_s=12.0)
            match outcome:
                case Reply(status=307):
                    self._at = self._index_of(outcome.headers["location"])
                case Reply(status=503) | NoReply():
                    self._at = (self._at + 1) % self.cluster.size
                    await asyncio.sleep(0.02)
                case Reply():
                    return outcome
        return None

    def _index_of(self, location: str) -> int:
        return next(i for i in range(self.cluster.size) if location.startswith(self.cluster.url(i)))

    def close(self) -> None:
        for client in self._clients:
            client.close()


__all__ = ["Client", "HttpClient", "LockCluster", "make_cluster", "until"]
