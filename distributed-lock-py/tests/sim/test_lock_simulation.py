"""The whole service but HTTP in simulation: exclusion, fencing and leases judged from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lock_harness import LOCK

from testkit.sim import many, seeds

pytestmark = pytest.mark.sim


def test_locks_exclude_and_tokens_grow_under_every_fault() -> None:
    count = seeds(50)
    coverage = many(LOCK, count)
    for happening, per_seed in (
        ("grants", 15),
        ("elections", 1),
        ("retries", 3),
        ("expired leases", 2),
        ("renewals", 2),
        ("hung up", 1),
        ("Held", 1),
        ("TimedOut", 1),
        ("Deadlock", 0.05),
        ("released too late", 0.1),
        ("stamps", 2),
        ("leases that must wait for their end", 0.1),
        ("snapshots restored", 0.5),
    ):
        coverage.require(happening, int(per_seed * len(count)))
