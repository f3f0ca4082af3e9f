"""Lost disks in simulation: committed entries survive, for nobody counts on an empty node."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from wipe_harness import WIPE

from testkit.sim import many, seeds

pytestmark = pytest.mark.sim


def test_a_node_without_its_disk_counts_for_nothing_until_it_was_added_again() -> None:
    count = seeds(20)
    coverage = many(WIPE, count)
    coverage.require("wiped disks", len(count))
    coverage.require("disks replaced", len(count))
    coverage.require("strangers refused", 10 * len(count))
    coverage.require("operations", 50 * len(count))
    coverage.require("elections", 2 * len(count))
