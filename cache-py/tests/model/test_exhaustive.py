"""Every order of arrival, exhaustively, for small clusters: nothing stale, nothing stuck.

`MODEL_WORLDS=200000` explores the large cases to the end as well (minutes).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mesi_cache.core.placement import Placement
from mesi_cache.core.records import Cas, Delete, Incr, Operation, Write

sys.path.insert(0, str(Path(__file__).parent))

from explore import Budget, World, explore

WORLDS = int(os.environ.get("MODEL_WORLDS", "0"))


def _key(*names: str) -> str:
    placement = Placement(list(names))
    return next(k for k in (f"k{i}" for i in range(100)) if placement.home(k) == names[0])


X2, X3 = _key("a", "b"), _key("a", "b", "c")
Script = list[tuple[str, Operation | None]]


def _two(a: list[Operation | None], b: list[Operation | None]) -> dict[str, Script]:
    return {"a": [(X2, o) for o in a], "b": [(X2, o) for o in b]}


def _three(
    a: list[Operation | None], b: list[Operation | None], c: list[Operation | None]
) -> dict[str, Script]:
    return {"a": [(X3, o) for o in a], "b": [(X3, o) for o in b], "c": [(X3, o) for o in c]}


ONE, TWO = Write(b"1"), Write(b"2")

SMALL = {
    "two writers who read back": (_two([ONE, None], [TWO, None]), Budget(), 4),
    "a write, a read and an eviction": (_two([ONE, None], [None, TWO]), Budget(evict=1), 4),
    "a delete, a compare-and-set and a read": (
        _two([ONE, Delete()], [Cas(1, b"2"), None]),
        Budget(),
        4,
    ),
    "a repeated message": (_two([ONE], [TWO, None]), Budget(repeat=1, evict=1), 4),
    "two remote nodes": (_three([], [ONE, None], [None, TWO]), Budget(), 5),
    "a lost message and time": (_two([], [Incr(1), None]), Budget(drop=1, time=2), 3),
}
LARGE = {
    "three nodes that read and change": (_three([None], [ONE, Incr(1)], [None, None]), Budget(), 4),
    "a lost message between readers": (_two([ONE], [None, None]), Budget(drop=1, time=2), 3),
    "a restart and time": (_two([], [Incr(1), Incr(1)]), Budget(restart=1, time=2), 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_no_order_of_arrival_shows_an_old_value_or_leaves_anyone_waiting(name: str) -> None:
    scripts, budget, most_letters = SMALL[name]
    explored = explore(
        World(scripts, budget).begin(), most_letters=most_letters, most_worlds=100_000
    )
    assert explored.complete
    assert explored.quiet > 0


@pytest.mark.parametrize("name", LARGE)
def test_larger_cases_as_far_as_asked(name: str) -> None:
    scripts, budget, most_letters = LARGE[name]
    explore(World(scripts, budget).begin(), most_letters=most_letters, most_worlds=WORLDS or 400)
