"""Every order of arrival, exhaustively, for small clusters: nothing stale, nothing stuck.

`MODEL_WORLDS=1000000` explores the large cases to the end as well (minutes);
`python cache-py/tests/model/model_cases.py --all` prints how many worlds there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesi_cache.core.cache import requester
from mesi_cache.core.cache.controller import Cache
from mesi_cache.core.cache.line import Line
from mesi_cache.core.cache.requester import Requester
from mesi_cache.core.cache.table import Do

sys.path.insert(0, str(Path(__file__).parent))

from explore import Budget, Case, explore
from model_cases import LARGE, MORE, OVER, READ, SMALL, three_nodes, two_nodes

WORLDS = int(os.environ.get("MODEL_WORLDS", "0"))


@pytest.mark.parametrize("name", SMALL)
def test_no_order_of_arrival_shows_an_old_value_or_leaves_anyone_waiting(name: str) -> None:
    explored = explore(SMALL[name], most_worlds=100_000)
    print(name, explored)
    assert explored.complete
    assert explored.quiet > 0


@pytest.mark.parametrize("name", LARGE)
def test_larger_cases_as_far_as_asked(name: str) -> None:
    explored = explore(LARGE[name], most_worlds=WORLDS or 60)
    print(name, explored)
    assert explored.complete or explored.worlds == (WORLDS or 60)


def test_nodes_that_play_the_same_part_are_told_apart_only_when_asked_to() -> None:
    """Without the reduction there are more worlds, up to twice as many, and all are good."""
    scripts = three_nodes([MORE], [READ], [READ])
    whole = explore(Case(scripts, most_letters=3), most_worlds=10_000)
    half = explore(Case(scripts, most_letters=3, alike=("b", "c")), most_worlds=10_000)
    assert half.complete
    assert whole.complete
    assert whole.worlds / 2 <= half.worlds < whole.worlds


def _nothing(*_: Any) -> None:
    """A step that somebody forgot."""


BUGS: dict[str, tuple[type, str, Callable[..., Any], Case]] = {
    "a copy lives on after its lease": (
        Line,
        "alive",
        lambda line, now_ms: now_ms < line.stop_ms,
        Case(two_nodes([READ, MORE], [MORE, READ]), Budget(drop=1, time=(OVER,)), most_letters=3),
    ),
    "what an invalidation killed is installed": (
        Requester,
        "_do_kill",
        _nothing,
        SMALL["two writers who read back"],
    ),
    "nobody asks again": (
        Cache,
        "_resend",
        _nothing,
        Case(two_nodes([], [MORE]), Budget(drop=1), most_letters=3),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_with_the_moves_that_lead_to_it(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name, wrong, case = BUGS[bug]
    monkeypatch.setattr(kind, name, wrong)
    if name == "_do_kill":
        monkeypatch.setitem(requester._DOES, Do.KILL, wrong)
    with pytest.raises(AssertionError) as found:
        explore(case, most_worlds=20_000)
    assert "\nask " in str(found.value)
