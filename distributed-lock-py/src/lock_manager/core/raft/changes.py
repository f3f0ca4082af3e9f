"""Membership changes as the leader makes them (§6; thesis chapter 4; see membership.py)."""

from __future__ import annotations

from lock_manager.core.raft import membership, transfer
from lock_manager.core.raft.effects import Accepted, ConfigurationChanged, Refusal, Refused
from lock_manager.core.raft.messages import Configuration, Entry, EntryKind, Member
from lock_manager.core.raft.state import Leading, State
from lock_manager.core.raft.tracker import Progress

# How many election timeouts long a removed peer is told that its removal is committed.
FAREWELL_TIMEOUTS = 10


def _admit(state: State) -> Leading | Refused:
    """The leadership that may append a configuration now, or why there is none."""
    leading = state.leading
    if leading is None:
        return Refused(Refusal.NOT_LEADER)
    if leading.transfer_target is not None:
        return Refused(Refusal.TRANSFERRING)
    if not state.committed_in_term:
        return Refused(Refusal.NOT_READY)
    if state.members.index > state.commit_index:
        return Refused(Refusal.IN_PROGRESS)
    return leading


def _append(state: State, leading: Leading, configuration: Configuration) -> Accepted:
    """Appends a configuration, in force from now on."""
    index = state.log.last_index + 1
    payload = membership.encode_configuration(configuration)
    state.log.append([Entry(index, state.term, EntryKind.CONFIGURATION, payload)])
    state.members.append(index, configuration)
    state.notes.append(ConfigurationChanged(index, configuration))
    sync_peers(state, leading)
    return Accepted(state.term, index, index)


def promote_caught_up(state: State, leading: Leading) -> None:
    """Makes a voter of the first learner that is meant to be one and has all that is committed."""
    configuration = state.members.configuration
    for member in configuration.members:
        if member.promote and member.node_id in leading.peers:
            caught_up = leading.peers[member.node_id].match_index >= state.commit_index
            if caught_up and not isinstance(_admit(state), Refused):
                _append(state, leading, membership.with_promoted(configuration, member.node_id))
                return


def sync_peers(state: State, leading: Leading) -> None:
    """One Progress per other member. A removed one stays until it was told that it is; if it is
    added again it starts from nothing, for it may come with an empty disk."""
    members = {member.node_id for member in state.members.configuration.members} - {state.me}
    for peer in sorted(members):
        if peer not in leading.peers or peer in leading.leaving:
            leading.peers[peer] = Progress(state.log.last_index + 1, state.now_ms)
    give_up_ms = state.now_ms + FAREWELL_TIMEOUTS * state.config.election_timeout_ms
    leading.leaving = {
        peer: leading.leaving.get(peer, give_up_ms) for peer in leading.peers if peer not in members
    }
    if leading.transfer_target in leading.leaving:
        transfer.end(state, leading)


def see_off(state: State, leading: Leading) -> None:
    """Stops talking to removed peers that know it by now, or do not answer."""
    for peer, give_up_ms in list(leading.leaving.items()):
        progress = leading.peers[peer]
        told = min(progress.match_index, progress.sent_commit) >= state.members.index
        if told or state.now_ms >= give_up_ms:
            del leading.peers[peer], leading.leaving[peer]


def add(state: State, member: Member) -> Accepted | Refused:
    """Adds a learner; it is promoted once it has caught up if `member.voter` says so."""
    leading = _admit(state)
    if isinstance(leading, Refused):
        return leading
    configuration = state.members.configuration
    if configuration.get(member.node_id) is not None:
        return Refused(Refusal.ALREADY_MEMBER)
    return _append(state, leading, membership.with_learner(configuration, member))


def update(state: State, member: Member) -> Accepted | Refused:
    """Changes a member's name, store id and addresses; whether it votes stays."""
    leading = _admit(state)
    if isinstance(leading, Refused):
        return leading
    configuration = state.members.configuration
    if configuration.get(member.node_id) is None:
        return Refused(Refusal.UNKNOWN_MEMBER)
    return _append(state, leading, membership.with_updated(configuration, member))


def remove(state: State, node_id: int) -> Accepted | Refused:
    """Removes a voter or a learner, possibly the leader itself, but never the last voter."""
    leading = _admit(state)
    if isinstance(leading, Refused):
        return leading
    configuration = state.members.configuration
    if configuration.get(node_id) is None:
        return Refused(Refusal.UNKNOWN_MEMBER)
    if state.members.voters == {node_id}:
        return Refused(Refusal.LAST_VOTER)
    return _append(state, leading, membership.without(configuration, node_id))
