"""The tables are complete, and the diagrams in DESIGN.md are drawn from them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mesi_cache.core.cache import requester
from mesi_cache.core.cache import table as lines
from mesi_cache.core.directory import table as entries

sys.path.insert(0, str(Path(__file__).parents[1]))

from draw import diagrams

DESIGN = Path(__file__).parents[2] / "DESIGN.md"


def test_every_action_of_a_line_is_implemented() -> None:
    assert set(requester._DOES) == set(lines.Do)


@pytest.mark.parametrize("event", [lines.Event.INV, lines.Event.FETCH_KEEP, lines.Event.FETCH_DROP])
def test_every_state_answers_what_its_home_asks(event: lines.Event) -> None:
    """A home that waits for an answer that never comes waits for the lease."""
    answers = {lines.Do.ACK_INV, lines.Do.ACK_GONE, lines.Do.ACK_KEPT}
    for state in lines.State:
        _, actions = lines.TABLE[state, event]
        assert answers & set(actions), f"{state} does not answer {event}"


def test_a_copy_is_dropped_whenever_its_line_stops_being_readable_and_only_then() -> None:
    for (state, event), (after, actions) in lines.TABLE.items():
        loses = state in lines.READABLE and after not in lines.READABLE
        assert loses == (lines.Do.DROP in actions), (state, event)


def test_a_request_is_settled_whenever_its_line_stops_waiting_for_data() -> None:
    for (state, event), (after, actions) in lines.TABLE.items():
        ends = state in lines.ASKING and after not in lines.ASKING
        assert ends == (lines.Do.SETTLE in actions), (state, event)


def test_data_that_is_dead_is_never_installed() -> None:
    for (state, event), (_, actions) in lines.TABLE.items():
        dead = event in (lines.Event.DATA_DEAD, lines.Event.DATA_NONE)
        assert not (dead and lines.Do.INSTALL in actions), (state, event)


def test_every_state_is_reached_and_left() -> None:
    for table, states, first in (
        (lines.TABLE, set(lines.State), lines.State.I),
        (entries.TABLE, set(entries.State), entries.State.N),
    ):
        reached = {first}
        while True:
            more = {after for (state, _), (after, _) in table.items() if state in reached}
            if more <= reached:
                break
            reached |= more
        assert reached == states
        left = {state for (state, _), (after, _) in table.items() if after is not state}
        assert left == states


def test_the_home_logs_before_it_grants_ownership_with_a_change() -> None:
    for _, actions in entries.TABLE.values():
        if entries.Do.GRANT_M in actions:
            assert actions.index(entries.Do.LOG) < actions.index(entries.Do.GRANT_M)


def test_the_diagrams_in_the_design_are_drawn_from_the_tables() -> None:
    """`python tests/draw.py` prints them."""
    text = DESIGN.read_text(encoding="utf-8")
    for name, diagram in diagrams().items():
        assert diagram in text, f"DESIGN.md's {name} is not the table's: run tests/draw.py"
