"""The ring changes, and changes again, while machines are killed, paused, cut off, restarted and
lose their disk, and clients work; judged by total-queue. Half of the faults hit whoever comes or
goes. ``SOAK=5``: five minutes (skipped without; the simulation's ``phases`` does the same at every
run). ``CHAOS_SEED`` draws others.

Three nodes found the cluster, two stand by. The operator lets nodes in and out, calls changes off,
erases a machine as soon as a member says that it has left, and starts it again later as a new node.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, Reply
from testkit.history import History

from .nodes import configure, consumer, drained, judged, producer
from .ring_cluster import FOUNDERS, founded, joins

SOAK_MINUTES = float(os.environ.get("SOAK", "0"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600 + 120 * SOAK_MINUTES),
    pytest.mark.skipif(not SOAK_MINUTES, reason="a soak: SOAK=minutes"),
]

MACHINES = 5
QUEUES = ("alpha", "beta", "gamma", "delta")
OVER_WITHIN_S = 180.0
"""A change with nothing broken any more."""


class Operator:
    """Changes the ring, and breaks what takes part in it."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.doomed = self.rng.randrange(MACHINES)
        """Whose disk is lost, again and again: of every confirmed record another has a copy."""
        self.members = set(range(FOUNDERS))
        """Machines of the ring as last seen, whoever comes or goes included."""
        self.new: set[int] = set()
        """Started with an empty disk, and not yet seen in the ring."""
        self.met: dict[str, int] = {}
        self.addresses = [view.bind() for view in cluster.views]
        self.known = {addr: machine for machine, addr in enumerate(self.addresses)}
        self.mover: int | None = None
        """Who comes or goes just now: half of the faults are for it."""
        self.version = 0

    def hit(self, what: str) -> None:
        self.met[what] = self.met.get(what, 0) + 1

    async def ring(self) -> dict[str, Any] | None:
        """As some member knows it that is not behind what was seen before."""
        found: dict[str, Any] | None = None
        for index in self.rng.sample(sorted(self.members), len(self.members)):
            async with self.cluster.client(index) as client:
                reply = await client.get("/ring", timeout_s=1)
            if isinstance(reply, Reply) and reply.status == 200:
                shown: dict[str, Any] = reply.json
                if shown["version"] >= self.version and (
                    found is None or shown["version"] > found["version"]
                ):
                    found = shown
        if found is not None:
            self.version = found["version"]
            self.members = {self.known[node["addr"]] for node in found["nodes"]}
            change = found["change"]
            self.mover = self.known[change["addr"]] if change is not None else None
            self.new -= self.members
        return found

    async def ask(self, verb: str, machine: int) -> int:
        """Asks whoever it meets; the status, 0 without an answer."""
        index = self.rng.choice(sorted(self.members))
        async with self.cluster.client(index) as client:
            reply = await client.post(
                f"/admin/{verb}", {"addr": self.addresses[machine]}, timeout_s=3
            )
        return reply.status if isinstance(reply, Reply) else 0

    async def turn(self) -> None:
        """One change, or a part of one, and a fault in the middle of it."""
        rng = self.rng
        seen = await self.ring()
        if seen is None:
            return await self.strike()
        change = seen["change"]
        waiting = [machine for machine in range(MACHINES) if machine not in self.members]
        if change is None:
            for machine in waiting:
                if machine not in self.new:
                    self.erase(machine)
            if waiting and (len(self.members) <= FOUNDERS or rng.random() < 0.5):
                machine = rng.choice(waiting)
                if rng.random() < 0.5 or machine in self.new:
                    await self.ask("join", machine)
                if machine not in self.new:
                    self.new.add(machine)
                    joins(self.cluster, machine, sorted(self.members))
                    self.cluster.start(machine)
                    self.hit("join")
            else:
                status = await self.ask("leave", rng.choice(sorted(self.members)))
                self.hit("leave" if status == 202 else "leave refused")
        elif rng.random() < 0.15:
            machine = self.known[change["addr"]]
            other = "leave" if change["kind"] == "join" else "join"
            if await self.ask(other, machine) == 202:
                self.hit(f"{change['kind']} turned round")
        await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 0.4), rng.uniform(0, 2))))
        if rng.random() < 0.75:
            await self.strike()
        return None

    def erase(self, machine: int) -> None:
        """It is no member: it may be switched off, and what it had is not needed."""
        self.cluster.kill(machine)
        directory = self.cluster.views[machine].data_dir
        if directory.exists():
            shutil.rmtree(directory)
            self.hit("erased")

    async def strike(self) -> None:
        rng, cluster = self.rng, self.cluster
        running = [n for n in sorted(self.members) if cluster.nodes[n].running]
        if not running:
            return
        kind = rng.choice(("kill", "kill", "wipe", "stop", "pause", "cut", "isolate", "power"))
        victim = rng.choice(running)
        if self.mover in running and rng.random() < 0.5:
            victim = self.mover
        self.hit(f"{kind} of who moves" if victim == self.mover else kind)
        for_s = rng.uniform(0.1, 2.0)
        match kind:
            case "kill":
                cluster.kill(victim)
                await asyncio.sleep(for_s)
                cluster.start(victim)
            case "wipe":
                if self.doomed in running:
                    cluster.kill(self.doomed)
                    shutil.rmtree(cluster.views[self.doomed].data_dir, ignore_errors=True)
                    await asyncio.sleep(for_s / 2)
                    cluster.start(self.doomed)
            case "stop":
                await cluster.nodes[victim].terminate()
                await asyncio.sleep(for_s / 4)
                cluster.start(victim)
            case "pause":
                cluster.pause(victim)
                await asyncio.sleep(for_s)
                cluster.resume(victim)
            case "cut":
                other = rng.choice([n for n in range(MACHINES) if n != victim])
                ends = (victim, other) if rng.random() < 0.5 else (other, victim)
                break_ = cluster.cut if rng.random() < 0.5 else cluster.blackhole
                break_(*ends, one_way=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case "isolate":
                others = set(range(MACHINES)) - {victim}
                cluster.partition({victim}, others, silent=rng.random() < 0.5)
                await asyncio.sleep(for_s)
                cluster.heal()
            case _:
                for machine in running:
                    cluster.nodes[machine].kill_later()
                for machine in running:
                    cluster.kill(machine)
                await asyncio.sleep(for_s / 4)
                for machine in running:
                    cluster.start(machine)

    async def mend(self) -> None:
        """Nothing is broken any more: the change under way comes to its end, and all serve."""
        self.cluster.heal()
        give_up_s = time.monotonic() + OVER_WITHIN_S
        while True:
            for machine in self.members:
                if not self.cluster.nodes[machine].running:
                    self.cluster.start(machine)
            seen = await self.ring()
            if seen is not None and seen["change"] is None:
                break
            assert time.monotonic() < give_up_s, f"the change is stuck: {seen}"
            await asyncio.sleep(0.1)
        await asyncio.gather(*(self.cluster.ready(m, OVER_WITHIN_S) for m in self.members))


async def test_a_ring_that_changes_all_the_time_loses_nothing_and_brings_nothing_back(
    tmp_path: Path,
) -> None:
    history = History()
    stop = asyncio.Event()
    async with founded(tmp_path, MACHINES, proxied=True) as cluster:
        for queue in QUEUES:
            await configure(cluster, queue)
        operator = Operator(cluster, SEED)
        indices = range(MACHINES)
        work = [producer(cluster, history, n, stop, QUEUES, indices) for n in range(3)]
        work += [consumer(cluster, history, n, stop, QUEUES, indices) for n in range(3)]
        tasks = [asyncio.create_task(each) for each in work]
        until_s = time.monotonic() + 60 * SOAK_MINUTES
        turns = 0
        try:
            while time.monotonic() < until_s:
                await operator.turn()
                turns += 1
                if turns % 25 == 0:
                    await operator.mend()
            await operator.mend()
        except BaseException:
            history.save(tmp_path / "ring_chaos.jsonl")
            raise
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        stored = await drained(cluster, QUEUES, min(operator.members))
        told = f"seed {SEED}, {turns} turns, ring {operator.version}, {operator.met}"
        judged(history, stored, tmp_path / "ring_chaos.jsonl", told)
