"""The primary hands over: it takes no new write, decides the begun ones, and names its end."""

from __future__ import annotations

from secure_store.core.effects import Effects
from secure_store.core.messages import Sealed, SealRefused
from secure_store.core.pair import PairState, Phase, reject_waiting, send


def on_seal_request(state: PairState, fx: Effects, now_ms: int) -> None:
    if state.session is None or state.session.phase is not Phase.LIVE or not state.is_primary:
        send(state, fx, SealRefused("The replica is not in step"), now_ms)
        return
    begin_seal(state, fx, now_ms)


def begin_seal(state: PairState, fx: Effects, now_ms: int) -> None:
    """No new write; once the begun ones are decided the replica is told where we ended."""
    state.sealed = True
    reject_waiting(state, fx, "The primary is handing over", not_primary=False)
    answer_seal(state, fx, now_ms)


def answer_seal(state: PairState, fx: Effects, now_ms: int) -> None:
    session = state.session
    if session is None or session.phase is not Phase.LIVE or session.told_sealed:
        return
    if state.shown_seq == state.last.seq and session.acked_shown_seq == state.last.seq:
        session.told_sealed = True
        send(state, fx, Sealed(state.last, state.leaving is not None), now_ms)


def leave(state: PairState, fx: Effects, request: int, now_ms: int) -> None:
    """Stopping: seal if the replica is in step, else there is nothing to hand over."""
    session = state.session
    if state.is_primary and session is not None and session.phase is Phase.LIVE:
        state.leaving = request
        begin_seal(state, fx, now_ms)
    else:
        fx.left.append(request)


def on_seal_noted(state: PairState, fx: Effects) -> None:
    if state.leaving is not None and state.sealed:
        fx.left.append(state.leaving)
        state.leaving = None


def link_lost(state: PairState, fx: Effects) -> None:
    """Nobody is left to seal for."""
    if state.leaving is not None:
        fx.left.append(state.leaving)
        state.leaving = None
