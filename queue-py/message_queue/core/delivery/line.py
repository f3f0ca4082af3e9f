"""The line of ready messages of one queue: by priority, then in the order they were stored.

New messages come in order and go to a deque; those that come back (a lease or a delay that ended)
go to a small heap; the head is the smaller of the two. So the common path is O(1), the rest O(log
n). Removal is lazy: a message is in line as long as its state says READY.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, merge

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import PRIORITIES, Entry


class Line:
    """Ready messages of one queue. `pop` gives each READY entry in order, exactly once."""

    __slots__ = ("_fresh", "_levels", "_returned")

    def __init__(self) -> None:
        self._fresh: list[deque[Entry] | None] = [None] * PRIORITIES
        self._returned: list[list[tuple[int, Entry]] | None] = [None] * PRIORITIES
        self._levels = 0
        """Bit p is set when priority p may have messages."""

    def push(self, entry: Entry) -> None:
        """Put a READY entry in line. One that is still in line (lazily removed) may come twice:
        the second copy is skipped, because the first changes the state."""
        level = entry.priority
        fresh = self._fresh[level]
        if fresh is None:
            fresh = self._fresh[level] = deque()
        if not fresh or fresh[-1].dot < entry.dot:
            fresh.append(entry)
        else:
            returned = self._returned[level]
            if returned is None:
                returned = self._returned[level] = []
            # Entries have no order, and need none: equal dots are the same entry.
            heappush(returned, (entry.dot, entry))
        self._levels |= 1 << level

    def peek(self) -> Entry | None:
        """The next message, still in line."""
        while self._levels:
            level = self._levels.bit_length() - 1
            fresh, returned = self._fresh[level], self._returned[level]
            while fresh and fresh[0].state is not State.READY:
                fresh.popleft()
            while returned and returned[0][1].state is not State.READY:
                heappop(returned)
            if fresh and (not returned or fresh[0].dot <= returned[0][0]):
                return fresh[0]
            if returned:
                return returned[0][1]
            self._levels ^= 1 << level
            self._fresh[level] = self._returned[level] = None
        return None

    def browse(self, most: int) -> list[Entry]:
        """Up to `most` messages in the order of delivery, all still in line. O(returned + most)."""
        found: dict[int, Entry] = {}
        for level in range(PRIORITIES - 1, -1, -1):
            for entry in self._in_order(level):
                if len(found) >= most:
                    return list(found.values())
                if entry.state is State.READY:
                    found[entry.dot] = entry
        return list(found.values())

    def _in_order(self, level: int) -> Iterator[Entry]:
        fresh, returned = self._fresh[level] or deque(), sorted(self._returned[level] or [])
        return (entry for _, entry in merge(((e.dot, e) for e in fresh), returned))

    def trim(self, live: int) -> None:
        """Drop lazily removed entries when they outnumber the `live` ones. Amortised O(1)."""
        for level in range(PRIORITIES):
            fresh, returned = self._fresh[level], self._returned[level]
            if fresh is not None and len(fresh) > 2 * live + 64:
                self._fresh[level] = deque(e for e in fresh if e.state is State.READY)
            if returned is not None and len(returned) > 2 * live + 64:
                kept = [item for item in returned if item[1].state is State.READY]
                heapify(kept)
                self._returned[level] = kept
