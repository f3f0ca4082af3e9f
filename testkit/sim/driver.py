"""Runs a scenario for a seed, or for many; a failure carries what replays it.

A run: start all nodes, `harness.begin()`, faults for `duration_ms`, then everything is healed and
started and left alone for `settle_ms`, then `harness.finish()`. `harness.check(name)` runs after
every event that entered node `name`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

from testkit.sim.coverage import Coverage
from testkit.sim.disk import DiskSettings
from testkit.sim.faults import NONE, FaultPlan, Faults
from testkit.sim.network import LinkSettings
from testkit.sim.trace import Trace
from testkit.sim.world import Host, Node, World

N = TypeVar("N", bound=Node)


class Harness(Generic[N]):
    """A service's side of a simulation; one object a run. Override `build`, and what you need."""

    def __init__(self, world: World[N]) -> None:
        self.world = world

    def build(self, host: Host) -> N:
        """A node object for one incarnation (`start(disk)` follows)."""
        raise NotImplementedError

    def begin(self) -> None:
        """Spawn clients, schedule scripted faults."""

    def check(self, name: str) -> None:
        """Invariants; raise AssertionError. Called after each event at node `name` (which may be
        down by now, if it halted)."""

    def finish(self) -> None:
        """Judge the whole run (histories, convergence) after the quiet time."""


@dataclass(frozen=True, slots=True)
class Scenario(Generic[N]):
    """What to run. The seed draws one of `links`; `wire` passes every message through a codec."""

    name: str
    nodes: tuple[str, ...]
    harness: Callable[[World[N]], Harness[N]]
    duration_ms: float = 5_000
    settle_ms: float = 3_000
    faults: Faults = NONE
    links: Sequence[LinkSettings] = (LinkSettings(),)
    disk: DiskSettings = field(default_factory=DiskSettings)
    wire: Callable[[Any], Any] | None = None
    reset_hints: bool = True
    max_events: int = 500_000


@dataclass(frozen=True, slots=True)
class Result:
    """What a passing run met."""

    seed: int
    events: int
    coverage: Coverage
    fingerprint: int


class SimFailure(AssertionError):
    """A run that broke a rule. `seed` replays it; `report` holds the last events."""

    def __init__(
        self, scenario: str, seed: int, reason: str, report: str, where: str = "SERVICE"
    ) -> None:
        super().__init__(scenario, seed, reason, report, where)
        self.scenario = scenario
        self.where = where  # what `python -m testkit.sim` finds the scenario in
        self.seed = seed
        self.reason = reason
        self.report = report

    def __str__(self) -> str:
        # First for a summary that shows one line, last for a reader of the end of a log.
        head = f"{self.scenario} seed {self.seed}: {self.reason}"
        replay = (
            f"replay: python -m testkit.sim {self.where}:{self.scenario}"
            f" --seed {self.seed} --verbose"
        )
        return f"{head}\n{self.report}\n{head}\n{replay}"


def run(
    scenario: Scenario[N], seed: int, *, verbose: bool = False, fingerprint: bool = False
) -> Result:
    """One run; raises SimFailure. `fingerprint` sums up every event (slower)."""
    trace = Trace(verbose=verbose, fingerprint=fingerprint)
    rng = Random(f"{seed}/run")
    harness: Harness[N]
    world: World[N] = World(
        seed,
        scenario.nodes,
        lambda host: harness.build(host),
        check=lambda name: harness.check(name),
        link=rng.choice(scenario.links),
        disk=scenario.disk,
        wire=scenario.wire,
        drift_ppm=scenario.faults.drift_ppm,
        reset_hints=scenario.reset_hints,
        trace=trace,
    )
    harness = scenario.harness(world)
    plan = FaultPlan(world, scenario.faults)
    try:
        for name in scenario.nodes:
            world.start(name)
        harness.begin()
        plan.begin()
        _advance(world, scenario.duration_ms, scenario.max_events)
        plan.stop()
        world.network.configure(LinkSettings(slow=0.0))
        world.heal_everything()
        _advance(world, scenario.duration_ms + scenario.settle_ms, scenario.max_events)
        harness.finish()
    except Exception as error:
        where = traceback.format_exc(limit=-4) if not _plain(error) else ""
        reason = str(error) or type(error).__name__
        at = f"at {world.clock.now_ms:.3f} ms, event {world.events}: {reason}"
        report = f"{trace.tail()}\n{where}"
        raise SimFailure(scenario.name, seed, at, report, _home(scenario)) from error
    world.coverage.update({f"net_{key}": n for key, n in world.network.counters.items()})
    world.coverage.hit("runs")
    world.coverage.hit("events", world.events)
    return Result(seed, world.events, world.coverage, trace.fingerprint)


