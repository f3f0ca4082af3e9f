"""What a leader knows about one peer's log, and how much it may send (flow control).

    PROBE      where the logs agree is not known: one message, then wait for its answer
    REPLICATE  agreement known: send ahead (pipelining) within a window of messages and bytes
    SNAPSHOT   what the peer needs is compacted away: it is sent the snapshot, chunk by chunk

An answer of agreement leads to REPLICATE from anywhere; a refusal or a broken connection to PROBE;
a needed entry that is gone to SNAPSHOT.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

import msgspec

from lock_manager.core.raft.messages import Snapshot


class PeerState(StrEnum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class PeerProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as /status shows it."""

    node_id: int
    voter: bool
    state: PeerState
    match_index: int
    next_index: int
    inflight_messages: int
    silent_ms: int  # since it was last heard


class Progress:
    """Invariant: match_index < next_index. `match_index` never decreases within a leadership."""

    __slots__ = (
        "acked_round",
        "broken",
        "chunk_offset",
        "chunk_sent",
        "heard_ms",
        "inflight",
        "inflight_bytes",
        "match_index",
        "next_index",
        "probe_sent",
        "probed_at",
        "sent_commit",
        "sent_round",
        "snapshot",
        "state",
    )

    def __init__(self, next_index: int, now_ms: int) -> None:
        self.state = PeerState.PROBE
        self.match_index = 0
        self.next_index = next_index
        self.heard_ms = now_ms  # a new leader gives everybody a whole timeout
        self.broken = False  # its connection broke, and nothing was heard since
        self.probe_sent = False  # PROBE: a message with entries left and is not answered
        # The log's last index and the commit index when anything was last sent.
        self.probed_at = (0, 0)
        self.inflight: deque[tuple[int, int]] = deque()  # (last index of a message, its bytes)
        self.inflight_bytes = 0
        self.acked_round = 0
        self.sent_round = 0
        self.sent_commit = 0  # the commit index that the last message could convey
        self.snapshot: Snapshot | None = None
        self.chunk_offset = 0
        self.chunk_sent = False

    def heard(self, now_ms: int) -> None:
        self.heard_ms = now_ms
        self.broken = False

    def may_send(self, max_messages: int, max_bytes: int) -> bool:
        """Whether a message with entries may leave now."""
        match self.state:
            case PeerState.PROBE:
                return not self.probe_sent
            case PeerState.REPLICATE:
                return len(self.inflight) < max_messages and self.inflight_bytes < max_bytes
            case PeerState.SNAPSHOT:
                return False

    def sent(self, last_index: int, size: int) -> None:
        """A message with entries up to `last_index` left."""
        if self.state is PeerState.PROBE:
            self.probe_sent = True
            return
        self.next_index = last_index + 1
        self.inflight.append((last_index, size))
        self.inflight_bytes += size

    def matched(self, match_index: int) -> bool:
        """The peer agrees up to `match_index`; returns whether that is news."""
        news = match_index > self.match_index
        if news:
            self.match_index = match_index
        while self.inflight and self.inflight[0][0] <= match_index:
            self.inflight_bytes -= self.inflight.popleft()[1]
        if self.state is PeerState.SNAPSHOT and self.snapshot is not None:
            if match_index < self.snapshot.index:
                self.next_index = max(self.next_index, self.match_index + 1)
                return news
            self.snapshot = None
        if self.state is not PeerState.REPLICATE:
            self.state = PeerState.REPLICATE
            self.probe_sent = False
            self.next_index = self.match_index + 1
        else:
            self.next_index = max(self.next_index, self.match_index + 1)
        return news

    def is_stale_refusal(self, prev_index: int) -> bool:
        """Whether a refusal of `prev_index` says nothing about now: it was overtaken by an
        agreement, or answers a probe that is not the current one. Such a one must not move
        anything back."""
        match self.state:
            case PeerState.PROBE:
                return prev_index != self.next_index - 1
            case PeerState.REPLICATE:
                return prev_index <= self.match_index
            case PeerState.SNAPSHOT:
                return True

    def probe(self, next_index: int) -> None:
        """Look for the point of agreement from `next_index` down."""
        self.state = PeerState.PROBE
        self.next_index = max(next_index, self.match_index + 1)
        self.probe_sent = False
        self.snapshot = None
        self.inflight.clear()
        self.inflight_bytes = 0

    def start_snapshot(self, snapshot: Snapshot) -> None:
        """From now on send `snapshot`, from its first byte."""
        self.state = PeerState.SNAPSHOT
        self.probe_sent = False
        self.snapshot = snapshot
        self.chunk_offset = 0
        self.chunk_sent = False
        self.inflight.clear()
        self.inflight_bytes = 0
