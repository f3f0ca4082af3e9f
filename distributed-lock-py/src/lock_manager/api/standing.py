"""What GET /status says about Raft."""

from __future__ import annotations

from lock_manager.core.raft import Role
from lock_manager.core.raft.core import RaftCore


def standing(core: RaftCore) -> dict[str, object]:
    return {
        "state": "CANDIDATE" if core.role is Role.PRE_CANDIDATE else core.role.name,
        "term": core.term,
        "commit_index": core.commit_index,
        "last_index": core.last_index,
        "snapshot_index": core.snapshot_index,
    }


def progress_of(core: RaftCore, position: int) -> dict[str, object]:
    """What a leader knows of a peer; empty for others and for itself."""
    for peer in core.progress():
        if peer.node_id == position:
            return {
                "match_index": peer.match_index,
                "next_index": peer.next_index,
                "replication": peer.state.value,
                "silent_ms": peer.silent_ms,
            }
    return {}