def _home(scenario: Scenario[Any]) -> str:
    """The file that defines `scenario`, as the command line takes it (tests only import it)."""
    root = Path(__file__).resolve().parents[2]
    holders = [
        Path(file).resolve()
        for module in list(sys.modules.values())
        if (file := getattr(module, "__file__", None))
        and any(value is scenario for value in vars(module).values())
    ]
    holders.sort(key=lambda path: path.name.startswith("test_"))
    if not holders:
        return "SERVICE"
    file = holders[0]
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def _advance(world: World[Any], until_ms: float, max_events: int) -> None:
    until_us = round(until_ms * 1000)
    step = world.clock.step
    while step(until_us):
        if world.events > max_events:
            raise AssertionError(
                f"more than {max_events} events: a livelock, or a longer max_events"
            )


def _plain(error: Exception) -> bool:
    """An assertion with its own words needs no traceback when it comes from a check."""
    return isinstance(error, AssertionError) and bool(str(error))


def seeds(default: int) -> range:
    """The seeds a suite should run: `SIM_SEEDS` many (else `default`), from `SIM_SEED_FROM` (0)."""
    first = int(os.environ.get("SIM_SEED_FROM", "0"))
    return range(first, first + int(os.environ.get("SIM_SEEDS", str(default))))


def many(scenario: Scenario[Any], numbers: Iterable[int], workers: int = 2) -> Coverage:
    """Run all seeds on `workers` processes; the summed coverage, or SimFailure of the lowest seed.

    Processes are forked, so a scenario may hold closures; where fork does not exist (Windows), or
    with one worker, all run here.
    """
    numbers = list(numbers)
    total = Coverage()
    if workers < 2 or len(numbers) < 8 or "fork" not in get_all_start_methods():
        for seed in numbers:
            total.update(run(scenario, seed).coverage)
        return total
    size = max(1, min(50, len(numbers) // (workers * 4)))
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    with ProcessPoolExecutor(
        workers, mp_context=get_context("fork"), initializer=_adopt, initargs=(scenario,)
    ) as pool:
        outcomes = [pool.submit(_run_chunk, chunk) for chunk in chunks]
        for outcome in outcomes:
            found = outcome.result()
            if isinstance(found, SimFailure):
                pool.shutdown(cancel_futures=True)
                raise found
            total.update(found)
    return total


_adopted: list[Scenario[Any]] = []


def _adopt(scenario: Scenario[Any]) -> None:
    _adopted[:] = [scenario]


def _run_chunk(chunk: list[int]) -> Coverage | SimFailure:
    """A failure travels as a value: raised in a worker, it would be printed twice."""
    total = Coverage()
    for seed in chunk:
        try:
            total.update(run(_adopted[0], seed).coverage)
        except SimFailure as failure:
            return failure
    return total


def main_run(scenarios: Sequence[Scenario[Any]], first: int, count: int, *, verbose: bool) -> int:
    """The command line's work: 0 if all seeds passed, 1 after printing the first failure."""
    for scenario in scenarios:
        began = time.perf_counter()
        try:
            if count == 1:
                coverage = run(scenario, first, verbose=verbose).coverage
            else:
                coverage = many(scenario, range(first, first + count))
        except SimFailure as failure:
            print(failure, file=sys.stderr)
            return 1
        print(f"{scenario.name}: {count} seed(s) ok in {time.perf_counter() - began:.1f} s")
        print(coverage.table())
    return 0
