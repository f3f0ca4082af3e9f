"""What is known of each peer, and the heartbeats: one exchange per pair of nodes, whatever they
own.
"""

from __future__ import annotations

from message_queue.core.messages import HeartbeatAnswer

BEATS_KEPT = 64


class Peer:
    """Another node, as this one sees it."""

    __slots__ = (
        "alive_since_ms",
        "beat",
        "beats",
        "heard_ms",
        "hears_me",
        "incarnation",
        "outlived",
        "ring",
    )

    def __init__(self) -> None:
        self.incarnation = 0
        """Its present life; messages of an earlier one are void."""
        self.beat = 0
        """Its latest heartbeat."""
        self.heard_ms: int | None = None
        self.alive_since_ms = 0
        self.hears_me = False
        """Its last heartbeat named this life of this node: it was sent after this node's start."""
        self.ring = 0
        """The version of its ring, as its last heartbeat said."""
        self.outlived = False
        """It knows a later life of this node, and does not listen to this one."""
        self.beats: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {}
        """Own heartbeats on their way to it: when sent, and for which (partition, epoch)."""

    def alive(self, now_ms: int, within_ms: int) -> bool:
        return self.heard_ms is not None and now_ms - self.heard_ms <= within_ms

    def hear(self, now_ms: int, gap_ms: int) -> None:
        """Anything came from it."""
        if self.heard_ms is None or now_ms - self.heard_ms > gap_ms:
            self.alive_since_ms = now_ms
        self.heard_ms = now_ms

    def reborn(self, incarnation: int) -> None:
        """It restarted: what it said before says nothing about now."""
        self.incarnation = incarnation
        self.beat = 0
        self.hears_me = False
        self.ring = 0
        self.heard_ms = None

    def sent(self, beat: int, named: tuple[tuple[int, int], ...], now_ms: int) -> None:
        """A heartbeat that names these (partition, epoch) was sent."""
        self.beats[beat] = (now_ms, named)
        if len(self.beats) > BEATS_KEPT:
            del self.beats[next(iter(self.beats))]

    def answered(self, answer: HeartbeatAnswer) -> tuple[int, tuple[tuple[int, int], ...]] | None:
        """When the beat was sent that this answers, and what it renewed; None: unknown or stale."""
        return self.beats.pop(answer.beat, None)
