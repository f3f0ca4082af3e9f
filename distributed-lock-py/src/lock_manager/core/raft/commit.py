"""The moment an entry becomes final, the same for leaders and followers."""

from __future__ import annotations

from lock_manager.core.raft import roles
from lock_manager.core.raft.effects import ConfigurationCommitted
from lock_manager.core.raft.messages import EntryKind
from lock_manager.core.raft.state import State


def commit_to(state: State, index: int) -> None:
    """Everything up to `index` (above the present commit index) is final."""
    before, state.commit_index = state.commit_index, index
    if state.leading is not None:
        state.leading.uncommitted_bytes -= sum(
            len(entry.payload)
            for entry in state.log.slice(before + 1, index)
            if entry.term == state.term and entry.kind is EntryKind.COMMAND
        )
    if before < state.members.index <= index:
        note_committed_configuration(state)


def note_committed_configuration(state: State) -> None:
    configuration = state.members.configuration
    included = configuration.get(state.me) is not None
    state.notes.append(ConfigurationCommitted(state.members.index, configuration, included))
    leader_id = state.leader_id
    if leader_id is not None and leader_id != state.me and configuration.get(leader_id) is None:
        roles.lose_sight_of_leader(state)  # it steps down when this is committed
