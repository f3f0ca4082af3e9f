"""Time that passes only while a leader lets it pass (guarantee 8)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lock_manager.core.cluster_clock import MAX_STEP_MS, ClusterClock


def test_time_passes_under_a_leader_and_stands_still_without_one() -> None:
    clock = ClusterClock()
    assert clock.observe(1_000) == 0
    clock.lead(5_000, 1_000)
    assert clock.observe(1_300) == 5_300
    clock.follow()
    assert clock.observe(9_000) == 5_300
    clock.lead(5_310, 9_000)
    assert clock.observe(9_010) == 5_320


def test_a_leader_that_slept_does_not_let_all_that_time_pass() -> None:
    clock = ClusterClock()
    clock.lead(0, 0)
    assert clock.observe(3_600_000) == MAX_STEP_MS
    assert clock.observe(3_600_100) == MAX_STEP_MS + 100


def test_what_the_log_tells_a_leader_never_sets_it_back() -> None:
    clock = ClusterClock()
    clock.lead(500, 50)
    clock.hear(700)
    clock.hear(600)
    assert clock.observe(60) == 710


def test_a_leader_that_led_before_forgets_the_time_that_only_it_let_pass() -> None:
    clock = ClusterClock()
    clock.lead(0, 0)
    assert clock.observe(400) == 400
    clock.follow()
    clock.lead(150, 500)
    assert clock.observe(510) == 160


@given(
    st.lists(
        st.tuples(st.sampled_from(["lead", "follow", "hear", "observe"]), st.integers(0, 10_000))
    )
)
def test_time_never_goes_back_under_a_leader(steps: list[tuple[str, int]]) -> None:
    clock = ClusterClock()
    seen = 0
    for step, number in steps:
        match step:
            case "lead":
                clock.lead(number, number)
                seen = number
            case "follow":
                clock.follow()
            case "hear":
                clock.hear(number)
            case _:
                clock.observe(number)
        assert clock.now_ms >= seen
        seen = clock.now_ms
