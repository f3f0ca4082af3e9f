"""Cluster time: what delays, leases, TTLs and the dedupe window are measured in.

It runs on this node's monotonic clock, jumps forward to whatever a peer has seen, and never goes
back. A step counts at most ``GAP_MS``, so that a node that was paused (or whose machine slept) does
not expire everything on waking; and it stands still while the whole cluster is down, because the
last value is kept in the log. Wall clocks matter once, at the birth of a cluster.
"""

from __future__ import annotations

GAP_MS = 500
JUMP_MS = 20
"""Jumps are told from here on: corrections of a few milliseconds matter to nobody."""


class ClusterClock:
    """Invariant: ``ms`` never falls."""

    __slots__ = ("_jumped_ms", "_last_ms", "ms")

    def __init__(self, restored_ms: int, now_ms: int) -> None:
        self.ms = restored_ms
        """0 while unknown: a node without a past keeps silent about time until it hears of it."""
        self._last_ms = now_ms
        self._jumped_ms = 0

    def advance(self, now_ms: int) -> None:
        """Monotonic time went on."""
        if self.ms and now_ms > self._last_ms:
            self.ms += min(now_ms - self._last_ms, GAP_MS)
        self._last_ms = max(self._last_ms, now_ms)

    def hear(self, cluster_ms: int) -> None:
        """A peer's cluster time, or a stored one. `advance` first: what is compared must be of the
        same moment, or the clocks of a cluster push each other on. And one less: up to a
        millisecond of the own reading is not shown, so that taking over a peer's as it is would
        run ahead of that peer, which would take over that, and so on."""
        cluster_ms -= 1
        if cluster_ms > self.ms:
            if self.ms:
                self._jumped_ms += cluster_ms - self.ms
            self.ms = cluster_ms

    def take_jump(self) -> int:
        """By how much it jumped ahead of this node's own time since the last call; 0 while that is
        next to nothing."""
        if self._jumped_ms < JUMP_MS:
            return 0
        jumped_ms, self._jumped_ms = self._jumped_ms, 0
        return jumped_ms
