"""How much memory messages may take, and what follows when they take it."""

from __future__ import annotations

METADATA_SHARE = 2
"""What cannot leave memory may take this many times `--memory_bytes` besides,"""
METADATA_LEAST = 256 << 20
"""or this much, if that is more: a small memory for bodies is no limit on how many there are."""


class MessageMemory:
    """As of the last look. Bodies, and messages that merely wait, are in memory as far as there is
    room. What cannot leave it (leases, delays, lifetimes, groups, the index) has a bound as well:
    beyond it new messages are refused."""

    __slots__ = ("_limit", "full", "keep_bodies", "used")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.keep_bodies = True
        """Whether bodies may still be kept in memory."""
        self.full = False
        """Whether new messages must be put off."""
        self.used = 0
        """About what messages take, in bytes."""

    def look(self, in_play: int, index: int) -> None:
        """`in_play`: bytes of messages in play with their bodies; `index`: of the index."""
        self.keep_bodies = in_play < self._limit
        self.used = in_play + index
        self.full = self.used > self._limit + max(METADATA_SHARE * self._limit, METADATA_LEAST)
