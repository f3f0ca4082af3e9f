"""Whole clusters of replication cores under faults (``harness.py``). ``SIM_SEEDS``: how many."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from testkit.sim import many, run, seeds

sys.path.insert(0, str(Path(__file__).parent))
from delivery import DELIVERY
from harness import CALM, DAMAGE, FAULTS, FIVE, WIPES
from moving import CALM_MOVES, MOVES, MOVES_WIPES
from phases import KINDS, PHASED, PHASES

pytestmark = pytest.mark.sim


def test_a_calm_cluster_elects_one_owner_each_and_loses_nothing() -> None:
    coverage = many(CALM, seeds(2))
    coverage.require("acked", 50)
    assert coverage["in_doubt"] == coverage["clean_in_doubt"] == 0


def test_crashes_pauses_and_cuts_lose_nothing_and_bring_nothing_back() -> None:
    coverage = many(FAULTS, seeds(24))
    for name, times in {
        "owner_elected": 150,
        "owner_lost": 20,
        "fault_crash": 20,
        "fault_pause": 10,
        "fault_one_way": 10,
        "fault_power_cut": 5,
        "failed_syncs": 2,
        "ack_unknown": 10,
        "produce_unknown": 10,
        "void_dropped": 1,
        "copies_read": 20,
        "redelivered": 50,
        "yielded": 5,
    }.items():
        coverage.require(name, times * len(seeds(24)) // 120)


def test_a_lost_disk_counts_again_only_after_copying() -> None:
    coverage = many(WIPES, seeds(16))
    coverage.require("fault_wipe", len(seeds(16)) // 4)
    coverage.require("disk_lost", 1)
    coverage.require("fault_stop", 1)


def test_five_replicas_survive_two_that_are_away() -> None:
    many(FIVE, seeds(6)).require("owner_elected", 6)


def test_damaged_records_are_withdrawn_and_fetched_again() -> None:
    coverage = many(DAMAGE, seeds(12))
    coverage.require("damaged_records", 4)
    coverage.require("copied", 4)


def test_a_seed_replays_to_the_same_end() -> None:
    first = run(FAULTS, 3, fingerprint=True)
    assert run(FAULTS, 3, fingerprint=True).fingerprint == first.fingerprint


def test_the_delivery_machine_on_top_delivers_everything_and_nothing_twice_acked() -> None:
    coverage = many(DELIVERY, seeds(12))
    for name, times in {
        "acked": 200,
        "redelivered": 50,
        "granted_to_a_waiter": 20,
        "nacked": 20,
        "leases_passed_on": 3,
        "deduped_retry": 1,
    }.items():
        coverage.require(name, times * len(seeds(12)) // 12)


def test_nodes_come_and_go_while_it_serves() -> None:
    coverage = many(CALM_MOVES, seeds(2))
    for name, times in {"join_finished": 2, "leave_finished": 1, "dismissed": 3}.items():
        coverage.require(name, times * len(seeds(2)))


def test_a_changing_ring_loses_nothing_whoever_fails_in_the_middle() -> None:
    coverage = many(MOVES, seeds(6))
    for name, times in {
        "join_finished": 200,
        "leave_finished": 120,
        "join_turned_round_started": 1,
        "leave_turned_round_started": 4,
        "owner_killed_in_a_move": 50,
        "coordinator_elected_during_a_change": 200,
        "elected_during_a_change": 800,
        "fault_crash": 60,
        "fault_pause": 20,
        "machine_reused": 50,
        "settled": 800,
    }.items():
        coverage.require(name, times * len(seeds(6)) // 140)


def test_a_changing_ring_survives_a_lost_disk() -> None:
    coverage = many(MOVES_WIPES, seeds(4))
    coverage.require("fault_wipe", len(seeds(4)) // 3)
    coverage.require("join_finished", len(seeds(4)))


def test_a_fault_in_the_middle_of_any_phase_of_a_change_loses_nothing() -> None:
    coverage = many(PHASED, seeds(8))
    for name in ("join_finished", "leave_finished", "leaver_erased", "machine_reused"):
        coverage.require(name, len(seeds(8)) // 3)
    if len(seeds(8)) >= 100:
        missed = [(kind, at) for kind in KINDS for at in PHASES if not coverage[f"{kind}_in_{at}"]]
        assert len(missed) < 8, f"no fault of these kinds in these phases: {missed}"
