"""The dedupe window of one partition: which ids were used within the last five minutes, by what."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

Key = tuple[str, str, bool]
"""(queue, id, whether it is a move's)"""


class Mark(Struct, eq=False, gc=False):
    """One id in use."""

    message_dot: int
    """0: not proposed yet, as `mark_dot`."""
    mark_dot: int
    until_ms: int


class DedupeWindow:
    """Invariant: `_order` names every mark in `_marks`, sorted by `until_ms` (the window has one
    length; after a takeover, `sort` sees to it)."""

    def __init__(self) -> None:
        self._marks: dict[Key, Mark] = {}
        self._order: deque[tuple[int, Key]] = deque()

    def find(self, key: Key, now_ms: int) -> Mark | None:
        """The mark of an id, if its window is open."""
        mark = self._marks.get(key)
        return mark if mark is not None and mark.until_ms > now_ms else None

    def add(self, key: Key, mark: Mark) -> None:
        """An id is used from now on."""
        self._marks[key] = mark
        self._order.append((mark.until_ms, key))

    def sort(self) -> None:
        """Marks were added out of order."""
        self._order = deque(sorted(self._order))

    def next_ms(self) -> int | None:
        """When `expire` next has something to do; None: never. O(1)."""
        return self._order[0][0] if self._order else None

    def expire(self, now_ms: int) -> list[int]:
        """Forget ids whose window closed; the dots of their marks, to be acked."""
        closed = []
        while self._order and self._order[0][0] <= now_ms:
            until_ms, key = self._order.popleft()
            mark = self._marks.get(key)
            if mark is not None and mark.until_ms == until_ms:
                del self._marks[key]
                closed.append(mark.mark_dot)
        return closed

    def purge(self, queue: str, upto: int) -> list[int]:
        """Forget the ids of a queue's messages up to that dot; the dots of their marks.
        O(marks)."""
        keys = [
            key
            for key, mark in self._marks.items()
            if key[0] == queue and 0 < mark.message_dot <= upto
        ]
        return [self._marks.pop(key).mark_dot for key in keys]

    def __len__(self) -> int:
        return len(self._marks)
