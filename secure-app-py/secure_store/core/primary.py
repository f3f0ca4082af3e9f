"""The primary's part: it founds the cluster, appends admitted writes, and gives up a replica that
does not answer.

Its other parts: admission.py (which writes may begin), greeting.py (a new link), feeding.py (the
log to the replica), decision.py (when a write is decided), handover.py (leaving in order).
"""

from __future__ import annotations

from itertools import takewhile

from secure_store.core.admission import drain_held
from secure_store.core.decision import decide
from secure_store.core.effects import Effects
from secure_store.core.feeding import come_closer, pump
from secure_store.core.messages import Durable, Mode, Role
from secure_store.core.pair import (
    WAIT_MS,
    PairState,
    Phase,
    Waiting,
    append_records,
    end_session,
    save,
    send,
)
from secure_store.core.records import Record, extend


def found(state: PairState, fx: Effects) -> None:
    """Make a new cluster with this node as its primary; the first record names its shared
    secrets."""
    save(
        state,
        fx,
        role=Role.PRIMARY,
        cluster_id=state.fresh_cluster_id,
        epoch=1,
        mode=state.mode_wanted or Mode.AVAILABLE,
    )
    record = extend(state.fresh_cluster_id, state.last, 1, state.genesis)
    append_records(state, fx, (record,))
    fx.notes.append(("founded", f"cluster {state.fresh_cluster_id}"))


def append(
    state: PairState, fx: Effects, entries: tuple[tuple[int, bytes], ...], now_ms: int
) -> None:
    """Begin admitted writes: `entries` answer one list of admitted requests, whole or in part (a
    plan that changes nothing is not appended)."""
    last = state.last
    records: list[Record] = []
    for request, payload in entries:
        record = extend(state.wished.cluster_id, last, state.wished.epoch, payload)
        last = record.position
        records.append(record)
        arrived_ms = state.admitted.pop(request, now_ms)
        state.pending.append(Waiting(request, record.seq, arrived_ms))
    state.admitted.clear()
    if records:
        append_records(state, fx, tuple(records))
        pump(state, fx, now_ms)


def on_durable(state: PairState, fx: Effects, now_ms: int) -> None:
    """Something reached our disk: tell the replica how far we are, decide, admit."""
    session = state.session
    if session is not None and session.phase in (Phase.CATCHUP, Phase.LIVE):
        send(state, fx, Durable(state.durable_seq), now_ms)
    come_closer(state, fx, now_ms)
    decide(state, fx, now_ms)
    pump(state, fx, now_ms)
    drain_held(state, fx, now_ms)


def tick(state: PairState, fx: Effects, now_ms: int) -> None:
    """Time passed: a replica that does not answer is given up, or (strict) the write is."""
    drain_held(state, fx, now_ms)
    pump(state, fx, now_ms)
    if not (state.pending and state.in_step):
        return
    session = state.session
    progress_ms = session.progress_ms if session is not None else 0
    if max(state.pending[0].arrived_ms, progress_ms) + WAIT_MS > now_ms:
        return
    if session is not None and session.phase in (Phase.CATCHUP, Phase.LIVE):
        end_session(state, fx, "the replica does not answer")
    if state.durable.mode is Mode.AVAILABLE and state.confirmed and not state.sealed:
        save(state, fx, in_step=False)  # acknowledgements follow once this is on the disk
        return
    overdue = list(takewhile(lambda w: w.arrived_ms + WAIT_MS <= now_ms, state.pending))
    for waiting in overdue:
        state.pending.popleft()
        fx.unknown.append((waiting.request, "Replica did not confirm in time"))
