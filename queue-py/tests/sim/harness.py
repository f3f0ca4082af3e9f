"""The replication core in a simulated cluster: what is run, with which faults. ``sim_node.py`` has
the nodes, ``sim_judge.py`` the clients and the judge.

``make sim SERVICE=queue SEED=7`` replays a run.
"""

from __future__ import annotations

from sim_judge import Stopping
from sim_node import wire

from testkit.sim import (
    PERFECT,
    ROUGH,
    Faults,
    LinkSettings,
    Scenario,
)

CALM = Scenario(
    "calm",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=3_000,
    settle_ms=4_000,
    wire=wire,
)

FAULTS = Scenario(
    "faults",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(
        crash=4,
        stop=0,
        pause=2,
        partition=2,
        isolate=2,
        one_way=2,
        power_cut=1,
        sync_failure=1,
        wall_jump=1,
        drift_ppm=2_000,
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)


WIPES = Scenario(
    "wipes",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(
        crash=2, pause=1, isolate=1, wipe=3, power_cut=1, stop=1, max_wipes=1, every_ms=(100, 1_000)
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)


class Rotting(Stopping):
    """Records of one node's log rot while it is down."""

    def begin(self) -> None:
        super().begin()
        victim = self.world.rng.choice(self.world.names)
        for at_ms in (1_200.0, 2_600.0):
            self.world.clock.call_later(at_ms + self.world.rng.uniform(0, 600), self.rot, victim)

    def rot(self, victim: str) -> None:
        self.world.crash(victim)
        for partition, shadow in self.shadows[victim].items():
            self.rotten.setdefault((victim, partition), []).append(shadow)
        disk = self.world.disks[victim]
        for _ in range(self.world.rng.randint(1, 4)):
            records = len(disk.log("log"))
            if records > 1:
                disk.corrupt(self.world.rng.randrange(records - 1), "log")
        self.world.start(victim)


DAMAGE = Scenario(
    "damage",
    nodes=("n1", "n2", "n3"),
    harness=Rotting,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(crash=2, pause=1, isolate=1, one_way=1, power_cut=1, stop=1),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)

FIVE = Scenario(
    "five",
    nodes=("n1", "n2", "n3", "n4", "n5"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(crash=4, pause=2, partition=3, one_way=2, wipe=1, power_cut=1, drift_ppm=2_000),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)
