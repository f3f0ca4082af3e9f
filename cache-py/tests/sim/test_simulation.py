"""Whole clusters under faults: every invariant after every event, histories linearizable.

A simulation counts only if it covers, so each test demands the races that it exists for.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from testkit.sim import many, run, seeds


def _load_harness() -> ModuleType:
    path = Path(__file__).with_name("harness.py")
    spec = importlib.util.spec_from_file_location("cache_sim_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


harness = _load_harness()
pytestmark = pytest.mark.sim


def test_races_partitions_pauses_and_kills_never_show_an_old_value() -> None:
    coverage = many(harness.RACES, seeds(50))
    for happening in (
        "line IS_D inv",  # an invalidation overtakes its grant …
        "line IS_D_I data_dead",  # … whose data may then be used only once
        "line IS_D_I data_s",  # … unless it was granted later
        "line SM_D inv",  # an upgrade loses to another writer
        "line SM_D evict",
        "line IM_D fetch_keep",  # a fetch overtakes the grant of ownership
        "line MI_A fetch_keep",  # a put crosses a fetch
        "line SI_A inv",  # and an invalidation
        "line II_A put_ack",
        "line M fetch_drop",
        "line M erased",
        "line SM_D data_none",
        "entry EM return",
        "entry BUSY_FETCH shared",
        "entry BUSY_FETCH free",
        "count lease_waits",  # a home waits for somebody's lease to run out
        "count refetches",  # a change meets the end of its grant
        "count use_once",
        "line M lost",  # a home restarts under its owner
        "line IM_D lost",
        "kills",
        "fault_pause",
        "fault_one_way",
        "hits",
        "line M ask_home",  # an owner leaves a named change to the home
        "asked_again",  # … and it is asked for under the same name, of another node
        "same_answer_done",
        "same_answer_mismatch",  # the answer to a named change without effect lasts as well
        "same_answer_absent",
        "net_reordered",
        "net_duplicated",
        "net_dropped",
    ):
        coverage.require(happening, 1)


def test_a_power_cut_at_any_time_loses_nothing_that_was_acknowledged() -> None:
    coverage = many(harness.POWER, seeds(30))
    for happening in ("fault_crash", "fault_power_cut", "fault_stop", "line M commit"):
        coverage.require(happening, 10)


def test_values_that_run_out_on_clocks_that_jump_keep_every_invariant() -> None:
    coverage = many(harness.DEADLINES, seeds(30))
    for happening in ("entry S outdated", "entry EM outdated", "entry U outdated", "line S passed"):
        coverage.require(happening, 1)


def test_a_seed_decides_everything() -> None:
    first, second = (run(harness.RACES, 7, fingerprint=True) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.events == second.events
