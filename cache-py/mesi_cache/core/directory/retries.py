"""Changes that clients have given a name of their own (Idempotency-Key), and what became of them.

The name may come again from any node, so unlike the operation ids in applied.py it belongs to no
member, and no floor says when it is no longer waited for: it is remembered for a stated time, and
when there are too many of them, new ones are refused rather than old ones forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterable

from mesi_cache.core.records import Once, Outcome

REMEMBERED_MS = 3_660_000  # a minute longer than the node's claim to the name
MOST = 100_000
REUSED = Outcome("reused", 0)
FULL = Outcome("full", 0)

RetryRow = tuple[str, str, int, Outcome]  # name, print, until (wall clock, ms), outcome


class Retries:
    """What one home remembers. Times are its own wall clock's."""

    def __init__(self, rows: Iterable[RetryRow] = (), most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[str, int, Outcome]] = OrderedDict()
        for name, print, until_ms, outcome in rows:
            self._kept[name] = (print, until_ms, outcome)

    def __len__(self) -> int:
        return len(self._kept)

    def outcome(self, once: Once, wall_ms: float) -> Outcome | None:
        """What the change of this name did, or why it must not be done; None: do it."""
        while self._kept:  # in order of time, or nearly: wall clocks jump
            name, (_, until_ms, _) = next(iter(self._kept.items()))
            if until_ms > wall_ms:
                break
            del self._kept[name]
        kept = self._kept.get(once.name)
        if kept is None:
            return FULL if len(self._kept) >= self._most else None
        print, _, outcome = kept
        return outcome if print == once.print else REUSED

    def add(self, once: Once, wall_ms: float, outcome: Outcome) -> int:
        """It has happened. Returns until when that is remembered."""
        until_ms = int(wall_ms) + REMEMBERED_MS
        self._kept[once.name] = (once.print, until_ms, outcome)
        return until_ms
