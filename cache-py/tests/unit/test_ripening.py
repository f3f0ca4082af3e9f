"""What waits for the log is answered in time all the same, and is bounded."""

from __future__ import annotations

from mesi_cache.core.messages import Hello
from mesi_cache.core.records import Outcome, Record
from mesi_cache.core.step import Answer, Changed, Found, Logged, Missing, Step, Unavailable
from mesi_cache.ripening import MOST, PATIENCE_MS, Ripening, instead, tellable


def step(now_ms: float, *answers: Answer, logs: bool = False) -> Step:
    made = Step(now_ms, 0.0)
    made.answers = list(enumerate(answers))
    made.send = [("peer", Hello())]
    if logs:
        made.log = [Logged("k", Record(b"1", 1))]
    return made


def test_steps_come_out_in_order_once_the_log_has_come_so_far() -> None:
    ripening = Ripening()
    steps = [step(0.0, logs=True), step(1.0), step(2.0, logs=True)]
    for position, each in zip((1, 1, 2), steps, strict=True):
        assert ripening.add(position, each)
    assert ripening.last == 2
    assert list(ripening.ripe(0)) == []
    assert list(ripening.ripe(1)) == steps[:2]
    assert list(ripening.ripe(5)) == steps[2:]
    assert ripening.last == 0


def test_an_answer_that_waits_too_long_is_given_without_what_must_not_be_told() -> None:
    ripening = Ripening()
    late = step(0.0, Found(b"1", 1, "S", False), Changed(Outcome("done", 1)), Missing())
    ripening.add(1, late)
    ripening.add(1, step(500.0, Missing()))
    assert ripening.overdue(PATIENCE_MS - 1) == []
    overdue = ripening.overdue(PATIENCE_MS + 1)
    assert [(token, answer.definite) for token, answer in overdue] == [
        (0, True), (1, False), (2, True),
    ]  # fmt: skip
    assert ripening.overdue(PATIENCE_MS + 2) == []  # each is told once
    assert late.send  # what it has for others still goes out when it may
    assert late.answers == []


def test_that_there_is_no_answer_need_not_wait() -> None:
    held = step(0.0, Unavailable(True, "late"), Missing())
    assert tellable(held) == [(0, Unavailable(True, "late"))]
    assert held.answers == [(1, Missing())]


def test_what_is_not_logged_is_dropped_like_a_lost_message_when_there_is_no_room() -> None:
    ripening = Ripening()
    for _ in range(MOST):
        ripening.add(1, step(0.0))
    refused = step(0.0, Changed(Outcome("mismatch", 3)))
    assert not ripening.add(1, refused)
    assert instead(refused)[0][1].definite is False
    assert ripening.add(1, step(0.0, logs=True))  # what is logged must be told of
