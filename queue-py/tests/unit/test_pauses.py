"""How long moves of letters pause before they try again."""

from __future__ import annotations

from itertools import accumulate

from message_queue.dead_letters import next_pause_s


def test_who_had_no_owner_tries_again_at_once_and_who_found_no_room_more_and_more_rarely() -> None:
    """A question without an owner waits for one by itself, nearly two seconds: what it lacked may
    be there by now, and a redrive of thousands must not sleep through it."""
    absent = accumulate([503] * 20, next_pause_s, initial=0.1)
    assert max(absent) == 0.1
    full = list(accumulate([429] * 20, next_pause_s, initial=0.1))
    assert full == sorted(full)
    assert full[-1] == 5.0
    assert next_pause_s(5.0, 503) == 0.1
