"""The pair machine in a simulated world: scenarios (`make sim SERVICE=secure SEED=7` replays)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from pair_harness import PairHarness, Settings  # noqa: E402 - the path comes first
from pair_node import SimNode  # noqa: E402 - the path comes first
from pair_streams import wire  # noqa: E402 - the path comes first

from secure_store.core.messages import Mode, Role  # noqa: E402 - the path comes first
from testkit.sim import (  # noqa: E402 - the path comes first
    PERFECT,
    ROUGH,
    TIMED_OUT,
    DiskSettings,
    Faults,
    LinkSettings,
    Scenario,
)

FIFO = LinkSettings(delay_ms=(0.1, 1.0), slow=0.02, slow_ms=40.0, fifo=True)


class StrictHarness(PairHarness):
    settings = Settings(Mode.STRICT)


class PromotingHarness(PairHarness):
    settings = Settings(Mode.AVAILABLE, promotes=True)


class StrictPromotingHarness(PairHarness):
    settings = Settings(Mode.STRICT, promotes=True)


class ForcedHarness(PairHarness):
    settings = Settings(Mode.AVAILABLE, promotes=True, force=True)


class WipedReplicaHarness(PairHarness):
    """The replica's disk is lost, twice; the primary's has everything that was acknowledged."""

    def begin(self) -> None:
        super().begin()
        self.world.spawn(self.wiper())

    async def wiper(self) -> None:
        world = self.world
        for _ in range(2):
            await world.sleep_ms(world.rng.uniform(500, 2_000))
            world.wipe("B")
            world.coverage.hit("wiped_replica")
            await world.sleep_ms(world.rng.uniform(20, 600))
            world.start("B")


class WipedPrimaryHarness(PairHarness):
    """The primary's disk is lost. It founds a cluster of its own, both refuse, and the operator
    does what the README says: promotes the replica by force, and empties the other one again."""

    def begin(self) -> None:
        super().begin()
        self.world.spawn(self.operator())

    async def operator(self) -> None:
        world = self.world
        await world.sleep_ms(world.rng.uniform(300, 3_000))
        self.forced = True  # what A alone had is gone with its disk
        world.wipe("A")
        await world.sleep_ms(world.rng.uniform(20, 600))
        world.start("A")
        await world.sleep_ms(world.rng.uniform(300, 1_500))
        while True:
            node = world.node("B")
            if node is not None and node.state.wished.role is Role.PRIMARY:
                break
            reply = world.promise(timeout_ms=5_000)
            world.tell("B", lambda node, r=reply: node.promote(True, r))
            answer = await reply
            world.coverage.hit("operator_asked")
            if answer is not TIMED_OUT and not answer.ok and "never had" in answer.reason:
                return  # the pair had never met: A's new cluster takes B in by itself
            await world.sleep_ms(100)
        self.flagged.clear()
        world.wipe("A")
        await world.sleep_ms(50)
        world.start("A")
        world.coverage.hit("replaced_primary")

    def judge_lost(self, payload: bytes, degraded: bool, aside: set[bytes]) -> None:
        assert degraded, f"{payload!r} was on both disks and was lost with one"
        self.world.coverage.hit("lost_lone_ack")


FAULTS = Faults(
    crash=4, stop=2, pause=2, partition=2, one_way=1, power_cut=2, sync_failure=1, max_down=1,
    every_ms=(100, 900), drift_ppm=200,
)  # fmt: skip


def _scenario(name: str, harness: Any, faults: Faults = FAULTS) -> Scenario[SimNode]:
    return Scenario(
        name,
        nodes=("A", "B"),
        harness=harness,
        duration_ms=5_000,
        settle_ms=6_000,
        faults=faults,
        links=(PERFECT, FIFO, LinkSettings(), ROUGH),
        disk=DiskSettings(atomic=True),
        wire=wire,
    )


AVAILABLE = _scenario("available", PairHarness)
STRICT = _scenario("strict", StrictHarness)
PROMOTING = _scenario("promoting", PromotingHarness)
STRICT_PROMOTING = _scenario("strict_promoting", StrictPromotingHarness)
FORCED = _scenario(
    "forced",
    ForcedHarness,
    Faults(crash=2, pause=1, partition=5, power_cut=1, max_down=1, cut_ms=(500, 3_000)),
)

MILD = Faults(crash=3, stop=1, pause=1, partition=2, max_down=1, every_ms=(200, 1_200))
WIPED_REPLICA = _scenario("wiped_replica", WipedReplicaHarness, MILD)
WIPED_PRIMARY = _scenario("wiped_primary", WipedPrimaryHarness, MILD)
