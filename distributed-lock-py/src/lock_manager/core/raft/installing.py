"""Snapshots as a follower receives and installs them (§7)."""

from __future__ import annotations

from lock_manager.core.raft import following, roles
from lock_manager.core.raft.commit import note_committed_configuration
from lock_manager.core.raft.effects import ConfigurationChanged, Suspicious
from lock_manager.core.raft.messages import InstallSnapshot, Snapshot, SnapshotReply
from lock_manager.core.raft.state import Incoming, State


def on_install_snapshot(state: State, chunk: InstallSnapshot) -> None:
    """Takes a chunk if it is the next one, and installs the snapshot when it is complete."""
    max_bytes = state.config.max_snapshot_bytes
    if chunk.term < state.term:
        following.refuse(state, chunk.sender, 0, 0)
        return
    if state.leading is not None:
        state.notes.append(Suspicious(chunk.sender, "claims to lead this node's own term"))
        return
    if not 1 <= chunk.index_term <= chunk.term or chunk.total_bytes > max_bytes:
        state.notes.append(Suspicious(chunk.sender, "offers a snapshot that cannot be one"))
        return
    roles.follow(state, chunk.sender)
    state.hear_time(chunk.stamp_ms)
    state.following.round_echoed = max(state.following.round_echoed, chunk.read_round)
    if chunk.index <= state.commit_index:
        following.acknowledge(state, force=True)
        return
    incoming = _take(state, chunk)
    if incoming.received < chunk.total_bytes:
        state.send(
            SnapshotReply(
                sender=state.me,
                to=chunk.sender,
                term=state.term,
                index=chunk.index,
                next_offset=incoming.received,
                read_round=chunk.read_round,
            )
        )
        return
    state.following.incoming = None
    _install(
        state,
        Snapshot(chunk.index, chunk.index_term, chunk.configuration, b"".join(incoming.chunks)),
    )


def _take(state: State, chunk: InstallSnapshot) -> Incoming:
    """Adds the chunk to what arrived of the same snapshot; what does not fit is left out."""
    incoming = state.following.incoming
    if incoming is None or (
        (incoming.first.index, incoming.first.index_term, incoming.first.total_bytes)
        != (chunk.index, chunk.index_term, chunk.total_bytes)
    ):
        incoming = state.following.incoming = Incoming(chunk)
    if chunk.offset == incoming.received and chunk.offset + len(chunk.data) <= chunk.total_bytes:
        incoming.chunks.append(chunk.data)
        incoming.received += len(chunk.data)
    return incoming


def _install(state: State, snapshot: Snapshot) -> None:
    """The machine restarts from the snapshot; a log that runs beyond it stays only where it agrees
    with it (a conflicting tail would otherwise shadow the leader's entries, hashicorp/raft
    #697)."""
    log = state.log
    agrees = log.term_at(snapshot.index) == snapshot.term
    before = state.members.configuration
    log.install(snapshot)
    state.members.install(snapshot, keep_later=agrees)
    state.commit_index = snapshot.index
    state.handed_out = snapshot.index
    state.restore = snapshot
    state.following.matched_index = max(state.following.matched_index, snapshot.index)
    state.following.ack_due = True
    if state.members.configuration != before:
        state.notes.append(ConfigurationChanged(state.members.index, state.members.configuration))
    if state.members.index == snapshot.index:
        note_committed_configuration(state)
