"""The clock that leases are counted on: it only goes forward, also while the machine sleeps (a
lease must not outlive a closed lid).

Linux has CLOCK_BOOTTIME for that, read without a system call. macOS's CLOCK_MONOTONIC counts sleep
(`time.monotonic` there does not: it reads mach_absolute_time). Windows' monotonic clocks count it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial


def _source() -> Callable[[], float]:
    clock: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None and sys.platform != "win32":
        clock = time.CLOCK_MONOTONIC
    return partial(time.clock_gettime, clock) if clock is not None else time.monotonic


seconds = _source()


def now_ms() -> float:
    """Milliseconds since some time in the past."""
    return seconds() * 1000
