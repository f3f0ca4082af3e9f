"""The pair under crashes, pauses, partitions, power cuts and promotions, some hundred seeds a run.

SIM_SEEDS=2000 runs more; a failure prints its seed.
"""

from __future__ import annotations

import pytest

from testkit.sim import many, scenarios, seeds

pytestmark = pytest.mark.sim


def test_in_available_mode_nothing_acknowledged_is_lost() -> None:
    coverage = many(scenarios("secure")["available"], seeds(30))
    for what in ("ack", "degraded_ack", "went_alone", "in_step", "took_over", "sent_snapshot"):
        coverage.require(what)
    for what in ("fault_crash", "fault_power_cut", "fault_pause", "fault_partition"):
        coverage.require(what)


def test_in_strict_mode_nothing_is_acknowledged_alone() -> None:
    coverage = many(scenarios("secure")["strict"], seeds(30))
    for what in ("ack", "write_rejected", "write_unknown", "took_over"):
        coverage.require(what)


def test_an_unforced_promotion_neither_loses_nor_splits() -> None:
    coverage = many(scenarios("secure")["promoting"], seeds(30))
    for what in ("promoted", "promotion_refused", "demoted", "turned_away"):
        coverage.require(what)


def test_a_strict_pair_survives_promotion_while_the_primary_is_away() -> None:
    coverage = many(scenarios("secure")["strict_promoting"], seeds(30))
    for what in ("promoted", "demoted", "quarantined"):
        coverage.require(what)


def test_a_forced_promotion_sets_aside_what_it_cannot_keep() -> None:
    coverage = many(scenarios("secure")["forced"], seeds(30))
    for what in ("promoted", "demoted", "quarantined", "quarantined_ack"):
        coverage.require(what)


def test_a_replica_that_lost_its_disk_is_filled_again_and_nothing_is_lost() -> None:
    coverage = many(scenarios("secure")["wiped_replica"], seeds(15))
    for what in ("ack", "degraded_ack", "wiped_replica", "sent_snapshot", "in_step"):
        coverage.require(what)


def test_a_primary_that_lost_its_disk_does_not_empty_its_replica() -> None:
    coverage = many(scenarios("secure")["wiped_primary"], seeds(15))
    for what in ("ack", "refused", "turned_away", "promoted", "replaced_primary"):
        coverage.require(what)
