"""A schedule of faults drawn from the seed: every kind is opt-in, by weight.

One fault at a time is begun every `every_ms`; its end (restart, heal, resume) has its own time, so
faults overlap. At most `max_down` nodes are dead or paused at once, except in a power cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from testkit.sim.world import World

KINDS: Final = (
    "crash",
    "stop",
    "pause",
    "partition",
    "isolate",
    "one_way",
    "power_cut",
    "wipe",
    "sync_failure",
    "wall_jump",
    "corrupt",
)


@dataclass(frozen=True, slots=True)
class Faults:
    """Weights of the kinds (0: never) and how long each lasts.

    `drift_ppm` makes every node's monotonic clock run wrong by up to that, from an arbitrary start.
    `max_down` None: a minority. `max_wipes` bounds lost disks per run; `corrupt` kills a node and
    damages one record of one of its logs (bit rot), `max_corruptions` times a run.
    """

    crash: int = 0
    stop: int = 0
    pause: int = 0
    partition: int = 0
    isolate: int = 0
    one_way: int = 0
    power_cut: int = 0
    wipe: int = 0
    sync_failure: int = 0
    wall_jump: int = 0
    corrupt: int = 0
    drift_ppm: int = 0
    every_ms: tuple[float, float] = (100, 1500)
    down_ms: tuple[float, float] = (20, 1500)
    pause_ms: tuple[float, float] = (20, 3000)
    cut_ms: tuple[float, float] = (20, 2000)
    max_down: int | None = None
    max_wipes: int = 1
    max_corruptions: int = 1

    def weights(self) -> list[int]:
        """In the order of KINDS."""
        return [int(getattr(self, kind)) for kind in KINDS]


NONE: Final = Faults()


class FaultPlan:
    """Applies `Faults` to a world until `stop()`."""

    def __init__(self, world: World[Any], faults: Faults) -> None:
        self._world = world
        self._faults = faults
        self._rng = Random(f"{world.seed}/faults")
        self._weights = faults.weights()
        self._running = True
        self._wipes = 0
        self._corruptions = 0
        minority = (len(world.names) - 1) // 2
        self._max_down = minority if faults.max_down is None else faults.max_down

    def begin(self) -> None:
        """Schedule the first fault (none if every weight is 0)."""
        if any(self._weights):
            self._next()

    def stop(self) -> None:
        """No new faults; `World.heal_everything` ends the present ones."""
        self._running = False

    def _next(self) -> None:
        self._world.clock.call_later(self._rng.uniform(*self._faults.every_ms), self._strike)

    def _strike(self) -> None:
        if not self._running:
            return
        kind = self._rng.choices(KINDS, self._weights)[0]
        apply: Callable[[], bool] = getattr(self, "_" + kind)
        if apply():
            self._world.coverage.hit("fault_" + kind)
        self._next()

    def _later(self, span_ms: tuple[float, float], action: Callable[..., None], *args: Any) -> None:
        def undo() -> None:
            if self._running:
                action(*args)

        self._world.clock.call_later(self._rng.uniform(*span_ms), undo)

    def _victim(self) -> str | None:
        """An up, running node, if one more may go."""
        world = self._world
        running = [n for n in world.names if world.is_up(n) and not world.is_paused(n)]
        if len(world.names) - len(running) >= self._max_down or not running:
            return None
        return self._rng.choice(running)

    # -- one method a kind; each returns whether it did anything ---------------------------------

    def _crash(self) -> bool:
        victim = self._victim()
        if victim is not None:
            self._world.crash(victim, power=self._rng.random() < 0.5)
            self._later(self._faults.down_ms, self._world.start, victim)
        return victim is not None

    def _stop(self) -> bool:
        victim = self._victim()
        if victim is not None:
            self._world.stop(victim)
            self._later(self._faults.down_ms, self._world.start, victim)
        return victim is not None

    def _pause(self) -> bool:
        victim = self._victim()
        if victim is not None:
            self._world.pause(victim)
            self._later(self._faults.pause_ms, self._world.resume, victim)
        return victim is not None

    def _wipe(self) -> bool:
        victim = self._victim()
        if victim is None or self._wipes >= self._faults.max_wipes:
            return False
        self._wipes += 1
        self._world.wipe(victim)
        self._later(self._faults.down_ms, self._world.start, victim)
        return True

    def _corrupt(self) -> bool:
        victim = self._victim()
        if victim is None or self._corruptions >= self._faults.max_corruptions:
            return False
        world, disk = self._world, self._world.disks[victim]
        world.crash(victim)
        self._later(self._faults.down_ms, world.start, victim)
        logs = [name for name in disk.logs() if disk.log(name)]
        if not logs:
            return False
        self._corruptions += 1
        log = self._rng.choice(logs)
        index = self._rng.randrange(len(disk.log(log)))
        world.trace.add(world.clock.now_us, "CORRUPT", victim, log, index)
        disk.corrupt(index, log)
        return True

    def _power_cut(self) -> bool:
        self._world.power_cut()
        for name in self._world.names:
            self._later(self._faults.down_ms, self._world.start, name)
        return True

    def _sync_failure(self) -> bool:
        victim = self._victim()
        if victim is not None:
            self._world.disks[victim].fail_next_sync()
            # The node halts at some later sync; this restarts it, whenever that was.
            self._later(
                (self._faults.down_ms[1], 2 * self._faults.down_ms[1]), self._world.start, victim
            )
        return victim is not None

    def _partition(self) -> bool:
        names = list(self._world.names)
        if len(names) < 2:
            return False
        self._rng.shuffle(names)
        split = self._rng.randint(1, len(names) - 1)
        self._world.trace.add(
            self._world.clock.now_us, "PARTITION", sorted(names[:split]), sorted(names[split:])
        )
        self._world.network.partition(names[:split], names[split:])
        self._later(self._faults.cut_ms, self._heal)
        return True

    def _isolate(self) -> bool:
        name = self._rng.choice(self._world.names)
        self._world.trace.add(self._world.clock.now_us, "ISOLATE", name)
        self._world.network.isolate(name)
        self._later(self._faults.cut_ms, self._heal)
        return True

    def _one_way(self) -> bool:
        if len(self._world.names) < 2:
            return False
        source, target = self._rng.sample(self._world.names, 2)
        self._world.trace.add(self._world.clock.now_us, "CUT", source, "->", target)
        self._world.network.cut(source, target, one_way=True)
        self._later(self._faults.cut_ms, self._heal)
        return True

    def _wall_jump(self) -> bool:
        name = self._rng.choice(self._world.names)
        offset_ms = self._rng.choice((-3_600_000, -5_000, -500, 500, 5_000, 3_600_000))
        self._world.trace.add(self._world.clock.now_us, "WALL_JUMP", name, offset_ms)
        self._world.wall_offset_ms[name] += offset_ms
        return True

    def _heal(self) -> None:
        self._world.trace.add(self._world.clock.now_us, "HEAL")
        self._world.network.heal_all()
