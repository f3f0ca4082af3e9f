"""Deadlines in cluster time: a heap that tolerates changes of mind.

An item's `due_ms` may move at any time. Later costs nothing: its entry is put back when it comes
up too soon. That is what keepalives do, all day long. Sooner adds a second entry, and the first is
ignored when it comes up.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

_FEW = 1024  # below this, dead entries are not worth cleaning up


class Timed(Protocol):
    due_ms: int  # 0: never
    timer_ms: int  # this item's earliest entry in the heap; 0: it has none

    @property
    def order(self) -> tuple[int, str]:
        """Unique; on every node alike, those due together are served in this order."""
        ...


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    __slots__ = ("_dead", "_heap", "_pushed")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._pushed = 0  # breaks ties inside the heap; never seen outside
        self._dead = 0  # at most this many entries have no item behind them

    def watch(self, item: T) -> None:
        """Call after setting `item.due_ms`."""
        due = item.due_ms
        if not due:
            self.forget(item)
        elif not item.timer_ms or due < item.timer_ms:
            if item.timer_ms:
                self._bury()
            item.timer_ms = due
            self._pushed += 1
            heappush(self._heap, (due, self._pushed, item))

    def forget(self, item: T) -> None:
        """The item has no deadline any more (it may be gone)."""
        item.due_ms = 0
        if item.timer_ms:
            self._bury()

    def take_due(self, now_ms: int) -> list[T]:
        """Everything with `due_ms` <= now, by (due_ms, order); none of it is watched afterwards."""
        heap = self._heap
        if not heap or heap[0][0] > now_ms:
            return []
        due: list[T] = []
        while heap and heap[0][0] <= now_ms:
            at, _, item = heappop(heap)
            if item.timer_ms != at:
                continue  # superseded by a sooner entry
            item.timer_ms = 0
            if item.due_ms > now_ms:
                self.watch(item)
            elif item.due_ms:
                due.append(item)
        due.sort(key=lambda item: (item.due_ms, item.order))
        return due

    def next_ms(self) -> int | None:
        """A time before which nothing is due (it may be too soon, never too late); None: never."""
        heap = self._heap
        while heap:
            at, _, item = heap[0]
            if item.timer_ms == at and item.due_ms:
                return at
            heappop(heap)
            if item.timer_ms == at:
                item.timer_ms = 0
        return None

    def _bury(self) -> None:
        self._dead += 1
        if self._dead > _FEW and self._dead > len(self._heap) // 2:
            self._dead = 0
            live = [
                (at, n, item) for at, n, item in self._heap if item.due_ms and item.timer_ms == at
            ]
            for _, _, item in self._heap:
                if not item.due_ms:
                    item.timer_ms = 0
            self._heap = live
            heapify(self._heap)
