"""Histories under faults on real processes, judged per key: every one must be linearizable.

`SOAK=1` goes on for `SOAK_MINUTES` (default 10) with one fault after the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from testkit.checkers import linearizable
from testkit.cluster import Cluster

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import Recorder, argv, linked, until

pytestmark = pytest.mark.cluster
KEYS = [f"h{number}" for number in range(6)]  # homes on every node
PER_ROUND = 40


class Load:
    """Six clients; whoever is not answered goes on at the next node."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.recorder = Recorder()
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._stop = False

    async def client(self, number: int) -> None:
        recorder, rng = self.recorder, self._rng
        me, at = f"c{number}", number % self._cluster.size
        while not self._stop:
            async with self._cluster.client(at) as http:
                for _ in range(12):
                    key = rng.choice(KEYS)
                    match rng.choices("rwi", (6, 3, 1))[0]:
                        case "r":
                            answered = await recorder.read(http, me, key) is not None
                        case "w":
                            answered = await recorder.write(http, me, key) is not None
                        case _:
                            await recorder.incr(http, me, key)
                            answered = True
                    if self._stop or not answered:
                        break
                    await asyncio.sleep(0.002)
            at = (at + 1) % self._cluster.size

    async def more(self, count: int) -> None:
        """So many more calls are begun."""
        goal = len(self.recorder.history) + count

        async def reached() -> bool:
            return len(self.recorder.history) >= goal

        await until(reached, "the load goes on", 40)

    def end(self) -> None:
        self._stop = True


@asynccontextmanager
async def load_on(cluster: Cluster, seed: int = 0) -> Any:
    load = Load(cluster, seed)
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(load.client(number))
        await load.more(PER_ROUND)
        yield load
        load.end()
    history = load.recorder.history
    linearizable.check(history, linearizable.VersionedRegister()).require()


async def paused(cluster: Cluster, load: Load) -> None:
    """SIGSTOP for longer than a lease: it must come back without an old value."""
    cluster.pause(1)
    await load.more(PER_ROUND // 2)
    await asyncio.sleep(1.2)  # longer than a lease: what is tested is that time has passed
    cluster.resume(1)


async def isolated(cluster: Cluster, load: Load) -> None:
    """A node whose links are silent both ways, while clients still reach it."""
    cluster.partition([0, 1], [2], silent=True)
    await load.more(PER_ROUND // 2)
    await asyncio.sleep(1.2)
    await load.more(PER_ROUND // 2)
    cluster.heal()


async def cut_one_way(cluster: Cluster, load: Load) -> None:
    """What node 0 sends no longer reaches node 1."""
    cluster.cut(0, 1, one_way=True)
    await load.more(PER_ROUND // 2)
    await asyncio.sleep(1.2)
    await load.more(PER_ROUND // 2)
    cluster.heal()


async def killed(cluster: Cluster, load: Load) -> None:
    """kill -9 of a node that is home of some keys and owner of others."""
    cluster.kill(0)
    await load.more(PER_ROUND // 2)
    await cluster.start_all()


async def all_killed(cluster: Cluster, load: Load) -> None:
    """kill -9 of all of them at the same moment."""
    cluster.power_cut()
    await cluster.start_all()


FAULTS: list[Callable[[Cluster, Load], Awaitable[None]]] = [
    paused, isolated, cut_one_way, killed, all_killed,
]  # fmt: skip


async def test_one_fault_after_the_other_under_load_stays_linearizable(tmp_path: Path) -> None:
    """No read is ever stale and no acknowledged write is ever lost, whatever happened before."""
    minutes = float(os.environ.get("SOAK_MINUTES", "10")) if os.environ.get("SOAK") else 0.0
    async with Cluster(argv(), 3, root=tmp_path, proxied=("http",)) as cluster:
        await linked(cluster)
        seed, until_s = 0, time.monotonic() + 60 * minutes
        while not seed or time.monotonic() < until_s:
            order = list(FAULTS)
            random.Random(seed).shuffle(order)
            async with load_on(cluster, seed) as load:
                for fault in order:
                    await fault(cluster, load)
                    await linked(cluster)
                    await load.more(PER_ROUND)
                history = load.recorder.history
            kinds = {operation.status for operation in history}
            print(f"seed {seed}: {len(history)} calls, {sorted(map(str, kinds))}, linearizable")
            seed += 1
