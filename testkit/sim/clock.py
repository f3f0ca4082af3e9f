"""Virtual time: a heap of (due time, sequence number), so that equal times run in the order asked.

Time is an integer count of microseconds since the run began; delays are given in milliseconds and
may be fractions. Nothing here knows the wall clock, which is why a seed replays exactly.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timer:
    """One scheduled call. `cancel()` is free: the heap drops the entry when it comes up."""

    __slots__ = ("_action", "_args", "due_us")

    def __init__(self, due_us: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.due_us = due_us
        self._action: Callable[..., None] | None = action
        self._args = args

    @property
    def active(self) -> bool:
        """True until it ran or was cancelled."""
        return self._action is not None

    def cancel(self) -> None:
        """Never run; harmless if it already ran."""
        self._action = None
        self._args = ()

    def fire(self) -> bool:
        """Run the action once; False if it was cancelled."""
        action = self._action
        if action is None:
            return False
        args = self._args
        self.cancel()
        action(*args)
        return True


class Clock:
    """The run's only source of time and order."""

    __slots__ = ("_heap", "_sequence", "now_us")

    def __init__(self) -> None:
        self.now_us = 0
        self._heap: list[tuple[int, int, Timer]] = []
        self._sequence = 0

    @property
    def now_ms(self) -> float:
        """Milliseconds since the run began."""
        return self.now_us / 1000

    def call_at(self, due_us: int, action: Callable[..., None], *args: Any) -> Timer:
        """Run `action(*args)` at `due_us` (now, if that is past)."""
        timer = Timer(max(due_us, self.now_us), action, args)
        self._sequence += 1
        heapq.heappush(self._heap, (timer.due_us, self._sequence, timer))
        return timer

    def call_later(self, delay_ms: float, action: Callable[..., None], *args: Any) -> Timer:
        """Run `action(*args)` after `delay_ms` of virtual time."""
        return self.call_at(self.now_us + round(delay_ms * 1000), action, *args)

    def step(self, until_us: int | None = None) -> bool:
        """Run the next event; False when none is left (or none is due by `until_us`).

        When nothing is due by `until_us` the clock moves to it.
        """
        heap = self._heap
        while heap:
            due_us, _, timer = heap[0]
            if until_us is not None and due_us > until_us:
                break
            heapq.heappop(heap)
            if not timer.active:
                continue
            self.now_us = due_us
            timer.fire()
            return True
        if until_us is not None and until_us > self.now_us:
            self.now_us = until_us
        return False

    def __len__(self) -> int:
        return len(self._heap)
