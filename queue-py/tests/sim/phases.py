"""Ring changes that are hit in the middle of every phase (``moving.py`` has operator and judge).

The core says what it does in notes: each is the moment for a fault, at the node that said so or at
another one, at once or some milliseconds later, so that it falls between any two steps of a change.
Rare phases are hit more often than common ones. And the operator is a hard one: as soon as any node
knows that a leave is over, the machine that left is switched off and erased.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moving import FOUNDERS, Moving
from sim_node import SimNode, wire

from message_queue.core.messages import Membership
from message_queue.core.placement.membership import changing, nodes
from testkit.sim import PERFECT, ROUGH, Faults, LinkSettings, Scenario, World

PHASES: Final[Mapping[str, float]] = MappingProxyType(
    {
        "ring_change_started": 0.15,
        "moving": 0.15,
        "yielded": 0.1,
        "takeover_started": 0.08,
        "sealed": 0.04,
        "copied": 0.15,
        "owner_elected": 0.08,
        "settled": 0.15,
        "ring_moved": 0.06,
        "dismissed": 0.2,
        "ring_change_finished": 0.15,
        "departed": 0.4,
        "disk_lost": 0.2,
    }
)
"""Note of the core -> how often it brings a fault."""
KINDS: Final = ("crash", "power", "pause", "isolate", "one_way", "wipe")
WEIGHTS: Final = (5, 1, 3, 3, 2, 2)
CALM_MS: Final = 120.0
"""Between two faults, so that some changes come to an end."""


class Phases(Moving):
    """Strikes when something is said."""

    def __init__(self, world: World[SimNode]) -> None:
        super().__init__(world)
        self.doomed = world.rng.choice(world.names)
        """The one machine whose disk may be lost: of every confirmed record another has a copy."""
        self.calm_until_ms = 0.0

    def copies(self, seed: int) -> int:
        return 3

    def noted(self, name: str, what: str) -> None:
        world, rng = self.world, self.world.rng
        ring = self.latest
        if ring is None or what not in PHASES or not self._striking:
            return
        if not changing(ring) and what not in ("ring_change_finished", "departed", "dismissed"):
            return
        if rng.random() < PHASES[what]:
            self.calm_until_ms = world.clock.now_ms + CALM_MS
            victim = name if rng.random() < 0.5 else rng.choice(world.names)
            delay_ms = rng.choice((0.0, rng.uniform(0, 3), rng.uniform(0, 60)))
            kind = rng.choices(KINDS, WEIGHTS)[0]
            world.coverage.hit(f"{kind}_in_{what}")
            world.clock.call_later(delay_ms, self.strike, kind, victim)

    @property
    def _striking(self) -> bool:
        now_ms = self.world.clock.now_ms
        return not self.stopped and now_ms < PHASED.duration_ms and now_ms >= self.calm_until_ms

    def strike(self, kind: str, victim: str) -> None:
        world, rng = self.world, self.world.rng
        later = world.clock.call_later
        match kind:
            case "crash":
                world.crash(victim, power=rng.random() < 0.5)
                later(rng.uniform(20, 900), world.start, victim)
            case "power":
                world.power_cut()
                for name in world.names:
                    later(rng.uniform(20, 500), world.start, name)
            case "pause":
                world.pause(victim)
                later(rng.uniform(20, 1_500), world.resume, victim)
            case "isolate":
                world.network.isolate(victim)
                later(rng.uniform(20, 1_200), world.network.heal_all)
            case "one_way":
                other = rng.choice([n for n in world.names if n != victim])
                world.network.cut(victim, other, one_way=True)
                later(rng.uniform(20, 1_200), world.network.heal_all)
            case _:
                world.wipe(self.doomed)
                later(rng.uniform(20, 600), world.start, self.doomed)

    def adopted(self, node: SimNode, ring: Membership) -> None:
        before = self.latest or self.founding
        super().adopted(node, ring)
        if ring is self.latest and before.leaving is not None and not changing(ring):
            self.erase(before.leaving[1].addr)

    def erase(self, name: str) -> None:
        """Somebody saw that the leave is over: the machine is not needed any more."""
        world = self.world
        if name in {member.addr for member in nodes(self.latest or self.founding).values()}:
            return
        if world.rng.random() < 0.7:
            world.coverage.hit("leaver_erased")
            self.joiners.add(name)
            world.clock.call_later(0, self.strike_off, name)

    def strike_off(self, name: str) -> None:
        self.world.crash(name)
        self.world.wipe(name)
        self.world.clock.call_later(self.world.rng.uniform(50, 500), self.world.start, name)


PHASED = Scenario(
    "phases",
    nodes=tuple(f"n{i + 1}" for i in range(FOUNDERS + 2)),
    harness=Phases,
    duration_ms=5_000,
    settle_ms=9_000,
    faults=Faults(drift_ppm=2_000),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)
