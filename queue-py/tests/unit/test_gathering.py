"""How long a batch waits for company."""

from __future__ import annotations

from message_queue.gathering import TURNS, Gathering


def test_a_lone_client_waits_for_nobody() -> None:
    gathering = Gathering()
    assert not gathering.goes_on(1)
    assert not gathering.goes_on(1)


def test_a_batch_waits_while_each_turn_brings_more_and_no_longer() -> None:
    gathering = Gathering()
    assert not gathering.goes_on(8), "the first one has nobody to wait for"
    assert gathering.goes_on(2)
    assert gathering.goes_on(5)
    assert not gathering.goes_on(5), "a turn that brought nothing"
    assert [gathering.goes_on(n) for n in range(1, TURNS + 2)] == [True] * TURNS + [False]
