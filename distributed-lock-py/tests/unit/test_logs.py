"""Log lines that a broken peer cannot multiply."""

from __future__ import annotations

from lock_manager.logs import Sparing


def test_what_happens_all_the_time_is_said_once_a_minute_with_how_often() -> None:
    sparing = Sparing()
    assert sparing.again("refused a", 100.0) == "refused a"
    assert sparing.again("refused b", 100.1) == "refused b"
    for tick in range(250):
        assert sparing.again("refused a", 100.2 + tick / 5) is None
    assert sparing.again("refused a", 160.1) == "refused a (250 more times since the last line)"
    assert sparing.again("refused a", 221.0) == "refused a"


def test_who_always_says_something_new_fills_no_memory() -> None:
    sparing = Sparing(most=10)
    assert all(sparing.again(f"garbage {i}", 1.0) for i in range(10_000))
    assert len(sparing._said) == 10
