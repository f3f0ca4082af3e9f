"""What GET /status says about Raft."""

from __future__ import annotations

from lock_manager.api.directory import Directory
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


def peers(core: RaftCore, directory: Directory, reached: frozenset[int]) -> list[dict[str, object]]:
    """One row for each member; on the leader also with what it knows of its progress."""
    progress = {peer.node_id: peer for peer in core.progress()}
    rows: list[dict[str, object]] = []
    for member in core.configuration.members:
        row: dict[str, object] = {
            "id": directory.name(member.node_id),
            "position": member.node_id,
            "voter": member.voter,
            "http_addr": directory.http_addr(member),
            "connected": member.node_id in reached,
        }
        if (peer := progress.get(member.node_id)) is not None:
            row |= {
                "match_index": peer.match_index,
                "next_index": peer.next_index,
                "replication": peer.state.value,
                "silent_ms": peer.silent_ms,
            }
        rows.append(row)
    return rows
