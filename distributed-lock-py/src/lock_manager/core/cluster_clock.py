"""Cluster time: milliseconds that pass only while a leader lets them pass (guarantee 8).

The leader's monotonic clock drives it. A new leader goes on from the highest time that it heard of
the leader before it, so an election costs the leases nothing; a step of more than MAX_STEP_MS
counts as that much, so a leader that was stopped, or a machine that slept, does not expire
everybody on waking.
"""

from __future__ import annotations

MAX_STEP_MS = 500


class ClusterClock:
    """Invariant: `now_ms` never goes back while this node leads."""

    __slots__ = ("_seen_ms", "now_ms")

    def __init__(self) -> None:
        self.now_ms = 0
        self._seen_ms: int | None = None

    def lead(self, from_ms: int, monotonic_ms: int) -> None:
        """This node leads from now on, at `from_ms`. What it let pass when it led before, others
        may have never heard of: then that time has not passed."""
        self.now_ms = from_ms
        self._seen_ms = monotonic_ms

    def follow(self) -> None:
        """Somebody else leads: time stands still here, until `hear` or `lead`."""
        self._seen_ms = None

    def hear(self, stamp_ms: int) -> None:
        """Another node's cluster time."""
        self.now_ms = max(self.now_ms, stamp_ms)

    def observe(self, monotonic_ms: int) -> int:
        """Cluster time now. A leader calls this at least at every heartbeat."""
        if self._seen_ms is not None and monotonic_ms > self._seen_ms:
            self.now_ms += min(monotonic_ms - self._seen_ms, MAX_STEP_MS)
            self._seen_ms = monotonic_ms
        return self.now_ms
