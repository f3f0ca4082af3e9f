"""Everything at once on real nodes: kills, stops, pauses, cuts in any direction, power cuts, while
clients produce, consume and ack; judged by total-queue.

Five seconds by default; ``SOAK=5`` goes on for five minutes, ``CHAOS_SEED`` draws others. Faults
are drawn from the seed, their interleaving with the clients is the machine's: a failure is kept as
``chaos.jsonl`` in pytest's folder.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from testkit.cluster import Cluster
from testkit.history import History

from .nodes import configure, consumer, drained, judged, producer, queue_cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(60 + 90 * float(os.environ.get("SOAK", "0"))),
]

QUEUES = ("alpha", "beta")


class Chaos:
    """Breaks one thing after the other, and mends it."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.doomed = self.rng.randrange(3)
        """Whose disk is lost, again and again."""
        self.met: dict[str, int] = {}

    async def strike(self) -> None:
        rng, cluster = self.rng, self.cluster
        kinds = ("kill", "wipe", "stop", "pause", "cut", "blackhole", "isolate", "power")
        kind = rng.choice(kinds)
        self.met[kind] = self.met.get(kind, 0) + 1
        victim, other = rng.sample(range(3), 2)
        for_s = rng.uniform(0.2, 1.8)
        match kind:
            case "kill":
                cluster.kill(victim)
                await asyncio.sleep(for_s / 2)
                cluster.start(victim)
            case "wipe":
                # Always the same one: of every confirmed record another replica has a copy, however
                # far the last refill had come.
                cluster.kill(self.doomed)
                shutil.rmtree(cluster.views[self.doomed].data_dir, ignore_errors=True)
                await asyncio.sleep(for_s / 2)
                cluster.start(self.doomed)
            case "stop":
                await cluster.ready(victim)  # before its handlers stand, SIGTERM just ends it
                assert await cluster.nodes[victim].terminate() == 0
                cluster.start(victim)
            case "pause":
                cluster.pause(victim)
                await asyncio.sleep(for_s)
                cluster.resume(victim)
            case "cut":
                cluster.cut(victim, other, one_way=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "blackhole":
                cluster.blackhole(victim, other, one_way=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "isolate":
                cluster.partition({victim}, {0, 1, 2} - {victim}, silent=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "power":
                cluster.power_cut()
                for index in range(3):
                    cluster.start(index)
        await asyncio.sleep(rng.uniform(0.1, 1.0))

    async def mend(self) -> None:
        self.cluster.heal()
        await self.cluster.start_all()


async def test_chaos_loses_nothing_and_brings_nothing_back(tmp_path: Path) -> None:
    soak_minutes = float(os.environ.get("SOAK", "0"))
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    history = History()
    stop = asyncio.Event()
    async with queue_cluster(tmp_path, proxied=True) as cluster:
        for queue in QUEUES:
            await configure(cluster, queue)
        work = [
            asyncio.create_task(producer(cluster, history, n, stop, QUEUES, range(3)))
            for n in range(3)
        ]
        work += [
            asyncio.create_task(consumer(cluster, history, n, stop, QUEUES, range(3)))
            for n in range(3)
        ]
        chaos = Chaos(cluster, seed)
        until_s = time.monotonic() + (60 * soak_minutes or 5)
        try:
            while time.monotonic() < until_s:
                await chaos.strike()
            await chaos.mend()
        finally:
            stop.set()
            await asyncio.gather(*work)
        stored = await drained(cluster, QUEUES)
        judged(history, stored, tmp_path / "chaos.jsonl", f"seed {seed}, faults {chaos.met}")
