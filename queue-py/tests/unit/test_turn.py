"""The end of a step."""

from __future__ import annotations

import asyncio

import pytest

from message_queue.turn import Turn


async def test_what_a_step_asked_for_is_called_when_it_is_over() -> None:
    turn, said = Turn(), []

    def step(word: str) -> None:
        turn.at_end(lambda: said.append(f"after {word}"))
        turn.step(said.append, f"within {word}")
        said.append(word)

    turn.step(step, "one")
    assert said == ["within one", "one", "after one"]


async def test_outside_of_steps_it_is_called_when_the_turn_of_the_loop_is_over() -> None:
    turn, said = Turn(), []
    turn.at_end(lambda: said.append(1))
    turn.at_end(lambda: said.append(2))
    assert said == []
    await asyncio.sleep(0)
    assert said == [1, 2]


async def test_a_step_takes_along_what_waited_before_it_in_order_and_once() -> None:
    turn, said = Turn(), []
    turn.at_end(lambda: said.append(1))
    turn.step(turn.at_end, lambda: said.append(2))
    assert said == [1, 2]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert said == [1, 2]
    turn.at_end(lambda: said.append(3))
    await asyncio.sleep(0)
    assert said == [1, 2, 3]


async def test_what_the_end_asks_for_is_done_as_well() -> None:
    turn, said = Turn(), []
    turn.step(turn.at_end, lambda: turn.at_end(lambda: said.append("more")))
    await asyncio.sleep(0)
    assert said == ["more"]


async def test_a_step_that_fails_has_an_end_too() -> None:
    turn, said = Turn(), []

    def fails() -> None:
        turn.at_end(lambda: said.append("told"))
        raise ValueError("a step of the core")

    with pytest.raises(ValueError, match="a step"):
        turn.step(fails)
    assert said == ["told"]
    turn.at_end(lambda: said.append("later"))
    await asyncio.sleep(0)
    assert said == ["told", "later"]
