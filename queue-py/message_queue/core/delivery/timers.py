"""Moments at which something may be due, as a heap with lazy removal."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush


class Timers:
    """(due_ms, dot), lazily invalid: whoever is told looks whether it still means anything."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def add(self, due_ms: int, dot: int) -> None:
        """Something may be due then. O(log n)."""
        heappush(self._heap, (due_ms, dot))

    def next_ms(self) -> int | None:
        """The first moment, None: never. O(1)."""
        return self._heap[0][0] if self._heap else None

    def pop(self, now_ms: int) -> int | None:
        """The dot of a timer whose moment has come, None when there is none."""
        if self._heap and self._heap[0][0] <= now_ms:
            return heappop(self._heap)[1]
        return None

    def crowded(self, count: int) -> bool:
        """Whether most of them must be stale, if `count` things are held, with two moments each at
        most: time to `replace` them, which then is O(1) amortised."""
        return len(self._heap) > 4 * count + 1024

    def replace(self, moments: Iterable[tuple[int, int]]) -> None:
        """These are all that matter. O(moments)."""
        self._heap = list(moments)
        heapify(self._heap)

    def all(self) -> list[tuple[int, int]]:
        """Every one, stale ones too."""
        return list(self._heap)
