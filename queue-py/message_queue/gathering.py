"""Under load, the next batch of a partition waits while each turn of the event loop brings more.

When a batch is answered, its clients come back within a millisecond. Without that wait those who
came meanwhile make a batch of their own, and the clients fall into two halves that take turns:
twice the messages and syncs. No time is waited for: a turn that brings nothing, or the last of
TURNS, lets the batch go; after a batch of one nothing is waited for at all. (As the lock manager
does it.)
"""

from __future__ import annotations

TURNS = 6
ENOUGH_BYTES = 256 * 1024
"""A batch with so much in it waits for nobody: what a wait could save is little beside it, and the
disks could work on it meanwhile."""


class Gathering:
    """Of one partition: how long to wait for company."""

    __slots__ = ("_last", "_seen", "_turns")

    def __init__(self) -> None:
        self._last = 0
        """How many were in the last batch."""
        self._seen = 0
        self._turns = 0

    def goes_on(self, waiting: int, gathered_bytes: int) -> bool:
        """Asked once a turn: whether the batch waits for the next one. `waiting` operations are in
        it, with bodies of `gathered_bytes`."""
        if (
            self._last > 1
            and waiting > self._seen
            and self._turns < TURNS
            and gathered_bytes < ENOUGH_BYTES
        ):
            self._seen = waiting
            self._turns += 1
            return True
        self._last, self._seen, self._turns = waiting, 0, 0
        return False
