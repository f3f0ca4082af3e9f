"""Moments at which something may be due, as a heap with lazy removal."""

from __future__ import annotations

from collections.abc import Container
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

    def trim(self, *held: Container[int], count: int) -> None:
        """Drop timers of what is held nowhere, once 3/4 of all must be. Amortised O(1)."""
        if len(self._heap) > 4 * count + 1024:
            kept = {item for item in self._heap if any(item[1] in place for place in held)}
            self._heap = list(kept)
            heapify(self._heap)

    def all(self) -> list[tuple[int, int]]:
        """Every one, stale ones too."""
        return list(self._heap)
