"""Leadership transfer (§3.10 of the thesis)."""

from __future__ import annotations

from lock_manager.core.raft.effects import Refusal, Refused, TransferEnded
from lock_manager.core.raft.messages import TimeoutNow
from lock_manager.core.raft.state import Leading, State
from lock_manager.core.raft.tracker import Progress


def start(state: State, target: int) -> Refused | None:
    """Stops taking proposals, brings the target up to date and tells it to stand."""
    leading = state.leading
    if leading is None:
        return Refused(Refusal.NOT_LEADER)
    progress = leading.peers.get(target)
    if progress is None or target not in state.members.voters:
        return Refused(Refusal.UNKNOWN_MEMBER)
    leading.transfer_target = target
    leading.transfer_deadline = state.now_ms + state.config.election_timeout_ms
    hand_over(state, target, progress)
    return None


def hand_over(state: State, target: int, progress: Progress) -> None:
    """Tells the target to stand if it has the whole log."""
    if progress.match_index == state.log.last_index:
        state.send(TimeoutNow(sender=state.me, to=target, term=state.term))


def end(state: State, leading: Leading) -> None:
    """The target did not take over in time: go on leading."""
    if leading.transfer_target is not None:
        state.notes.append(TransferEnded(leading.transfer_target))
        leading.transfer_target = None
