"""The follower's side of log replication: check, take, acknowledge (§5.3).

Entries are acknowledged once they are on disk. Everything else about an append (that its sender
leads, which read round it carries) needs no disk and is answered at once, with as much of the
match as is durable.
"""

from __future__ import annotations

import msgspec

from lock_manager.core.raft import roles
from lock_manager.core.raft.commit import commit_to
from lock_manager.core.raft.effects import ConfigurationChanged, Suspicious
from lock_manager.core.raft.membership import decode_configuration
from lock_manager.core.raft.messages import AppendEntries, AppendReply, Entry, EntryKind
from lock_manager.core.raft.state import State


def on_append(state: State, append: AppendEntries) -> None:
    if append.term < state.term:
        # The own term in the answer deposes a leader that lives in the past (etcd #8243). Rounds
        # are counted per leadership: should the sender lead again by now, this one of an earlier
        # term would count for one that it has yet to begin, and confirm a read after its end.
        refuse(state, append.sender, 0, 0)
        return
    if state.leading is not None:
        state.notes.append(Suspicious(append.sender, "claims to lead this node's own term"))
        return
    entries, prev_index, prev_term = append.entries, append.prev_index, append.prev_term
    if entries and not _is_well_formed(append):
        state.notes.append(Suspicious(append.sender, "sent entries that cannot be a log"))
        return
    roles.follow(state, append.sender)
    state.hear_time(append.stamp_ms)
    log, following = state.log, state.following
    new_round = append.read_round > following.round_echoed
    following.round_echoed = max(following.round_echoed, append.read_round)
    if prev_index < log.base_index:
        # What lies below the snapshot is committed and therefore equal (scylladb #9552).
        entries = entries[log.base_index - prev_index :]
        prev_index, prev_term = log.base_index, log.base_term
        if not entries:
            acknowledge(state, force=True)
            return
    if log.term_at(prev_index) != prev_term:
        refuse(state, append.sender, append.prev_index, append.read_round, prev_term)
        return
    last_new = prev_index + len(entries)
    fresh = list(entries) if prev_index == log.last_index else _first_difference(state, entries)
    if fresh and fresh[0].index <= state.commit_index:
        what = f"would overwrite the committed entry {fresh[0].index}"
        state.notes.append(Suspicious(append.sender, what))
        return
    if fresh:
        _take(state, fresh)
    following.matched_index = max(following.matched_index, last_new)
    if append.commit > state.commit_index:
        index = min(append.commit, last_new)
        if index > state.commit_index:
            commit_to(state, index)
    if last_new > log.durable_index:
        following.ack_due = True
        if fresh and not new_round:
            return  # answered when durable
    acknowledge(state, force=True)


def acknowledge(state: State, *, force: bool) -> None:
    """Tells the leader how far the log is both equal to its own and durable. Without `force` only
    if entries were waiting for the disk to say so."""
    following = state.following
    if state.leader_id is None or state.leading is not None:
        return
    if not force and not following.ack_due:
        return
    durable = min(state.log.durable_index, following.matched_index)
    if durable == following.matched_index:
        following.ack_due = False
    state.send(
        AppendReply(
            sender=state.me,
            to=state.leader_id,
            term=state.term,
            success=True,
            match_index=durable,
            read_round=following.round_echoed,
        )
    )


def refuse(state: State, to: int, prev_index: int, read_round: int, prev_term: int = 0) -> None:
    """No agreement at `prev_index`: say where there may be one, whole terms at a time."""
    hint_index = state.log.last_index_not_above(prev_index, prev_term)
    state.send(
        AppendReply(
            sender=state.me,
            to=to,
            term=state.term,
            success=False,
            prev_index=prev_index,
            hint_index=hint_index,
            hint_term=state.log.term_at(hint_index) or 0,
            read_round=read_round,
        )
    )


def _is_well_formed(append: AppendEntries) -> bool:
    """Whether the entries can be a piece of the sender's log: without gaps, terms never decreasing
    and not above the sender's, configurations readable."""
    index, term = append.prev_index, append.prev_term
    for entry in append.entries:
        index += 1
        if entry.index != index or not term <= entry.term <= append.term:
            return False
        term = entry.term
        if entry.kind is EntryKind.CONFIGURATION:
            try:
                decode_configuration(entry.payload)
            except msgspec.DecodeError:
                return False
    return True


def _first_difference(state: State, entries: tuple[Entry, ...]) -> list[Entry]:
    """The entries from the first on that the log does not have. An agreeing tail stays: a late,
    shorter append must not cut off what a newer one brought (§5.3, "if an existing entry
    conflicts")."""
    for position, entry in enumerate(entries):
        if state.log.term_at(entry.index) != entry.term:
            return list(entries[position:])
    return []


def _take(state: State, fresh: list[Entry]) -> None:
    """Appends new entries in the place of whatever tail conflicts with them."""
    log = state.log
    if fresh[0].index <= log.last_index:
        log.truncate_from(fresh[0].index)
        if state.members.truncate_from(fresh[0].index):
            _note_configuration(state)
    log.append(fresh)
    for entry in fresh:
        if entry.kind is EntryKind.CONFIGURATION:
            state.members.append(entry.index, decode_configuration(entry.payload))
            _note_configuration(state)


def _note_configuration(state: State) -> None:
    state.notes.append(ConfigurationChanged(state.members.index, state.members.configuration))
