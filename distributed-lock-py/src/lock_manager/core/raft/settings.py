"""What a Raft core is started with: its limits and what the disk remembered."""

from __future__ import annotations

import msgspec

from lock_manager.core.raft.messages import Configuration, Entry, HardState, Snapshot


class RaftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times are in the unit of the `now_ms` that the core is given (the scenarios count ticks)."""

    node_id: int
    # The members that the flags name. Counts only while the store holds no configuration of its
    # own; empty for a node that is to be added (`--join`): it never campaigns.
    bootstrap: Configuration
    election_timeout_ms: int = 300  # timeouts are drawn from [this, 2 * this)
    heartbeat_ms: int = 50
    pre_vote: bool = True
    check_quorum: bool = True
    # After a connection with the leader broke, elections are tried at once instead of after a whole
    # timeout (a killed process resets its connections): the voter of lowest id first, each further
    # one so much later, so that they do not split the vote. None: only forget that the leader was
    # heard lately.
    reset_campaign_ms: int | None = 40
    # Flow control, per peer: messages with entries that are not acknowledged yet, their bytes, and
    # one's size.
    max_inflight_messages: int = 64
    max_inflight_bytes: int = 8 << 20
    max_message_bytes: int = 256 << 10
    max_message_entries: int = 1024
    snapshot_chunk_bytes: int = 256 << 10
    # Proposals beyond this many payload bytes that are not committed yet are refused
    # (Refusal.OVERLOADED).
    max_uncommitted_bytes: int = 64 << 20
    max_apply_entries: int = 1024  # committed entries handed out by one drain
    max_snapshot_bytes: int = 2 << 30  # a longer one is not taken from a peer
    # Tell followers of a new commit at once, even when there is no entry to carry it. Off: with the
    # next entries or heartbeat, which halves the messages of a lightly loaded cluster; only a
    # follower's own view is later for it.
    eager_commit: bool = False
    # ReadIndex rounds under way at once; reads that come meanwhile share the next.
    max_read_rounds: int = 2

    def __post_init__(self) -> None:
        if self.node_id < 1:
            raise ValueError("node_id must be positive")
        if not 0 < self.heartbeat_ms < self.election_timeout_ms:
            raise ValueError("heartbeat_ms must be positive and below election_timeout_ms")


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What the store held at start-up; all defaults for an empty one."""

    hard_state: HardState = HardState()
    snapshot: Snapshot = Snapshot()
    # Contiguous, from snapshot.index + 1 or earlier (then the excess is cut).
    entries: tuple[Entry, ...] = ()
