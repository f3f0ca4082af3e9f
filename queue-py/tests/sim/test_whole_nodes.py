"""Whole nodes on virtual time (`whole_node.py`, `whole_clients.py`): clients stream, take in lots,
ack in runs, and letters die and are sent back, while everything fails; with even seeds the ring
changes, too. ``WHOLE_SEEDS``: how many (``SIM_SEED_FROM`` from where), of ``WHOLE_SECONDS`` each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from testkit.sim.coverage import Coverage

sys.path.insert(0, str(Path(__file__).parent))
from whole_clients import play

pytestmark = [pytest.mark.sim, pytest.mark.timeout(3_600 if "WHOLE_SEEDS" in os.environ else 120)]

SEEDS = int(os.environ.get("WHOLE_SEEDS", "1"))
FIRST = int(os.environ.get("SIM_SEED_FROM", "7"))
SECONDS = float(os.environ.get("WHOLE_SECONDS", "4"))


def test_whole_nodes_lose_and_double_nothing_and_keep_the_order_of_streams(tmp_path: Path) -> None:
    total = Coverage()
    for seed in range(FIRST, FIRST + SEEDS):
        total.update(play(seed, tmp_path / str(seed), SECONDS, moves=seed % 2 == 0))
    for name in ("produce_ok", "ack_ok", "ordered_sessions", "delivered_together"):
        total.require(name, 10 * SEEDS)
    for name in ("two_batches_under_way", "parcels", "detours_open", "letters"):
        total.require(name, SEEDS)
    if SEEDS >= 10:
        for name in (
            "sessions_across_owners", "acked_as_a_run", "overtaken", "redriven", "frames_lost",
            "produce_unknown", "fault_kill", "fault_power", "fault_stop", "fault_pause",
            "fault_swallow", "fault_wipe", "join", "leave", "departed",
        ):  # fmt: skip
            total.require(name, 1)
