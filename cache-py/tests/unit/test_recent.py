"""Records kept in memory beside the store: bounded, and never older than what is stored."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesi_cache.core.records import Record
from mesi_cache.storage.recent import OVERHEAD_BYTES, Recent

MOST = 40 * OVERHEAD_BYTES


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3 * OVERHEAD_BYTES) | st.none()),
        max_size=60,
    )
)
def test_what_is_found_is_what_was_put_last_and_the_bound_holds(
    puts: list[tuple[str, int | None]],
) -> None:
    recent, newest = Recent(MOST), dict[str, Record]()
    for version, (key, size) in enumerate(puts):
        newest[key] = Record(None if size is None else b"x" * size, version)
        recent.put(key, newest[key])
        assert recent.size_bytes <= MOST
        for each in "abcdefgh":
            assert recent.get(each) in (None, newest.get(each))
    assert recent.size_bytes >= len(recent) * OVERHEAD_BYTES


def test_the_least_recently_used_goes_first() -> None:
    recent = Recent(MOST)
    for number in range(39):
        recent.put(f"k{number:02}", Record(b"", number))
    assert recent.get("k00") == Record(b"", 0)
    recent.put("new", Record(b"", 1))
    recent.put("newer", Record(b"", 1))
    assert recent.get("k00") is not None
    assert recent.get("k01") is None


def test_one_that_is_too_large_does_not_leave_its_predecessor() -> None:
    recent = Recent(MOST)
    recent.put("a", Record(b"1", 1))
    recent.put("a", Record(b"x" * MOST, 2))
    assert recent.get("a") is None
    assert (len(recent), recent.size_bytes) == (0, 0)


def test_without_room_nothing_is_kept() -> None:
    recent = Recent(0)
    recent.put("a", Record(b"1", 1))
    assert recent.get("a") is None
