"""Our lock manager as a contender: real `main.py` processes, default flags, durable."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from contender import HttpContender, expect_ok
from lean_client import LeanClient
from load import Sample, fast_loop

from processes import Server, free_ports, wait_until

MAIN = Path(__file__).resolve().parents[1] / "src" / "main.py"
RETRY_S = 0.005  # a client that found no leader asks again after this
PATIENCE_S = 0.1  # and asks elsewhere if a node does not answer for so long


class Ours(HttpContender):
    name = "ours"
    note = "durable on a majority before each answer"

    def __init__(self, scratch: Path, size: int = 3, flags: tuple[str, ...] = ()) -> None:
        super().__init__(scratch, size)
        ports = free_ports(2 * size)
        self.raft = [f"127.0.0.1:{port}" for port in ports[:size]]
        self.http = [f"127.0.0.1:{port}" for port in ports[size:]]
        self._flags = flags

    def start(self) -> None:
        for node in range(self.size):
            self._launch(node)
        wait_until("a leader", lambda: self.leader() is not None)

    def restart(self, node: int) -> None:
        self._launch(node)
        wait_until("the restarted node", lambda: self._caught_up(node))

    def leader(self) -> int | None:
        for node, server in enumerate(self.nodes):
            if server is not None and server.alive:
                try:
                    status = self.status(node)
                except OSError:
                    continue
                if status["state"] == "LEADER" and status["applied_index"] > 1:
                    return node
        return None

    def lead(self) -> int:
        """The leader, once there is one."""
        wait_until("a leader", lambda: self.leader() is not None)
        node = self.leader()
        return self.lead() if node is None else node

    def status(self, node: int) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.http[node]}/status", timeout=1) as answer:
            status: dict[str, Any] = json.load(answer)
        return status

    def server(self, node: int) -> Server:
        server = self.nodes[node]
        if server is None:
            raise RuntimeError(f"node {node} does not run")
        return server

    def _launch(self, node: int) -> None:
        self.nodes[node] = Server(
            [sys.executable, str(MAIN), f"--id=node{node}", f"--raft_addr={self.raft[node]}",
             f"--http_addr={self.http[node]}", f"--peers={','.join(self.raft)}",
             f"--peer_http_addrs={','.join(self.http)}",
             f"--data_dir={self.scratch}/node{node}", *self._flags],
            self.scratch / f"node{node}.log",
        )  # fmt: skip

    def _caught_up(self, node: int) -> bool:
        status = self.status(node)
        leader = self.leader()
        if leader is None or status["leader_id"] is None:
            return False
        behind: int = self.status(leader)["commit_index"] - status["applied_index"]
        return behind < 100

    # ---------------------------------------------------------------------------------- measures

    def pairs(self, clients: int, seconds: float, prefix: str = "own") -> Sample:
        return self._on_leader(clients, seconds, lambda c, i: _pair(c, f"{prefix}-{i}", i))

    def hand_overs(self, clients: int, seconds: float) -> Sample:
        return self._on_leader(clients, seconds, lambda c, i: _pair(c, "hot", i))

    def reads(self, clients: int, seconds: float) -> Sample:
        return self._on_leader(clients, seconds, _read)

    def _on_leader(
        self,
        clients: int,
        seconds: float,
        work_of: Callable[[LeanClient, int], Callable[[], Awaitable[None]]],
    ) -> Sample:
        async def prepared(client: LeanClient, number: int) -> Callable[[], Awaitable[None]]:
            return work_of(client, number)

        return self.run_on([self.http[self.lead()]], clients, seconds, prepared)

    # ------------------------------------------------------------------------------------ faults

    def successes_around_kill(self, before_s: float, after_s: float) -> tuple[float, list[float]]:
        leader = self.lead()

        def kill() -> None:
            self.server(leader).kill()
            self.nodes[leader] = None

        return self.successes_around(kill, before_s, after_s, [leader])

    def successes_around(
        self, fault: Callable[[], None], before_s: float, after_s: float, start_at: list[int]
    ) -> tuple[float, list[float]]:
        """Eight clients do pairs, first on the nodes `start_at`, and look for the leader whenever
        they lose it."""
        done: list[float] = []

        async def drive() -> float:
            until = time.perf_counter() + before_s + after_s
            clients = [
                asyncio.create_task(_persist(self.http, start_at[0], i, until, done))
                for i in range(8)
            ]
            await asyncio.sleep(before_s)
            at = time.perf_counter()
            fault()
            await asyncio.gather(*clients)
            return at

        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            at = runner.run(drive())
        return at, sorted(done)


def _pair(client: LeanClient, lock: str, number: int) -> Callable[[], Awaitable[None]]:
    body = b'{"lock_name":"%s","client_id":"c%d"}' % (lock.encode(), number)

    async def pair() -> None:
        expect_ok(await client.post(b"/acquire", body), "/acquire")
        expect_ok(await client.post(b"/release", body), "/release")

    return pair


def _read(client: LeanClient, number: int) -> Callable[[], Awaitable[None]]:
    path = b"/locks/own-%d" % number

    async def read() -> None:
        expect_ok(await client.get(path), "/locks")

    return read


async def _persist(
    addresses: list[str], node: int, number: int, until: float, done: list[float]
) -> None:
    """One client that keeps doing pairs, whatever happens to the nodes."""
    body = b'{"lock_name":"f%d","client_id":"c%d"}' % (number, number)
    client: LeanClient | None = None
    while time.perf_counter() < until:
        try:
            async with asyncio.timeout(PATIENCE_S):
                client = client or await LeanClient.connect(addresses[node])
                answers = [
                    await client.post(b"/acquire", body),
                    await client.post(b"/release", body),
                ]
        except (OSError, TimeoutError):
            node, client = _leave(client, (node + 1) % len(addresses))
            await asyncio.sleep(RETRY_S)
            continue
        statuses = {status for status, _ in answers}
        if statuses == {200}:
            done.append(time.perf_counter())
        elif 307 in statuses:
            leader = json.loads(answers[-1][1]).get("leader", "").removeprefix("http://")
            if leader in addresses and addresses.index(leader) != node:
                node, client = _leave(client, addresses.index(leader))
        else:
            await asyncio.sleep(RETRY_S)


def _leave(client: LeanClient | None, node: int) -> tuple[int, None]:
    if client is not None:
        client.close()
    return node, None
