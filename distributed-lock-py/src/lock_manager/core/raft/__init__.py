"""Raft as data and transitions: no clock, no chance, no disk, no network, no log call in here.

The integrator's contract
=========================

    core = RaftCore(config, restored, chance, now_ms)

`config: RaftConfig` holds limits and timeouts; `restored: Restored` what the store holds (hard
state, snapshot, entries after it); `chance(n)` returns an integer in [0, n), the only randomness;
`now_ms` is any monotonic clock in whole milliseconds, the same one in every later call.

Inputs. Each returns at once and never raises on anything a peer may say:

    step(message, now_ms)         a message addressed to this node arrived
    tick(now_ms)                  call when `next_deadline_ms` is reached (sooner does no harm)
    propose(payloads)             -> Accepted(term, first_index, last_index) | Refused(reason)
    read_index(read_id)           ask for a linearizable read: reads_ready or reads_refused
    persisted(seq, now_ms)        every Persist up to seq is synced to disk
    peer_disconnected(peer, now_ms)
                                  hint: a connection with the peer broke, in either direction
    campaign(now_ms)              the election timer fires now
    transfer(target, now_ms)      -> None (under way) | Refused(reason)
    add(member) / update(member) / remove(node_id)
                                  -> Accepted | Refused; one at a time. `add` makes a learner,
                                  which the leader promotes once it has caught up if
                                  `member.voter`; `update` changes name, store id, addresses
    advance_stamp(stamp_ms)       leader: cluster time that every append and heartbeat carries
    snapshot_taken(index, data, keep_entries=0)
                                  the machine's state as of applied `index`; the log up to there
                                  (except the last `keep_entries`, for slow followers) may go

Outputs:

    drain() -> Effects            effects.py: what to send, persist, apply, answer and log
    has_effects                   whether a drain would hand out anything

Read-only: `role`, `term`, `leader_id`, `voted_for`, `commit_index`, `handed_out` (last index given
in `committed`), `last_index`, `snapshot_index`, `configuration`, `configuration_index`, `stamp_ms`
(cluster time as the newest leader told it), `transferring`, `progress()` (on the leader one
`PeerProgress` per peer), `entry_term(index)`, `next_deadline_ms`.

The loop that obeys it:

    on any event: core.<input>(...); schedule one `flush` for this turn of the loop
    flush: while core.has_effects:
        effects = core.drain()
        transport.send(effects.messages)
        if effects.persist:                    # later: core.persisted(seq, now_ms), flush
            store.submit(effects.persist)
        if effects.restore: machine.restore(effects.restore)
        machine.apply(effects.committed); answer waiters
        answer effects.reads_ready and reads_refused; log effects.notes

Restart: `Restored` from the store and a fresh machine; the first drain hands out the snapshot as
`restore` if there is one, and committed entries come again from there as the leader tells how far
they are.
"""

from lock_manager.core.raft.core import RaftCore
from lock_manager.core.raft.effects import (
    Accepted,
    ConfigurationChanged,
    ConfigurationCommitted,
    Effects,
    ElectionStarted,
    Forgetful,
    LeaderChanged,
    Note,
    Persist,
    ReadReady,
    Refusal,
    Refused,
    Role,
    SteppedDown,
    Suspicious,
    TransferEnded,
    WonElection,
)
from lock_manager.core.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    InstallSnapshot,
    Member,
    Message,
    RequestVote,
    Snapshot,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from lock_manager.core.raft.settings import RaftConfig, Restored
from lock_manager.core.raft.tracker import PeerProgress, PeerState

__all__ = [
    "Accepted",
    "AppendEntries",
    "AppendReply",
    "Configuration",
    "ConfigurationChanged",
    "ConfigurationCommitted",
    "Effects",
    "ElectionStarted",
    "Entry",
    "EntryKind",
    "Forgetful",
    "HardState",
    "InstallSnapshot",
    "LeaderChanged",
    "Member",
    "Message",
    "Note",
    "PeerProgress",
    "PeerState",
    "Persist",
    "RaftConfig",
    "RaftCore",
    "ReadReady",
    "Refusal",
    "Refused",
    "RequestVote",
    "Restored",
    "Role",
    "Snapshot",
    "SnapshotReply",
    "SteppedDown",
    "Suspicious",
    "TimeoutNow",
    "TransferEnded",
    "VoteReply",
    "WonElection",
]
