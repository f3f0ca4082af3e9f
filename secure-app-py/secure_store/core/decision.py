"""When a write is decided: on both disks while the mark is in step, else on the primary's."""

from __future__ import annotations

from secure_store.core.effects import Done, Effects
from secure_store.core.handover import answer_seal
from secure_store.core.pair import PairState, trim_recent


def decide(state: PairState, fx: Effects, now_ms: int) -> None:
    """Move `shown_seq`: on both disks while the mark is (or is becoming) in step, else on ours."""
    if not state.is_primary:
        return
    on_both = state.session.acked_shown_seq if state.session is not None else 0
    if not state.wants_replica or not (state.durable.in_step or state.wished.in_step):
        decided = state.durable_seq
    else:
        alone = state.barrier_seq if state.wished.in_step else 0
        decided = min(state.durable_seq, max(on_both, alone))
    if decided > state.shown_seq:
        state.shown_seq = decided
        fx.shown = decided
    while state.pending and state.pending[0].seq <= state.shown_seq:
        waiting = state.pending.popleft()
        degraded = state.wants_replica and waiting.seq > on_both
        fx.done.append(Done(waiting.request, waiting.seq, degraded))
    trim_recent(state, min(state.durable_seq, on_both if state.in_step else state.durable_seq))
    if state.sealed:
        answer_seal(state, fx, now_ms)
