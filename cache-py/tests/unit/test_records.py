"""What one operation makes of a record."""

from __future__ import annotations

import pytest

from mesi_cache.core.directory.applied import Applied
from mesi_cache.core.placement import Placement
from mesi_cache.core.records import (
    ABSENT,
    Cas,
    Delete,
    Incr,
    Operation,
    Outcome,
    Record,
    Write,
    evaluate,
    expired,
)

WALL_MS = 1_000.0


@pytest.mark.parametrize(
    ("operation", "before", "outcome", "after"),
    [
        (Write(b"1"), ABSENT, Outcome("done", 1), Record(b"1", 1)),
        (Write(b"1"), Record(b"0", 7, 9_000), Outcome("done", 8), Record(b"1", 8)),
        (Write(b"1", 50), Record(None, 3), Outcome("done", 4), Record(b"1", 4, 1_050)),
        (Cas(0, b"1"), ABSENT, Outcome("done", 1), Record(b"1", 1)),
        (Cas(0, b"1"), Record(None, 3), Outcome("done", 4), Record(b"1", 4)),
        (Cas(3, b"1"), Record(None, 3), Outcome("mismatch", 0), None),
        (Cas(3, b"1"), Record(b"0", 3), Outcome("done", 4), Record(b"1", 4)),
        (Cas(2, b"1"), Record(b"0", 3), Outcome("mismatch", 3), None),
        (Delete(), Record(b"0", 3), Outcome("done", 0), Record(None, 4)),
        (Delete(), Record(None, 4), Outcome("absent", 0), None),
        (Incr(5), ABSENT, Outcome("done", 1, b"5"), Record(b"5", 1)),
        (Incr(-5), Record(b"2", 1, 9_000), Outcome("done", 2, b"-3"), Record(b"-3", 2, 9_000)),
        (Incr(1), Record(b'"a"', 1), Outcome("not_integer", 1), None),
        (Incr(1), Record(b"1.5", 1), Outcome("not_integer", 1), None),
        (Incr(1), Record(b"%d" % (2**63 - 1), 1), Outcome("not_integer", 1), None),
    ],
)
def test_an_operation_and_what_it_does(
    operation: Operation, before: Record, outcome: Outcome, after: Record | None
) -> None:
    assert evaluate(operation, before, WALL_MS) == (outcome, after)


def test_only_a_value_with_a_deadline_that_has_passed_is_expired() -> None:
    assert expired(Record(b"1", 1, 1_000), 1_000.0)
    assert not expired(Record(b"1", 1, 1_001), 1_000.0)
    assert not expired(Record(b"1", 1), 1e15)
    assert not expired(Record(None, 2, 5), 1_000.0)


def test_outcomes_are_remembered_until_their_sender_no_longer_waits() -> None:
    applied = Applied()
    for number in range(1, 1001):
        applied.note_floor("a", number - 5)
        applied.add("a", number, Outcome("done", number))
    assert applied.outcome("a", 1000) == Outcome("done", 1000)
    assert applied.forgotten("a", 994)
    assert not applied.forgotten("a", 995)
    rows = list(applied.rows())
    assert len(rows) == 1 + 6
    again = Applied()
    for row in rows:
        again.restore(*row)
    assert again.outcome("a", 996) == Outcome("done", 996)
    assert again.forgotten("a", 994)


def test_members_share_the_keys_evenly_and_a_new_member_takes_only_its_own() -> None:
    keys = [f"key{number}" for number in range(3_000)]
    three, four = Placement(["x", "y", "z"]), Placement(["z", "w", "y", "x"])
    counts = [sum(three.home(key) == member for key in keys) for member in three.members]
    assert all(800 < count < 1_200 for count in counts)
    moved = {four.home(key) for key in keys if three.home(key) != four.home(key)}
    assert moved == {"w"}
