"""Clients on all nodes whose calls become a history, and the faults under which they go on."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from cache_nodes import LEASE_MS, Recorder, until

from testkit.checkers import linearizable
from testkit.cluster import Cluster, HttpClient, Reply
from testkit.cluster.http import Outcome

KEYS = 10  # with homes on every node
CLIENTS = 6
PATIENT_S, HASTY_S = 8.0, 0.3  # most of the clients do not wait for an answer that is slow
HOLD_S = LEASE_MS / 1000 + 0.2  # longer than a lease: what is tested is that time has passed
BUSY_S = 120.0  # how long a node may take to start where others use the processor


async def ask(
    http: HttpClient, path: str, body: object, name: str | None, limit_s: float
) -> Outcome:
    """POST, under an Idempotency-Key if there is one."""
    return await http.request(
        "POST", path, body=json.dumps(body).encode(), timeout_s=limit_s,
        headers={"Idempotency-Key": name} if name else None,
    )  # fmt: skip


class Load:
    """Each client goes on at the next node after a few calls, or when it is not answered."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.recorder = Recorder()
        self.asked_again = 0
        self._cluster = cluster
        self._seed = seed
        self._keys = [
            f"{seed}-h{number}" for number in range(KEYS)
        ]  # a history begins with nothing
        self._stop = False
        self._names = 0
        self._versions: dict[str, int] = {}  # as somebody last heard, for compare-and-set
        self._answered: list[tuple[str, dict[str, Any], str, tuple[int, Any]]] = []

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        me, at = f"c{number}", number % self._cluster.size
        while not self._stop:
            async with self._cluster.client(at) as http:
                for _ in range(12):
                    reply = await self._one(http, me, rng, HASTY_S if number % 3 else PATIENT_S)
                    if self._stop or reply is None:
                        break
                    await asyncio.sleep(0.002)
            await asyncio.sleep(0.02)
            at = (at + 1) % self._cluster.size

    async def _one(
        self, http: HttpClient, me: str, rng: random.Random, limit_s: float
    ) -> Reply | None:
        recorder, key = self.recorder, rng.choice(self._keys)
        match rng.choices(
            ("read", "write", "incr", "cas", "delete", "again"), (60, 20, 10, 6, 2, 3)
        ):
            case ["read"]:
                reply = await recorder.read(http, me, key, limit_s)
                if reply is not None and reply.status in (200, 404):
                    self._versions[key] = reply.json.get("version", 0)
                return reply
            case ["write"]:
                return await recorder.write(http, me, key, limit_s)
            case ["again"]:
                return await self._same_answer(http, rng, limit_s)
            case ["cas"]:
                body = {"key": key, "expected_version": self._versions.get(key, 0)}
                body["value"] = recorder.fresh()
                return await self._named("/cas", body, http, me, rng, limit_s)
            case ["delete"]:
                return await self._named("/delete", {"key": key}, http, me, rng, limit_s)
            case _:
                return await self._named("/incr", {"key": key, "by": 1000}, http, me, rng, limit_s)

    async def _named(
        self, path: str, body: dict[str, Any], http: HttpClient, me: str, rng: random.Random,
        limit_s: float,
    ) -> Reply | None:  # fmt: skip
        """Half of these have a name, under which the next node is asked if this one fails."""
        call = self.recorder.begin(me, path, body)
        self._names += 1
        name = f"{self._seed}-{self._names}" if rng.random() < 0.5 else None
        reply = await ask(http, path, body, name, limit_s)
        definite = reply.definite
        for _ in range(3):
            answered = isinstance(reply, Reply) and reply.status < 500
            if name is None or answered or self._stop:
                break
            self.asked_again += 1
            async with self._cluster.client(rng.randrange(self._cluster.size)) as other:
                reply = await ask(other, path, body, name, limit_s)
            definite = definite and reply.definite
        self.recorder.end(call, reply, definite=definite)
        if not isinstance(reply, Reply):
            return None
        if name is not None and reply.status < 500:
            self._answered.append((path, body, name, (reply.status, reply.json)))
        return reply

    async def _same_answer(
        self, http: HttpClient, rng: random.Random, limit_s: float
    ) -> Reply | None:
        """A named change is asked for again long after it was answered."""
        if not self._answered:
            return None
        path, body, name, first = rng.choice(self._answered)
        reply = await ask(http, path, body, name, limit_s)
        if not isinstance(reply, Reply):
            return None
        if reply.status < 500:
            assert (reply.status, reply.json) == first, (path, body, name, first, reply)
        return reply

    async def more(self, count: int) -> None:
        """So many more calls are begun."""
        goal = len(self.recorder.history) + count

        async def reached() -> bool:
            return len(self.recorder.history) >= goal

        await until(reached, "the load goes on", BUSY_S)

    def end(self) -> None:
        self._stop = True


@asynccontextmanager
async def load_on(
    cluster: Cluster, seed: int, *, undecided: Callable[[str], None] | None = None
) -> AsyncIterator[Load]:
    """The load runs inside; what it has seen must be linearizable, key by key.

    `undecided` is told if so many changes of a key have an unknown outcome that the checker cannot
    try all orders; without it that is an error as well.
    """
    load = Load(cluster, seed)
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(load.client(number))
        yield load
        load.end()
    history = load.recorder.history
    verdict = linearizable.check(history, linearizable.VersionedRegister())
    if verdict.valid is None and undecided is not None:
        undecided(str(verdict))
    else:
        verdict.require()


# --- faults: each holds while its context is open ---------------------------------------------

Fault = AbstractAsyncContextManager[None]


@asynccontextmanager
async def paused(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """SIGSTOP for longer than a lease: it must come back without an old value."""
    cluster.pause(node)
    try:
        yield
    finally:
        cluster.resume(node)


@asynccontextmanager
async def isolated(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """A node whose links are silent both ways, while clients still reach it. What was sent
    meanwhile arrives late."""
    for other in range(cluster.size):
        if other != node:
            cluster.blackhole(node, other)
    try:
        yield
    finally:
        cluster.heal()


@asynccontextmanager
async def cut_one_way(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """What `node` sends no longer reaches the next one: reset and refused."""
    cluster.cut(node, (node + 1) % cluster.size, one_way=True)
    try:
        yield
    finally:
        cluster.heal()


@asynccontextmanager
async def silent_one_way(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """What `node` sends to the next one is swallowed until later, while answers come in."""
    cluster.blackhole(node, (node + 1) % cluster.size, one_way=True)
    try:
        yield
    finally:
        cluster.heal()


@asynccontextmanager
async def killed(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """kill -9 of a node that is home of some keys and owner of others."""
    cluster.kill(node)
    try:
        yield
    finally:
        await cluster.start_all(BUSY_S)


@asynccontextmanager
async def restarted(cluster: Cluster, node: int) -> AsyncIterator[None]:
    """SIGTERM: it gives its lines back, and comes again."""
    await cluster.nodes[node].terminate(BUSY_S)
    try:
        yield
    finally:
        await cluster.start_all(BUSY_S)


async def all_killed(cluster: Cluster) -> None:
    """kill -9 of all of them at the same moment."""
    cluster.power_cut()
    await cluster.start_all(BUSY_S)


FAULTS = (paused, isolated, cut_one_way, silent_one_way, killed, restarted)
