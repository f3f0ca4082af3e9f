"""The lines that hold a slot, and which of them goes when one more is needed.

Both are dicts from key to line, so that a hit is one look-up; both cost O(1) an operation (S3-FIFO
amortised: a line that is passed over pays with a use that it had). Only `touch`, which a client's
call makes, changes what a line is worth: messages never do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

from mesi_cache.core.cache.line import Line

Policy = Literal["lru", "s3fifo"]


class Lru(OrderedDict[str, Line]):
    """The least recently used goes: the order of the dict is the order of use."""

    touch = OrderedDict.move_to_end  # no Python in between: this is part of every hit

    def add(self, line: Line) -> None:
        self[line.key] = line

    def remove(self, line: Line) -> None:
        del self[line.key]

    def victim(self) -> Line:
        """The line that goes next. It must be removed before anything else happens."""
        return next(iter(self.values()))

    def in_order(self) -> Iterable[Line]:
        """Those that go first, first."""
        return self.values()


class S3Fifo(dict[str, Line]):
    """S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction",
    SOSP 2023): new lines pass through a small queue, a tenth of the slots; what is not used twice
    there goes soon, and scans never reach the main queue. A ghost queue remembers the keys that
    went from the small one (no values): who comes back from there had only been looked at too
    seldom, and goes to the main queue at once. There, a line goes when its turn comes and it was
    not used since its last turn.

    One addition: a line that another node's write takes away from the main queue leaves its
    key in the ghost queue. It has lost its data, not its worth.

    Invariants: each line is in exactly one of `small` and `main`; `ghost` names no line.
    """

    MOST_USES = 3

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.small_share = max(1, capacity // 10)
        self.ghost_share = max(1, capacity - self.small_share)
        self.small: OrderedDict[str, Line] = OrderedDict()
        self.main: OrderedDict[str, Line] = OrderedDict()
        self.ghost: OrderedDict[str, None] = OrderedDict()

    def touch(self, key: str) -> None:
        line = self[key]
        if line.uses < self.MOST_USES:
            line.uses += 1

    def add(self, line: Line) -> None:
        line.uses = 0
        self[line.key] = line
        if line.key in self.ghost:
            del self.ghost[line.key]
            self.main[line.key] = line
        else:
            self.small[line.key] = line

    def remove(self, line: Line) -> None:
        del self[line.key]
        if self.small.pop(line.key, None) is None and self.main.pop(line.key, None) is not None:
            self._remember(line.key)

    def victim(self) -> Line:
        """The line that goes next; it is in no queue any more, and must be removed at once."""
        while True:
            if len(self.small) >= self.small_share or not self.main:
                key, line = self.small.popitem(last=False)
                if line.uses <= 1:
                    self._remember(key)
                    return line
                self.main[key] = line
                line.uses = 0
            else:
                key, line = self.main.popitem(last=False)
                if not line.uses:
                    return line
                self.main[key] = line
                line.uses -= 1

    def in_order(self) -> Iterable[Line]:
        """The small queue's, then the main one's, each oldest first."""
        return [*self.small.values(), *self.main.values()]

    def _remember(self, key: str) -> None:
        self.ghost[key] = None
        if len(self.ghost) > self.ghost_share:
            self.ghost.popitem(last=False)


Slots = Lru | S3Fifo


def slots(policy: Policy, capacity: int) -> Slots:
    """Empty slots under `policy`; `capacity` is at least 1 and kept by the caller."""
    return Lru() if policy == "lru" else S3Fifo(capacity)
