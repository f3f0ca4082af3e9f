"""etcd as a contender: Debian's etcd-server, durable defaults, its HTTP/JSON gateway (`/v3/lock`).

Each client has a lease, as `etcdctl lock` has; `name/lease` is the key that an unlock deletes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from contender import HttpContender, expect_ok
from lean_client import LeanClient
from load import Sample, fast_loop

from processes import Server, free_ports, wait_until


def installed() -> bool:
    return shutil.which("etcd") is not None


class Etcd(HttpContender):
    name = "etcd"
    note = "durable defaults, HTTP gateway"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        ports = free_ports(2 * self.size)
        self._clients = [f"127.0.0.1:{port}" for port in ports[: self.size]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[self.size :]]

    def start(self) -> None:
        for node in range(self.size):
            self._launch(node)
        wait_until("etcd's leader", lambda: self.leader() is not None)

    def restart(self, node: int) -> None:
        self._launch(node)
        wait_until("the restarted etcd", lambda: self._status(node) is not None)
        time.sleep(2)  # it is asked for nothing while it catches up

    def leader(self) -> int | None:
        """Raises OSError while a running node does not answer."""
        members: dict[str, int] = {}
        leader = "0"
        for node, server in enumerate(self.nodes):
            if server is not None and server.alive:
                status = self._status(node)
                members[status["header"]["member_id"]] = node
                leader = status.get("leader", "0")
        return members.get(leader)

    def _launch(self, node: int) -> None:
        cluster = ",".join(f"n{i}={peer}" for i, peer in enumerate(self._peers))
        client, peer = f"http://{self._clients[node]}", self._peers[node]
        self.nodes[node] = Server(
            ["etcd", "--name", f"n{node}", "--data-dir", f"{self.scratch}/n{node}",
             "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
             "--initial-cluster", cluster, "--initial-cluster-state", "new",
             "--logger", "zap", "--log-outputs", "stderr"],
            self.scratch / f"n{node}.log",
        )  # fmt: skip

    def _status(self, node: int) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://{self._clients[node]}/v3/maintenance/status", b"{}"
        )
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310 - always http
            status: dict[str, Any] = json.load(answer)
        return status

    # ---------------------------------------------------------------------------------- measures

    def pairs(self, clients: int, seconds: float) -> Sample:
        return self._on_leader(clients, seconds, lambda c, i: _pair(c, f"own{i}"))

    def hand_overs(self, clients: int, seconds: float) -> Sample:
        return self._on_leader(clients, seconds, lambda c, _: _pair(c, "hot"))

    def reads(self, clients: int, seconds: float) -> Sample:
        async def prepared(client: LeanClient, number: int) -> Callable[[], Awaitable[None]]:
            body = json.dumps({"key": _b64(f"own{number}")}).encode()

            async def read() -> None:
                expect_ok(await client.post(b"/v3/kv/range", body), "range")

            return read

        return self._on_leader(clients, seconds, prepared)

    def _on_leader(
        self,
        clients: int,
        seconds: float,
        work_of: Callable[[LeanClient, int], Awaitable[Callable[[], Awaitable[None]]]],
    ) -> Sample:
        wait_until("etcd's leader", lambda: self.leader() is not None)
        leader = self.leader()
        addresses = self._clients if leader is None else [self._clients[leader]]
        return self.run_on(addresses, clients, seconds, work_of)

    def successes_around_kill(self, before_s: float, after_s: float) -> tuple[float, list[float]]:
        wait_until("etcd's leader", lambda: self.leader() is not None)
        leader = self.leader() or 0
        survivors = [a for i, a in enumerate(self._clients) if i != leader]
        done: list[float] = []

        async def drive() -> float:
            until = time.perf_counter() + before_s + after_s
            tasks = [asyncio.create_task(_persist(survivors, i, until, done)) for i in range(8)]
            await asyncio.sleep(before_s)
            at = time.perf_counter()
            server = self.nodes[leader]
            if server is not None:
                server.kill()
            self.nodes[leader] = None
            await asyncio.gather(*tasks)
            return at

        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            at = runner.run(drive())
        return at, sorted(done)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def _bodies(client: LeanClient, lock: str) -> tuple[bytes, bytes]:
    """What locks and unlocks `lock` under a new lease."""
    answer = expect_ok(await client.post(b"/v3/lease/grant", b'{"TTL":60}'), "lease")
    lease = int(json.loads(answer)["ID"])
    return (
        json.dumps({"name": _b64(lock), "lease": str(lease)}).encode(),
        json.dumps({"key": _b64(f"{lock}/{lease:x}")}).encode(),
    )


async def _pair(client: LeanClient, lock: str) -> Callable[[], Awaitable[None]]:
    acquire, release = await _bodies(client, lock)

    async def pair() -> None:
        expect_ok(await client.post(b"/v3/lock/lock", acquire), "lock")
        expect_ok(await client.post(b"/v3/lock/unlock", release), "unlock")

    return pair


async def _persist(addresses: list[str], number: int, until: float, done: list[float]) -> None:
    client = await LeanClient.connect(addresses[number % len(addresses)])
    acquire, release = await _bodies(client, f"f{number}")
    while time.perf_counter() < until:
        try:
            async with asyncio.timeout(0.3):
                locked, _ = await client.post(b"/v3/lock/lock", acquire)
                freed, _ = await client.post(b"/v3/lock/unlock", release)
        except (OSError, TimeoutError):
            client.close()
            client = await LeanClient.connect(addresses[number % len(addresses)])
            continue
        if locked == freed == 200:
            done.append(time.perf_counter())
        else:
            await asyncio.sleep(0.02)
