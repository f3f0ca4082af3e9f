"""The primary's part: admitting writes, deciding them, and bringing the replica to its own
state."""

from __future__ import annotations

from itertools import takewhile

from secure_store.core.effects import Done, Effects, Fetch, LookUp, Rejected, SendSnapshot
from secure_store.core.messages import (
    Ack,
    Durable,
    Hello,
    InStep,
    Mode,
    Records,
    Role,
    Sealed,
    SealRefused,
    TailRequest,
    Welcome,
)
from secure_store.core.pair import (
    BATCH_BYTES,
    BATCH_RECORDS,
    MAX_WAITING,
    NEAR_RECORDS,
    WAIT_MS,
    WINDOW_BYTES,
    WINDOW_RECORDS,
    PairState,
    Phase,
    Session,
    Waiting,
    append_records,
    demote,
    end_session,
    reject_waiting,
    save,
    send,
    trim_recent,
)
from secure_store.core.records import Position, Record, extend, follows

# --- founding and greeting
# --------------------------------------------------------------------------


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


# --- sending
# ----------------------------------------------------------------------------------------


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


# --- deciding
# ---------------------------------------------------------------------------------------


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


def arrive(state: PairState, fx: Effects, request: int, now_ms: int) -> None:
    if len(state.held) + len(state.pending) + len(state.admitted) >= MAX_WAITING:
        fx.reject.append(Rejected(request, "Too many writes are waiting"))
        return
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


# --- handing over
# -----------------------------------------------------------------------------------


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
