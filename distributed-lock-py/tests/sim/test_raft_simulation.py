"""Raft in simulation: every invariant after every event, linearizable histories, and faults that
did occur."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from register_harness import FIVE, MEMBERSHIP, RAFT

from testkit.sim import many, seeds

pytestmark = pytest.mark.sim


def test_three_nodes_keep_their_promises_under_every_fault() -> None:
    count = seeds(40)
    coverage = many(RAFT, count)
    for happening, per_seed in (
        ("operations", 40),
        ("reads", 15),
        ("elections", 1),
        ("unknown outcomes", 1),
        ("snapshots taken", 2),
        ("snapshots restored", 0.5),
        ("truncations", 0.3),
        ("pre-votes", 2),
        ("step downs", 0.1),
        ("lost quorums", 0.05),
        ("failed_syncs", 0.03),
    ):
        coverage.require(happening, int(per_seed * len(count)))


def test_members_come_and_go_and_leaders_hand_over() -> None:
    count = seeds(25)
    coverage = many(MEMBERSHIP, count)
    for happening, per_seed in (
        ("operations", 30),
        ("add: taken", 1),
        ("remove: taken", 1),
        ("transfer: taken", 1),
        ("configurations", 3),
        ("snapshots restored", 0.5),
    ):
        coverage.require(happening, int(per_seed * len(count)))


def test_five_nodes_keep_their_promises_under_every_fault() -> None:
    count = seeds(10)
    coverage = many(FIVE, count)
    coverage.require("operations", 60 * len(count))
    coverage.require("elections", len(count))
