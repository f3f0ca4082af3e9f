"""Clients for the chaos test: each does a little of everything, knows the outcome of each step
before the next, and asserts at once what no checker of whole histories can see."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import Any

from lock_manager.client import LeaseLost, LockClient, LockHeld, LockTimeout, Unavailable
from testkit.cluster import NoReply, Reply
from testkit.history import History

from .lock_cluster import Client, LockCluster

# Judged by a search over all orders: nothing but acquire, release and read changes them.
FOREVER = ("x0", "x1")
SEMAPHORE = "s"
LEASED = ("l0", "l1")
TTL_MS = 1_500
LIMIT = 3


class ChaosClient(Client):
    """Retries with the same ids for as long as it takes: no outcome stays unknown."""

    patience_s = 120.0
    answer_within_s = 3.0

    def __init__(self, cluster: LockCluster, name: str, history: History, seed: int) -> None:
        super().__init__(cluster, name, history)
        self.rng = random.Random(f"{seed}/{name}")
        self.met: dict[str, int] = {}

    def cover(self, what: str) -> None:
        self.met[what] = self.met.get(what, 0) + 1

    async def work(self, stop: asyncio.Event) -> None:
        turns = (self.plain, self.plain, self.several, self.permits, self.leased, self.upgrade)
        while not stop.is_set():
            await self.rng.choice(turns)()
            await asyncio.sleep(self.rng.uniform(0, 0.03))
        self.close()

    # -------------------------------------------------------------------------------- the turns

    async def plain(self) -> None:
        name = self.rng.choice(FOREVER)
        kind = self.rng.choice(("exclusive", "exclusive", "shared"))
        token = await self.take([{"lock_name": name, "lock_type": kind}])
        if token is None:
            return
        # It has no lease: nobody but this client can end it.
        assert await self.is_valid(name, token)
        await asyncio.sleep(self.rng.uniform(0, 0.02))
        await self.give_back(name)
        assert not await self.is_valid(name, token)

    async def several(self) -> None:
        """Both or none; taken one after the other they would often be a deadlock."""
        asks = [{"lock_name": name, "lock_type": "exclusive"} for name in FOREVER]
        if self.rng.random() < 0.5:
            if await self.take(asks) is not None:
                for name in FOREVER:
                    await self.give_back(name)
            return
        taken = []
        for ask in self.rng.sample(asks, 2):
            if await self.take([ask]) is None:
                break
            taken.append(ask["lock_name"])
        for name in taken:
            await self.give_back(name)

    async def permits(self) -> None:
        ask = {"lock_name": SEMAPHORE, "lock_type": "semaphore", "limit": LIMIT}
        ask["permits"] = self.rng.choice((1, 2))
        if await self.take([ask]) is not None:
            await asyncio.sleep(self.rng.uniform(0, 0.02))
            await self.give_back(SEMAPHORE)

    async def upgrade(self) -> None:
        name = self.rng.choice(FOREVER)
        before = await self.take([{"lock_name": name, "lock_type": "shared"}])
        if before is None:
            return
        after = await self.take([{"lock_name": name, "lock_type": "exclusive"}], wait_ms=300)
        if after is not None:
            assert after > before
            self.cover("upgrades")
        await self.give_back(name)

    async def leased(self) -> None:
        name = self.rng.choice(LEASED)
        began_s = time.monotonic()
        token = await self.take([{"lock_name": name, "lock_type": "exclusive"}], ttl_ms=TTL_MS)
        if token is None:
            return
        if self.rng.random() < 0.5:
            asked_s = time.monotonic()
            operation = self.history.invoke(self.name, "keepalive", "", {"ttl_ms": TTL_MS})
            reply = await self._persist("/keepalive", {"ttl_ms": TTL_MS}, request=False)
            if reply is not None and reply.status == 200:
                self.history.ok(operation)
                self.cover("renewals")
                began_s = asked_s
            else:
                self.history.unknown(operation)
        valid = await self.is_valid(name, token)
        # By the client's own count of its lease; the cluster's is never shorter.
        assert valid or time.monotonic() - began_s > TTL_MS / 1000 - 0.005
        if self.rng.random() < 0.8:
            await self.give_back(name)
        else:
            self.cover("left to expire")

    # ---------------------------------------------------------------------------- the single steps

    async def take(
        self, asks: list[dict[str, Any]], *, wait_ms: int | None = None, ttl_ms: int | None = None
    ) -> int | None:
        wait_ms = self.rng.choice((0, 200, 1_000)) if wait_ms is None else wait_ms
        body: dict[str, Any] = {"wait_ms": wait_ms}
        body |= asks[0] if len(asks) == 1 else {"locks": asks}
        if ttl_ms is not None:
            body["ttl_ms"] = ttl_ms
        operations = []
        for ask in asks:
            argument = {"type": ask["lock_type"], "together": f"{self.name}/{self._requests}"}
            argument |= {key: ask[key] for key in ("permits", "limit") if key in ask}
            if ttl_ms is not None:
                argument["ttl_ms"] = ttl_ms
            name = ask["lock_name"]
            operations.append(self.history.invoke(self.name, "acquire", name, argument))
        reply = await self._persist("/acquire", body)
        assert reply is not None, "no definite answer, though the cluster was healed"
        answer = reply.json
        if reply.status == 200:
            self.cover(" and ".join(ask["lock_type"] for ask in asks))
            for operation in operations:
                self.history.ok(operation, answer["fencing_token"])
            return int(answer["fencing_token"])
        assert reply.status == 409, reply
        self.cover(answer["status"])
        for operation in operations:
            if answer["status"] == "lost":  # it was granted, and taken back before we heard of it
                self.history.unknown(operation)
                self.history.invoke(self.name, "release", operation.key)
            else:
                self.history.fail(operation, answer)
        return None

    async def give_back(self, name: str) -> None:
        operation = self.history.invoke(self.name, "release", name)
        reply = await self._persist("/release", {"lock_name": name})
        assert reply is not None
        assert reply.status in (200, 409), reply
        self.history.ok(operation, reply.status == 200)
        assert reply.status == 200 or name in LEASED, "a lock without a lease was lost"

    async def is_valid(self, name: str, token: int) -> bool:
        reply = await self.look(f"/validate?lock_name={name}&fencing_token={token}")
        return bool(reply.json["valid"])

    async def look(self, path: str) -> Reply:
        """A linearizable GET, asked until it is answered."""
        deadline = time.monotonic() + self.patience_s
        while True:
            outcome = await self._clients[self._at].get(path, timeout_s=self.answer_within_s)
            if isinstance(outcome, Reply) and outcome.status == 200:
                return outcome
            assert time.monotonic() < deadline, outcome
            await self._go_elsewhere(outcome)

    async def watch(self, stop: asyncio.Event) -> None:
        """Reads, and nothing else."""
        while not stop.is_set():
            name = self.rng.choice(FOREVER)
            operation = self.history.invoke(self.name, "read", name)
            shown = (await self.look(f"/locks/{name}")).json["holders"]
            self.history.ok(operation, {one["client_id"]: one["fencing_token"] for one in shown})
            self.cover("reads")
            await asyncio.sleep(self.rng.uniform(0, 0.03))
        self.close()

    async def _persist(
        self, path: str, body: dict[str, Any], *, request: bool = True
    ) -> Reply | None:
        self._requests += 1
        body = {**body, "client_id": self.name}
        if request:
            body["request_id"] = f"r{self._requests}"
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            outcome = await self._clients[self._at].post(path, body, timeout_s=self.answer_within_s)
            if isinstance(outcome, Reply) and outcome.status not in (307, 503):
                return outcome
            self.cover("retries")
            await self._go_elsewhere(outcome)
        return None

    async def _go_elsewhere(self, outcome: Reply | NoReply) -> None:
        if isinstance(outcome, Reply) and outcome.status == 307:
            self._at = self._index_of(outcome.headers["location"])
        else:
            self._at = (self._at + 1) % self.cluster.size
            await asyncio.sleep(0.02)


async def use_lock_client(
    cluster: LockCluster, name: str, history: History, stop: asyncio.Event, met: dict[str, int]
) -> None:
    """The library against everything: while a body runs and its lease counts, nobody else has the
    lock. The lease's end is the library's own reckoning, which a slow loop here cannot falsify."""
    async with LockClient(cluster.urls, client_id=name) as client:
        while not stop.is_set():
            operation = history.invoke(name, "acquire", "k")
            until_s = 0.0
            try:
                async with client.lock("k", ttl_ms=TTL_MS, wait_ms=2_000) as held:
                    history.ok(operation, held.fencing_token)
                    try:
                        await asyncio.sleep(random.uniform(0, 0.1))
                    finally:
                        until_s = held._until_s
                        left_ms = until_s * 1e3 - operation.invoked_us / 1e3
                        operation.argument = {"ttl_ms": max(0.0, left_ms)}
                        history.invoke(name, "release", "k")  # it does not say how that ended
                met["bodies"] = met.get("bodies", 0) + 1
            except LeaseLost:
                met["LeaseLost"] = met.get("LeaseLost", 0) + 1
            except (LockHeld, LockTimeout):
                history.fail(operation)
            except Unavailable:
                met["Unavailable"] = met.get("Unavailable", 0) + 1
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.02)
