"""The primary feeds its replica the log, bounded by what is under way, and takes it into step once
it is near.
"""

from __future__ import annotations

from secure_store.core.admission import drain_held
from secure_store.core.decision import decide
from secure_store.core.effects import Effects, Fetch, SendSnapshot
from secure_store.core.messages import Ack, Durable, InStep, Records
from secure_store.core.pair import (
    BATCH_BYTES,
    BATCH_RECORDS,
    NEAR_RECORDS,
    WINDOW_BYTES,
    WINDOW_RECORDS,
    PairState,
    Phase,
    Session,
    end_session,
    save,
    send,
)
from secure_store.core.records import Position, Record


def reached(state: PairState, fx: Effects) -> None:
    """The replica follows us in this epoch: whatever a restart or a seal had stopped may go on."""
    state.refused = ""
    state.confirmed = True
    state.sealed = False


def start_catchup(state: PairState, fx: Effects, at: Position, now_ms: int) -> None:
    session = state.session
    if session is None:
        return
    reached(state, fx)
    session.phase = Phase.CATCHUP
    session.next_seq = at.seq + 1
    session.acked_seq = session.acked_shown_seq = at.seq
    session.progress_ms = now_ms
    # The replica learns at once how far our disk is, and answers with what it shows.
    send(state, fx, Durable(state.durable_seq), now_ms)
    come_closer(state, fx, now_ms)
    pump(state, fx, now_ms)


def start_snapshot(state: PairState, fx: Effects, *, set_aside: bool) -> None:
    """`set_aside`: the replica's history is, or may be, another one (of an older epoch)."""
    session = state.session
    if session is not None:
        reached(state, fx)
        session.phase = Phase.SNAPSHOT
        fx.snapshot.append(SendSnapshot(session.link, set_aside))


def on_snapshot_sent(state: PairState, fx: Effects, position: Position, now_ms: int) -> None:
    if state.session is not None and state.session.phase is Phase.SNAPSHOT:
        start_catchup(state, fx, position, now_ms)
        state.session.acked_seq = state.session.acked_shown_seq = 0


def pump(state: PairState, fx: Effects, now_ms: int) -> None:
    """Send what may be sent: up to the log's end if the durable mark says in step, else what is
    durable."""
    session = state.session
    if session is None or session.phase not in (Phase.CATCHUP, Phase.LIVE):
        return
    limit = state.last.seq if state.in_step else state.durable_seq
    while session.next_seq <= limit and has_room(session):
        batch = batch_from(state.recent, session.next_seq, limit)
        if not batch:
            if not session.fetching:
                session.fetching = True
                fx.fetch.append(Fetch(session.link, session.next_seq - 1, limit))
            return
        send_batch(state, fx, session, batch, now_ms)


def has_room(session: Session) -> bool:
    """Whether more may be under way: a replica that falls behind must not fill our memory."""
    count = session.next_seq - session.acked_seq
    return count <= WINDOW_RECORDS and session.unacked_bytes <= WINDOW_BYTES


def send_batch(
    state: PairState, fx: Effects, session: Session, batch: tuple[Record, ...], now_ms: int
) -> None:
    size = sum(len(r.payload) for r in batch)
    session.unacked.append((batch[-1].seq, size))
    session.unacked_bytes += size
    session.next_seq = batch[-1].seq + 1
    send(state, fx, Records(state.wished.epoch, batch, state.durable_seq), now_ms)


def batch_from(recent: dict[int, Record], first_seq: int, limit: int) -> tuple[Record, ...]:
    batch: list[Record] = []
    size = 0
    for seq in range(first_seq, min(limit, first_seq + BATCH_RECORDS - 1) + 1):
        record = recent.get(seq)
        if record is None or size > BATCH_BYTES:
            break
        batch.append(record)
        size += len(record.payload)
    return tuple(batch)


def on_fetched(
    state: PairState, fx: Effects, after_seq: int, records: tuple[Record, ...] | None, now_ms: int
) -> None:
    session = state.session
    if session is None or session.phase not in (Phase.CATCHUP, Phase.LIVE):
        return
    session.fetching = False
    if after_seq + 1 != session.next_seq:
        return
    if records is None:  # trimmed meanwhile
        start_snapshot(state, fx, set_aside=False)
        return
    if records:  # else the next tick asks again
        send_batch(state, fx, session, records, now_ms)
        pump(state, fx, now_ms)


def on_ack(state: PairState, fx: Effects, message: Ack, now_ms: int) -> None:
    session = state.session
    if session is None or session.phase not in (Phase.CATCHUP, Phase.LIVE):
        return
    if message.durable_seq >= session.next_seq or message.shown_seq > message.durable_seq:
        end_session(state, fx, "Ack of what was never sent")
        return
    if message.durable_seq > session.acked_seq or message.shown_seq > session.acked_shown_seq:
        session.progress_ms = now_ms
    session.acked_seq = max(session.acked_seq, message.durable_seq)
    while session.unacked and session.unacked[0][0] <= session.acked_seq:
        session.unacked_bytes -= session.unacked.popleft()[1]
    session.acked_shown_seq = max(session.acked_shown_seq, message.shown_seq)
    come_closer(state, fx, now_ms)
    decide(state, fx, now_ms)
    pump(state, fx, now_ms)


def come_closer(state: PairState, fx: Effects, now_ms: int) -> None:
    """Take the replica into step once it is near; the mark is durable before it counts."""
    session = state.session
    if session is None or session.phase not in (Phase.CATCHUP, Phase.LIVE):
        return
    near = state.last.seq - session.acked_seq <= NEAR_RECORDS
    if not state.wished.in_step and not state.durable.in_step and near:
        state.barrier_seq = state.last.seq
        save(state, fx, in_step=True)
    # What was acknowledged alone is on both disks, and shown on both, before anything is "in step".
    caught_up = near and session.acked_shown_seq >= state.barrier_seq
    if state.in_step and session.phase is Phase.CATCHUP and caught_up:
        session.phase = Phase.LIVE
        fx.notes.append(("in_step", f"replica {state.wished.peer_id} is in step"))
        send(state, fx, InStep(), now_ms)
        drain_held(state, fx, now_ms)
