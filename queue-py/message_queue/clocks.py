"""The node's clocks. Everything is decided by monotonic time; the wall clock is for people."""

from __future__ import annotations

import time
from typing import Final

# A clock that goes on while the machine sleeps (`time.monotonic` stands still meanwhile on Linux
# and macOS): an owner that slept through its lease must find it over.
_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def monotonic_ms() -> int:
    """Milliseconds since some moment, never going back."""
    if _CLOCK is None:  # Windows, where the plain one counts sleep
        return time.monotonic_ns() // 1_000_000
    return time.clock_gettime_ns(_CLOCK) // 1_000_000


def wall_ms() -> int:
    """Milliseconds of the Unix epoch."""
    return time.time_ns() // 1_000_000
