"""Deadlines in cluster time: a heap that tolerates changes of mind.

An item's `due_ms` may move at any time. Later costs nothing: its entry is put back when it comes
up too soon. That is what keepalives do, all day long. Sooner adds a second entry, and the first is
ignored when it comes up.

Entries stand in the order in which items are served, (due_ms, order), so that a part of what is due
can be taken, the same part on every node, however many are due together.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

_FEW = 1024  # below this, dead entries are not worth cleaning up
MANY = 1 << 62


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
        # (due, *order, number of the push, item); the number only keeps items from being compared.
        self._heap: list[tuple[int, int, str, int, T]] = []
        self._pushed = 0
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
            heappush(self._heap, (due, *item.order, self._pushed, item))

    def forget(self, item: T) -> None:
        """The item has no deadline any more (it may be gone)."""
        item.due_ms = 0
        if item.timer_ms:
            self._bury()

    def take_due(self, now_ms: int, most: int = MANY) -> list[T]:
        """The first `most` of those with `due_ms` <= now, by (due_ms, order); none of them is
        watched afterwards."""
        heap = self._heap
        due: list[T] = []
        while heap and heap[0][0] <= now_ms and len(due) < most:
            at, rank, name, _, item = heappop(heap)
            if item.timer_ms != at:
                continue  # superseded by a sooner entry
            item.timer_ms = 0
            if item.due_ms == at and item.order == (rank, name):
                due.append(item)
            elif item.due_ms:
                self.watch(item)  # it moved meanwhile, and has its turn there
        return due

    def next_ms(self) -> int | None:
        """A time before which nothing is due (it may be too soon, never too late); None: never."""
        heap = self._heap
        while heap:
            at, _, _, _, item = heap[0]
            if item.timer_ms == at and item.due_ms:
                return at
            heappop(heap)
            if item.timer_ms == at:
                item.timer_ms = 0
        return None

    def scrap(self, most: int) -> bool:
        """Throw some entries away, whatever they are; whether there are any left."""
        del self._heap[-most:]
        return bool(self._heap)

    def _bury(self) -> None:
        self._dead += 1
        if self._dead > _FEW and self._dead > len(self._heap) // 2:
            self._dead = 0
            live = [
                entry for entry in self._heap if entry[-1].due_ms and entry[-1].timer_ms == entry[0]
            ]
            for entry in self._heap:
                if not entry[-1].due_ms:
                    entry[-1].timer_ms = 0
            self._heap = live
            heapify(self._heap)
