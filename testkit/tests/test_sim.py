"""The simulation itself: one seed decides, disks forget what was not synced, cuts cut."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from testkit.sim import (
    PERFECT,
    TIMED_OUT,
    Clock,
    Coverage,
    Damaged,
    Disk,
    DiskSettings,
    Faults,
    LinkSettings,
    Network,
    Scenario,
    SimFailure,
    World,
    many,
    run,
    scenarios,
    seeds,
)
from testkit.tests.toy_sim import HASTY, HONEST, ToyHarness, ToyNode

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("crash", "stop", "pause", "partition", "isolate", "one_way", "power_cut", "sync_failure")


def test_every_kind_of_fault_happens_and_the_honest_toy_survives_them() -> None:
    coverage = many(HONEST, seeds(60))
    for kind in (*KINDS, "wall_jump"):
        coverage.require("fault_" + kind, 5)
    for name in ("starts", "timeouts", "heard", "halts", "net_cut", "net_dropped"):
        coverage.require(name, 5)
    coverage.require("net_reordered", 1)
    coverage.require("net_duplicated", 1)


def test_a_node_that_answers_before_its_sync_is_caught_and_its_seed_replays() -> None:
    with pytest.raises(SimFailure, match="forgot an answered addition") as caught:
        many(HASTY, range(60))
    failure = caught.value
    assert f"seed {failure.seed}" in str(failure)
    assert "CRASH" in failure.report
    with pytest.raises(SimFailure) as again:
        run(HASTY, failure.seed)
    assert str(again.value) == str(failure)


def test_the_seed_alone_decides_in_any_process_whatever_its_hash_seed() -> None:
    program = (
        "from testkit.sim import run; from testkit.tests.toy_sim import HONEST;"
        "print([run(HONEST, seed, fingerprint=True).fingerprint for seed in range(4)])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    here = [run(HONEST, seed, fingerprint=True).fingerprint for seed in range(4)]
    assert seen == {f"{here}\n"}
    assert len(set(here)) == 4


def test_the_command_line_replays_a_seed_and_fails_with_it() -> None:
    def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
        toy = str(ROOT / "testkit" / "tests" / "toy_sim.py")
        return subprocess.run(
            [sys.executable, "-m", "testkit.sim", toy + arguments[0], *arguments[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    good = replay(":HONEST", "--seed", "3", "--verbose")
    assert good.returncode == 0, good.stderr
    assert "START      a 1" in good.stdout
    bad = replay(":HASTY", "--seeds", "60")
    assert bad.returncode == 1
    assert "forgot an answered addition" in bad.stderr
    # What it says replays it, as it stands.
    told = bad.stderr.splitlines()[-1]
    assert told.startswith("replay: python -m testkit.sim testkit/tests/toy_sim.py:"), told
    again = subprocess.run(
        [sys.executable, *told.split()[2:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "forgot an answered addition" in again.stderr


def test_coverage_that_was_not_met_fails() -> None:
    coverage = Coverage()
    coverage.hit("elections")
    coverage.require("elections")
    with pytest.raises(AssertionError, match="'races' happened 0 times"):
        coverage.require("races")


# -- disk -----------------------------------------------------------------------------------------


class DiskBench:
    def __init__(self, seed: int = 0, **settings: Any) -> None:
        self.clock = Clock()
        self.events: list[tuple[Any, bool]] = []
        self.disk = Disk(
            self.clock,
            Random(seed),
            lambda token, ok: self.events.append((token, ok)),
            DiskSettings(**settings),
        )

    def settle(self) -> None:
        while self.clock.step():
            pass


def test_what_was_synced_survives_a_power_cut_and_what_was_not_is_a_prefix() -> None:
    lengths = set()
    for seed in range(40):
        bench = DiskBench(seed, torn=0.0)
        for number in range(5):
            bench.disk.append(number)
        bench.disk.sync("five")
        bench.settle()
        assert bench.events == [("five", True)]
        for number in range(5, 10):
            bench.disk.append(number)
        assert bench.disk.log() == list(range(10))
        bench.disk.crash(power=True)
        kept = bench.disk.log()
        assert kept == list(range(len(kept)))
        lengths.add(len(kept))
    assert lengths == {5, 6, 7, 8, 9, 10}


def test_a_sync_takes_time_and_dies_with_the_process() -> None:
    bench = DiskBench()
    bench.disk.put("k", 1)
    bench.disk.sync("late")
    assert bench.events == []
    bench.disk.crash(power=True)
    bench.settle()
    assert bench.events == [], "a dead process hears of no sync"


def test_flushed_data_survives_the_process_but_not_the_machine() -> None:
    survived = {False: 0, True: 0}
    for seed in range(40):
        for power in (False, True):
            bench = DiskBench(seed)
            bench.disk.put("k", 1)
            bench.disk.flush()
            bench.disk.crash(power=power)
            survived[power] += bench.disk.get("k", 0)
    assert survived[False] == 40
    assert 0 < survived[True] < 40


def test_the_first_lost_append_may_be_torn() -> None:
    ends = set()
    for seed in range(60):
        bench = DiskBench(seed, torn=0.5)
        bench.disk.append(b"whole")
        bench.disk.append(("not", "bytes"), "other")
        bench.disk.crash(power=True)
        ends.add((tuple(bench.disk.log()), tuple(bench.disk.log("other"))))
    assert ((b"whole",), (Damaged("torn"),)) in ends
    assert any(log and log[0] != b"whole" and b"whole".startswith(log[0]) for log, _ in ends)


def test_an_atomic_disk_keeps_whole_transactions_only() -> None:
    seen = set()
    for seed in range(60):
        bench = DiskBench(seed, atomic=True)
        for base in (0, 10):
            bench.disk.append(base)
            bench.disk.append(base + 1)
            bench.disk.sync(base)
        bench.disk.append(99)
        bench.disk.crash(power=True)
        seen.add(tuple(bench.disk.log()))
    assert seen == {(), (0, 1), (0, 1, 10, 11)}


def test_a_failed_sync_is_told_once_and_what_it_covered_may_be_gone() -> None:
    gone = 0
    for seed in range(40):
        bench = DiskBench(seed)
        bench.disk.put("k", 1)
        bench.disk.fail_next_sync()
        bench.disk.sync("first")
        bench.settle()
        bench.disk.put("later", 2)
        bench.disk.sync("second")
        bench.settle()
        assert bench.events == [("first", False), ("second", True)]
        bench.disk.crash(power=True)
        assert bench.disk.get("later") == 2
        gone += bench.disk.get("k") is None
    assert 0 < gone < 40, "a retried fsync that succeeds proves nothing"


def test_wiped_and_corrupt_disks_are_found_so() -> None:
    bench = DiskBench()
    bench.disk.append("a")
    bench.disk.append("b")
    bench.disk.put("k", 1)
    bench.disk.sync()
    bench.settle()
    bench.disk.corrupt(0)
    assert bench.disk.log() == [Damaged("corrupt"), "b"]
    bench.disk.truncate(1)
    bench.disk.drop_prefix(1)
    assert bench.disk.log() == []
    assert list(bench.disk.items()) == [("k", 1)]
    bench.disk.wipe()
    assert bench.disk.get("k") is None


# -- network --------------------------------------------------------------------------------------


class NetworkBench:
    def __init__(self, settings: LinkSettings = PERFECT) -> None:
        self.clock = Clock()
        self.got: list[tuple[str, str, Any]] = []
        self.network = Network(
            self.clock, Random(7), ("a", "b", "c"), lambda *got: self.got.append(got), settings
        )

    def burst(self, source: str, target: str, count: int = 1) -> list[Any]:
        self.got.clear()
        for number in range(count):
            self.network.send(source, target, number)
        while self.clock.step():
            pass
        return [message for _, _, message in self.got]


def test_links_are_cut_one_way_both_ways_and_by_groups() -> None:
    bench = NetworkBench()
    bench.network.cut("a", "b", one_way=True)
    assert bench.burst("a", "b") == []
    assert bench.burst("b", "a") == [0]
    bench.network.heal("a", "b")
    bench.network.partition(["a", "b"], ["c"])
    assert bench.burst("a", "b") == [0]
    assert bench.burst("c", "a") == []
    bench.network.heal_all()
    bench.network.isolate("b")
    assert bench.burst("a", "b") == bench.burst("b", "c") == []
    assert bench.burst("a", "c") == [0]
    assert bench.network.counters["cut"] == 4


def test_a_cut_loses_what_is_in_flight() -> None:
    bench = NetworkBench()
    bench.network.send("a", "b", "x")
    bench.network.cut("a", "b")
    assert bench.burst("a", "c") == [0]
    assert bench.got == [("a", "c", 0)]


def test_messages_are_reordered_lost_and_doubled_only_where_asked() -> None:
    assert NetworkBench().burst("a", "b", 500) == list(range(500))
    rough = NetworkBench(LinkSettings(delay_ms=(1, 9), drop=0.1, duplicate=0.1))
    got = rough.burst("a", "b", 500)
    assert got != sorted(got)
    assert 400 < len(set(got)) < 500
    assert len(got) > len(set(got))
    fifo = NetworkBench(LinkSettings(delay_ms=(1, 9), fifo=True))
    assert fifo.burst("a", "b", 500) == list(range(500))


def test_targeted_drops_take_what_matches_and_so_many() -> None:
    bench = NetworkBench()
    rule = bench.network.drop_if(lambda _s, _t, message: message % 2 == 0, times=3)
    assert bench.burst("a", "b", 10) == [1, 3, 5, 6, 7, 8, 9]
    assert rule.hits == 3
    bench.network.remove(rule)
    assert bench.burst("a", "b", 2) == [0, 1]


# -- world ----------------------------------------------------------------------------------------


def scripted(script: Any, duration_ms: float = 400) -> Scenario[ToyNode]:
    class Scripted(ToyHarness):
        def __init__(self, world: World[ToyNode]) -> None:
            super().__init__(world, honest=True)

        def begin(self) -> None:
            self.world.spawn(script(self.world))

    return Scenario("scripted", ("a", "b"), Scripted, duration_ms=duration_ms, settle_ms=100)


def test_a_paused_node_gets_everything_later_and_a_dead_one_nothing() -> None:
    seen: list[Any] = []

    async def script(world: World[ToyNode]) -> None:
        world.pause("a")
        reply = world.promise()
        world.tell("a", lambda node: node.add(reply))
        await world.sleep_ms(50)
        seen.append(reply.done)
        world.resume("a")
        seen.append(await reply)
        world.crash("b")
        lost = world.promise(timeout_ms=50)
        world.tell("b", lambda node: node.add(lost))
        seen.append(await lost)
        world.start("b")

    run(scripted(script), 1)
    assert seen == [False, 1, TIMED_OUT]


def test_an_incarnation_that_died_reaches_nobody() -> None:
    async def script(world: World[ToyNode]) -> None:
        old = world.nodes["a"]
        world.crash("a")
        world.start("a")
        old.host.set_timer("beat", 1)
        old.host.send("b", "from the grave")
        assert world.nodes["a"] is not old
        world.coverage.hit("script_ran")

    run(scripted(script), 1).coverage.require("script_ran")


def test_a_livelock_is_an_error_and_so_is_an_exception_in_a_node() -> None:
    async def spin(world: World[ToyNode]) -> None:
        while True:
            world.tell("a", lambda node: None, delay_ms=0)
            await world.sleep_ms(0)

    scenario = scripted(spin)
    with pytest.raises(SimFailure, match="livelock"):
        run(Scenario("spin", scenario.nodes, scenario.harness, max_events=1_000), 1)

    async def explode(world: World[ToyNode]) -> None:
        world.tell("a", lambda node: node.no_such_method())  # type: ignore[attr-defined]  # meant

    with pytest.raises(SimFailure, match="no_such_method"):
        run(scripted(explode), 1)


def test_rotten_records_are_found_by_the_next_start() -> None:
    rotten = []

    class Logging(ToyHarness):
        def __init__(self, world: World[ToyNode]) -> None:
            super().__init__(world, honest=True)

        def begin(self) -> None:
            for disk in self.world.disks.values():
                disk.append("record")
                disk.flush()

        def finish(self) -> None:
            logs = [disk.log() for disk in self.world.disks.values()]
            rotten.append(sum(Damaged("corrupt") in log for log in logs))

    faults = Faults(corrupt=1, max_corruptions=1, every_ms=(10, 50), down_ms=(5, 20))
    scenario = Scenario("rot", ("a", "b", "c"), Logging, duration_ms=300, faults=faults)
    for seed in range(5):
        run(scenario, seed).coverage.require("fault_corrupt")
    assert rotten == [1] * 5


def test_no_faults_means_no_faults() -> None:
    coverage = run(Scenario("calm", HONEST.nodes, HONEST.harness, faults=Faults()), 5).coverage
    assert not [name for name in coverage if name.startswith("fault_")]
    assert coverage["timeouts"] == 0


def test_scenarios_are_found_by_path_and_told_apart_by_file(tmp_path: Path) -> None:
    toy = ROOT / "testkit" / "tests" / "toy_sim.py"
    assert set(scenarios(str(toy))) == {"toy", "hasty"}
    copy = tmp_path / "toy_sim.py"
    copy.write_text(toy.read_text().replace('"hasty"', '"hastier"'))
    assert set(scenarios(str(copy))) == {"toy", "hastier"}
    with pytest.raises(FileNotFoundError):
        scenarios(str(tmp_path / "none.py"))
