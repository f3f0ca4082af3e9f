"""Everything at once on real nodes: kills, pauses, cuts in any direction, partitions, power cuts,
while clients take locks of all kinds; judged by exclusion, fencing and linearizability.

Ten seconds by default; `SOAK=5` goes on for five minutes, `CHAOS_SEED` draws other faults. Their
interleaving with the clients is the machine's: a failure leaves `chaos.jsonl` in pytest's folder.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from testkit.checkers import linearizable, locks
from testkit.history import History

from .chaos_clients import FOREVER, SEMAPHORE, ChaosClient, use_lock_client
from .lock_cluster import LockCluster, make_cluster, until

SOAK_S = 60 * float(os.environ.get("SOAK", "0")) or 8.0
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240 + 2 * SOAK_S)]
ALL = frozenset(range(3))
PATIENCE_S = 60.0


class Chaos:
    """Breaks one thing after the other, and mends it."""

    def __init__(self, cluster: LockCluster, seed: int, history: History) -> None:
        self.cluster = cluster
        self.history = history
        self.rng = random.Random(seed)
        self.met: Counter[str] = Counter()
        # Each once, in any order, then whatever comes.
        self.first = ["kill the leader", "pause", "one way", "partition", "power cut", "isolate"]
        self.rng.shuffle(self.first)

    async def strike(self) -> None:
        rng, cluster = self.rng, self.cluster
        kind = self.first.pop() if self.first else rng.choice(KINDS)
        self.met[kind] += 1
        victim, other = rng.sample(sorted(ALL), 2)
        for_s = rng.uniform(0.2, 1.2)
        if kind in ("kill the leader", "pause", "isolate", "one way") and rng.random() < 0.8:
            found = [i for i in sorted(ALL) if (await cluster.status(i)).get("state") == "LEADER"]
            victim = found[0] if found else victim
            other = rng.choice(sorted(ALL - {victim}))
        match kind:
            case "kill the leader":
                cluster.kill(victim)
                await asyncio.sleep(for_s)
                cluster.start(victim)
            case "pause":
                cluster.pause(victim)
                await asyncio.sleep(for_s)
                cluster.resume(victim)
            case "one way":
                cluster.blackhole(victim, other, one_way=True)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "partition":
                cluster.cut(victim, other)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "isolate":
                cluster.partition({victim}, ALL - {victim}, silent=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "power cut":
                cluster.power_cut()
                for index in sorted(ALL):
                    cluster.start(index)
            case "two at once":
                cluster.pause(victim)
                cluster.kill(other)
                await asyncio.sleep(for_s / 2)
                cluster.resume(victim)
                cluster.start(other)
        await asyncio.sleep(rng.uniform(0.1, 0.6))

    async def go_on_for(self, seconds: float) -> None:
        """Strikes once or twice, then lets the clients get somewhere, however slow the machine is:
        what never works shows nothing."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or self.first:
            await self.strike()
            if self.rng.random() < 0.7:
                done = len(self.history)
                await until(lambda done=done: len(self.history) > done + 10, PATIENCE_S)
        for index in sorted(ALL):
            await self.cluster.ready(index)


KINDS = ("kill the leader", "pause", "one way", "partition", "isolate", "power cut", "two at once")


async def test_whatever_breaks_nobody_shares_what_is_exclusive_and_reads_tell_the_truth(
    tmp_path: Path,
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", str(random.randrange(1 << 32))))
    history = History()
    met: Counter[str] = Counter()
    more = ("--snapshot_entries=150",)
    async with make_cluster(tmp_path, proxied=True, more=more) as cluster:
        stop = asyncio.Event()
        clients = [ChaosClient(cluster, f"c{i}", history, seed) for i in range(5)]
        watcher = ChaosClient(cluster, "watcher", history, seed)
        chaos = Chaos(cluster, seed, history)
        try:
            async with asyncio.TaskGroup() as tasks:
                for client in clients:
                    tasks.create_task(client.work(stop))
                tasks.create_task(watcher.watch(stop))
                for name in ("ann", "bob"):
                    tasks.create_task(use_lock_client(cluster, name, history, stop, met))
                await until(lambda: len(history) > 100, PATIENCE_S)
                await chaos.go_on_for(SOAK_S)
                done = len(history)
                await until(lambda: len(history) > done + 100, PATIENCE_S)
                stop.set()
            for client in (*clients, watcher):
                met.update(client.met)
            await all_nodes_agree(cluster)
        finally:
            history.save(tmp_path / "chaos.jsonl")
            print(f"seed {seed}: {len(history)} operations, {dict(chaos.met)}, {dict(met)}")
    locks.check(history, slack_ms=2).require()
    searched = [o for o in history if o.key in (*FOREVER, SEMAPHORE)]
    linearizable.check(searched, linearizable.Lock()).require()
    wanted = ("exclusive", "shared", "semaphore", "exclusive and exclusive", "retries", "reads")
    assert all(met[what] for what in (*wanted, "renewals", "bodies")), met


async def all_nodes_agree(cluster: LockCluster) -> None:
    """Once all have applied the same, all know the same holders."""

    async def agreed() -> bool:
        states = [await cluster.status(index) for index in sorted(ALL)]
        if len({state.get("applied_index") for state in states}) != 1 or not states[0]:
            return False
        held = []
        for index in sorted(ALL):
            shown = (await cluster.ask(index, "/locks?consistency=stale")).json["locks"]
            held.append(
                {
                    (lock["lock_name"], hold["client_id"], hold["fencing_token"])
                    for lock in shown
                    for hold in lock["holders"]
                }
            )
        return held[0] == held[1] == held[2]

    await until(agreed)
