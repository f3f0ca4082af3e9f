"""Linearizable reads without a log entry (§8; thesis 6.4, ReadIndex).

A read may be served from the machine at commit index i if, after the read arrived, a majority
confirmed that this node still led: whatever was acknowledged to anybody before is then at or below
i. One round confirms every read that waited when it started.
"""

from __future__ import annotations

from lock_manager.core.raft import quorum
from lock_manager.core.raft.effects import ReadReady
from lock_manager.core.raft.state import Leading, ReadRound, State
from lock_manager.core.raft.tracker import Progress


def ask(state: State, read_id: int) -> None:
    """Queues a read for the next round; only a leader answers reads."""
    if state.leading is None:
        state.reads_refused.append(read_id)
    else:
        state.leading.reads_waiting.append(read_id)


def start_round(state: State, leading: Leading) -> None:
    """Puts all waiting reads into one round. Before an entry of the own term is committed the
    leader does not know what is committed, so they go on waiting (§8)."""
    if (
        not leading.reads_waiting
        or not state.committed_in_term
        or len(leading.rounds) >= state.config.max_read_rounds
    ):
        return
    leading.read_round += 1
    leading.rounds.append(ReadRound(leading.read_round, state.commit_index, leading.reads_waiting))
    leading.reads_waiting = []
    _confirm(state, leading)


def on_round(state: State, leading: Leading, progress: Progress, read_round: int) -> None:
    """A peer, in this leader's term, answered a message that carried `read_round`."""
    if read_round > progress.acked_round:
        progress.acked_round = read_round
        _confirm(state, leading)


def _confirm(state: State, leading: Leading) -> None:
    if not leading.rounds:
        return
    confirmed = quorum.agreed(
        leading.read_round if voter == state.me else leading.peers[voter].acked_round
        for voter in state.members.voters
    )
    while leading.rounds and leading.rounds[0].number <= confirmed:
        read_round = leading.rounds.popleft()
        state.reads_ready.extend(
            ReadReady(read_id, read_round.index) for read_id in read_round.read_ids
        )
