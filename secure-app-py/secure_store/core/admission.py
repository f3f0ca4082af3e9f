"""The primary's door: a write is admitted, held for up to a second while a link is being made, or
turned away. What is admitted is planned and appended at once.
"""

from __future__ import annotations

from secure_store.core.effects import Effects, Rejected
from secure_store.core.messages import Mode
from secure_store.core.pair import (
    MAX_WAITING,
    WAIT_MS,
    PairState,
    Phase,
    reject_waiting,
    save,
)


def arrive(state: PairState, fx: Effects, requests: tuple[int, ...], now_ms: int) -> None:
    for request in requests:
        if len(state.held) + len(state.pending) + len(state.admitted) >= MAX_WAITING:
            fx.reject.append(Rejected(request, "Too many writes are waiting"))
        else:
            state.held.append((request, now_ms))
    drain_held(state, fx, now_ms)


def drain_held(state: PairState, fx: Effects, now_ms: int) -> None:
    """Admit, reject or go on holding the writes that wait at the door."""
    if not state.held:
        return
    if state.sealed or state.refused:
        reason = state.refused or "The primary is handing over"
        reject_waiting(state, fx, reason, not_primary=False)
        return
    if is_open(state, now_ms):
        while state.held:
            admit(state, fx)
        return
    if state.held[0][1] + WAIT_MS > now_ms:
        return
    alone_allowed = state.durable.mode is Mode.AVAILABLE and state.confirmed
    if not alone_allowed:
        reason = (
            "Replica is not reached"
            if state.confirmed
            else "Replica is not reached since this primary restarted"
        )
        while state.held and state.held[0][1] + WAIT_MS <= now_ms:
            fx.reject.append(Rejected(state.held.popleft()[0], reason))
    elif state.in_step:
        save(state, fx, in_step=False)  # a catch-up under way goes on; it is only not waited for
    elif not (state.durable.in_step or state.wished.in_step):
        while state.held and state.held[0][1] + WAIT_MS <= now_ms:
            admit(state, fx)


def is_open(state: PairState, now_ms: int) -> bool:
    """Whether a write may be begun now."""
    if not state.is_primary:
        return False
    if not state.wants_replica:
        return True
    if state.in_step:
        return state.session is not None and state.session.phase is Phase.LIVE
    if state.durable.in_step or state.wished.in_step:
        return False  # the mark is changing
    return state.durable.mode is Mode.AVAILABLE and now_ms >= state.making_until_ms


def admit(state: PairState, fx: Effects) -> None:
    request, arrived_ms = state.held.popleft()
    state.admitted[request] = arrived_ms
    fx.admit.append(request)
