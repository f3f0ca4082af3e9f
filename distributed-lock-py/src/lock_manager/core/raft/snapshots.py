"""Snapshots as the leader sends them, chunk by chunk (§7).

Stop and wait: the leader sends one chunk, the follower answers how many bytes it has, and the
answer says where the next chunk begins. A lost chunk is sent again with the next heartbeat; a
follower that restarted answers 0 and gets it from the start. That the whole is durable is
acknowledged as any entries are.
"""

from __future__ import annotations

from lock_manager.core.raft import read_index
from lock_manager.core.raft.messages import InstallSnapshot, SnapshotReply
from lock_manager.core.raft.state import Leading, State
from lock_manager.core.raft.tracker import PeerState, Progress


def send_chunk(state: State, leading: Leading, peer: int, progress: Progress) -> None:
    """The chunk that the peer needs next, unless it is on its way."""
    snapshot = progress.snapshot
    if progress.chunk_sent or snapshot is None:
        return
    progress.chunk_sent = True
    start = progress.chunk_offset
    state.messages.append(
        InstallSnapshot(
            sender=state.me,
            to=peer,
            term=state.term,
            index=snapshot.index,
            index_term=snapshot.term,
            configuration=snapshot.configuration,
            offset=start,
            data=snapshot.data[start : start + state.config.snapshot_chunk_bytes],
            total_bytes=len(snapshot.data),
            read_round=leading.read_round,
            stamp_ms=state.stamp_ms,
        )
    )
    progress.sent_round = leading.read_round


def on_snapshot_reply(state: State, reply: SnapshotReply) -> None:
    leading = state.leading
    if leading is None or reply.term < state.term:
        return
    progress = leading.peers.get(reply.sender)
    if progress is None or reply.read_round > leading.read_round:
        return
    progress.heard(state.now_ms)
    read_index.on_round(state, leading, progress, reply.read_round)
    snapshot = progress.snapshot
    if progress.state is not PeerState.SNAPSHOT or snapshot is None:
        return
    if reply.index != snapshot.index or reply.next_offset > len(snapshot.data):
        return
    if reply.next_offset == progress.chunk_offset and progress.chunk_sent:
        return  # the answer to a doubled chunk; the one it waits for is on its way
    progress.chunk_offset = reply.next_offset
    # With all bytes there, the acknowledgement of the installed snapshot comes by itself.
    progress.chunk_sent = reply.next_offset == len(snapshot.data)
