"""The primary greets its replica: compares histories, takes over what a restart has lost, and
settles how the replica is brought to its own state, or that this pair cannot work.
"""

from __future__ import annotations

from secure_store.core.effects import Effects, LookUp
from secure_store.core.feeding import start_catchup, start_snapshot
from secure_store.core.messages import Hello, Mode, TailRequest, Welcome
from secure_store.core.pair import (
    PairState,
    Phase,
    append_records,
    demote,
    end_session,
    reject_waiting,
    save,
    send,
)
from secure_store.core.records import Position, Record, follows


def wanted_mode(state: PairState) -> Mode:
    """The flag's, or without one what the pair runs already."""
    return state.mode_wanted or state.wished.mode


def greet(state: PairState, fx: Effects, now_ms: int) -> None:
    """Open a dialed link. The mark and mode that Hello tells are the durable ones."""
    hello = Hello(
        state.node_id,
        state.durable.cluster_id,
        state.durable.epoch,
        state.last,
        wanted_mode(state),
        state.wished.in_step,
        state.url,
    )
    send(state, fx, hello, now_ms)


def on_welcome(state: PairState, fx: Effects, message: Welcome, now_ms: int) -> None:
    session = state.session
    if session is None or session.phase is not Phase.GREETING:
        end_session(state, fx, "Welcome out of turn")
        return
    if message.epoch > state.wished.epoch:
        demote(state, fx, message.epoch)
        end_session(state, fx, "the peer is of a higher epoch")
        return
    if message.cluster_id not in ("", state.wished.cluster_id):
        refuse(state, fx, "Replica belongs to another cluster")
        return
    session.peer_last = message.last
    changes: dict[str, object] = {}
    if message.url and message.url != state.wished.peer_url:
        changes["peer_url"] = message.url
    if message.node_id != state.wished.peer_id:
        changes["peer_id"] = message.node_id
    if state.wished.mode is not wanted_mode(state):
        changes["mode"] = wanted_mode(state)  # the replica has just made the same durable
    if changes:
        save(state, fx, **changes)
    last = message.last
    if last.seq > state.last.seq:
        if last.epoch < state.wished.epoch:
            start_snapshot(state, fx, set_aside=True)
        elif state.in_step and not state.confirmed:
            session.phase = Phase.TAIL
            send(state, fx, TailRequest(state.last), now_ms)
        else:
            refuse(state, fx, "Primary holds less than its replica")
    elif last.seq == 0:
        start_catchup(state, fx, last, now_ms)
    elif last.seq in state.recent:
        compare(state, fx, state.recent[last.seq].position, now_ms)
    elif last.seq == state.last.seq:
        compare(state, fx, state.last, now_ms)
    else:
        session.phase = Phase.LOOKING
        fx.look_up.append(LookUp(session.link, last.seq))


def refuse(state: PairState, fx: Effects, reason: str) -> None:
    """This pair cannot work as it is; say so until somebody mends it."""
    if state.refused != reason:
        fx.notes.append(("refused", reason))
    state.refused = reason
    end_session(state, fx, reason)
    reject_waiting(state, fx, reason, not_primary=False)


def compare(state: PairState, fx: Effects, ours: Position | None, now_ms: int) -> None:
    """The replica's history ends at `peer_last`; `ours` is our record of that number."""
    session = state.session
    if session is None:
        return
    theirs = session.peer_last
    if ours == theirs:
        start_catchup(state, fx, theirs, now_ms)
    elif theirs.epoch < state.wished.epoch:
        start_snapshot(state, fx, set_aside=True)
    elif ours is None:
        start_snapshot(state, fx, set_aside=False)
    else:
        refuse(state, fx, "Histories of primary and replica differ")


def on_tail(state: PairState, fx: Effects, records: tuple[Record, ...], now_ms: int) -> None:
    """The replica's extra records: ours from before the restart, so they follow our log."""
    session = state.session
    if session is None or session.phase is not Phase.TAIL:
        end_session(state, fx, "Tail out of turn")
        return
    same_epoch = all(r.epoch == state.wished.epoch for r in records)
    if not records or not same_epoch or not follows(state.wished.cluster_id, state.last, records):
        refuse(state, fx, "Histories of primary and replica differ")
        return
    append_records(state, fx, records)
    fx.notes.append(("took_over", f"{len(records)} records that only the replica had"))
    if state.last.seq < session.peer_last.seq:
        send(state, fx, TailRequest(state.last), now_ms)
    else:
        start_catchup(state, fx, state.last, now_ms)
