"""The replica's part: following one primary's log, and taking over when that is safe."""

from __future__ import annotations

from msgspec.structs import replace

from secure_store.core.effects import Effects, InstallSnapshot, Promotion, StageRows
from secure_store.core.messages import (
    Ack,
    Hello,
    Mode,
    Promoted,
    Records,
    Refuse,
    Role,
    Sealed,
    SealNoted,
    SealRequest,
    SnapshotBegin,
    SnapshotRows,
    Tail,
    Welcome,
)
from secure_store.core.pair import (
    BATCH_BYTES,
    BATCH_RECORDS,
    SEAL_MS,
    WAIT_MS,
    PairState,
    Phase,
    Session,
    append_records,
    demote,
    end_session,
    next_number,
    persist,
    reject_waiting,
    save,
    send,
    send_after,
)
from secure_store.core.records import Record, follows

# --- joining
# ----------------------------------------------------------------------------------------


def on_hello(state: PairState, fx: Effects, link: int, hello: Hello, now_ms: int) -> None:
    """A node that calls itself primary has dialed us: follow it, or say why not."""
    mine = state.wished
    if mine.role is not state.durable.role:
        fx.close.append((link, "busy changing roles"))  # it dials again soon
        return
    if mine.cluster_id not in ("", hello.cluster_id) or not hello.cluster_id:
        turn_away(state, fx, link, "Replica belongs to another cluster")
    elif hello.epoch < mine.epoch:
        turn_away(state, fx, link, "Another primary has taken over")
    elif mine.role is Role.PRIMARY and hello.epoch == mine.epoch:
        turn_away(state, fx, link, "Both nodes are primary of one epoch")
    else:
        follow(state, fx, link, hello, now_ms)


def turn_away(state: PairState, fx: Effects, link: int, reason: str) -> None:
    fx.send.append((link, Refuse(reason, state.wished.epoch)))
    fx.close.append((link, reason))
    if state.turned_away != reason:  # it dials on, five times a second
        state.turned_away = reason
        fx.notes.append(("turned_away", reason))


def follow(state: PairState, fx: Effects, link: int, hello: Hello, now_ms: int) -> None:
    """Everything that Hello changes is durable before Welcome: that is the primary's licence."""
    end_session(state, fx, "a newer link has replaced this one")
    state.turned_away = ""
    if state.promoting is not None:
        answer_promotion(state, fx, False, "The primary is back; ask again", now_ms)
    if state.wished.role is Role.PRIMARY:
        demote(state, fx, hello.epoch)
    reject_waiting(state, fx, "Not the primary", not_primary=True)
    told = state.wished.told_in_step and hello.in_step and hello.epoch == state.wished.epoch
    changes = {
        "role": Role.REPLICA,
        "cluster_id": hello.cluster_id,
        "epoch": hello.epoch,
        "mode": hello.mode,
        "told_in_step": told,
        "sealed": None,
        "peer_url": hello.url,
        "peer_id": hello.node_id,
    }
    if any(getattr(state.wished, name) != value for name, value in changes.items()):
        save(state, fx, **changes)
    state.session = Session(link, False, now_ms, now_ms, now_ms)
    state.last_contact_ms = now_ms
    if state.in_flight:
        send_after(state, state.numbers, None)
    else:
        welcome(state, fx, now_ms)


def welcome(state: PairState, fx: Effects, now_ms: int) -> None:
    session = state.session
    if session is None:
        return
    session.phase = Phase.FOLLOWING
    mine = state.wished
    message = Welcome(state.node_id, mine.cluster_id, mine.epoch, state.last, state.url)
    send(state, fx, message, now_ms)


# --- following
# --------------------------------------------------------------------------------------


def on_records(state: PairState, fx: Effects, message: Records, now_ms: int) -> None:
    session = state.session
    if session is None or session.phase is not Phase.FOLLOWING:
        end_session(state, fx, "Records out of turn")
        return
    records = message.records
    right_epoch = message.epoch == state.wished.epoch and records[-1:] != ()
    right_epoch = right_epoch and records[-1].epoch <= message.epoch
    if not right_epoch or not follows(state.wished.cluster_id, state.last, records):
        end_session(state, fx, "Records do not follow this node's log")
        return
    append_records(state, fx, records)
    on_primary_durable(state, fx, message.durable_seq, now_ms)


def on_primary_durable(state: PairState, fx: Effects, seq: int, now_ms: int) -> None:
    """The primary's disk is at `seq`. (It speaks of it only once our log is a prefix of its
    own.)"""
    session = state.session
    if session is None or session.phase is not Phase.FOLLOWING:
        return
    if state.wished.shown_limit is not None:
        save(state, fx, shown_limit=None)
    session.primary_durable_seq = max(session.primary_durable_seq, seq)
    show(state, fx)
    acknowledge(state, fx, now_ms)


def show(state: PairState, fx: Effects) -> None:
    """Reads may see what both disks hold."""
    if state.session is None:
        return
    both = min(state.durable_seq, state.session.primary_durable_seq)
    if both > state.shown_seq:
        state.shown_seq = both
        fx.shown = both


def acknowledge(state: PairState, fx: Effects, now_ms: int) -> None:
    """Tell the primary, if there is anything new. What its own disk does not hold yet is not: it
    can decide nothing by that, and will say so in a moment."""
    session = state.session
    if session is None or session.phase is not Phase.FOLLOWING:
        return
    is_ahead = state.durable_seq > session.primary_durable_seq
    if is_ahead and state.shown_seq == session.acked_shown_seq:
        return
    if (state.durable_seq, state.shown_seq) != (session.acked_seq, session.acked_shown_seq):
        session.acked_seq, session.acked_shown_seq = state.durable_seq, state.shown_seq
        shown = min(state.shown_seq, state.durable_seq)
        send(state, fx, Ack(state.durable_seq, shown), now_ms)


def on_durable(state: PairState, fx: Effects, now_ms: int) -> None:
    show(state, fx)
    acknowledge(state, fx, now_ms)


def on_snapshot_begin(state: PairState, fx: Effects, message: SnapshotBegin) -> None:
    session = state.session
    if session is None or session.phase is not Phase.FOLLOWING:
        end_session(state, fx, "Snapshot out of turn")
        return
    session.phase = Phase.INSTALLING
    session.staging = message
    session.rows_staged = 0
    persist(state, fx, StageRows(next_number(state), (), first=True))


def on_snapshot_rows(state: PairState, fx: Effects, message: SnapshotRows) -> None:
    session = state.session
    if session is None or session.phase is not Phase.INSTALLING:
        end_session(state, fx, "Snapshot out of turn")
        return
    session.rows_staged += len(message.rows)
    persist(state, fx, StageRows(next_number(state), message.rows, first=False))


def on_snapshot_end(state: PairState, fx: Effects, row_count: int) -> None:
    session = state.session
    if session is None or session.staging is None or session.rows_staged != row_count:
        end_session(state, fx, "Snapshot is not whole")
        return
    begin = session.staging
    session.phase = Phase.FOLLOWING
    session.staging = None
    session.acked_seq = session.acked_shown_seq = -1  # whatever was said before is void
    session.primary_durable_seq = begin.position.seq
    state.wished = replace(state.wished, shown_limit=None)
    state.last = begin.position
    state.durable_seq = state.shown_seq = 0
    state.recent.clear()
    state.recent_from = begin.position.seq + 1
    persist(state, fx, InstallSnapshot(next_number(state), begin, state.wished))
    fx.notes.append(("snapshot", f"installing the state at {begin.position.seq}"))


def send_tail(
    state: PairState, fx: Effects, records: tuple[Record, ...] | None, now_ms: int
) -> None:
    """What the restarted primary lacks. (None: we no longer keep it, which ends this link.)"""
    if not records:
        end_session(state, fx, "The tail that was asked for is not kept")
        return
    size, count = 0, 0
    for record in records[:BATCH_RECORDS]:
        size += len(record.payload)
        if count and size > BATCH_BYTES:
            break
        count += 1
    send(state, fx, Tail(records[:count]), now_ms)


# --- taking over
# ------------------------------------------------------------------------------------


def promote(state: PairState, fx: Effects, request: int, force: bool, now_ms: int) -> None:
    """POST /admin/promote. Unforced only if the old primary cannot have acknowledged more than we
    hold."""
    refusal = None
    if state.promoting is not None or state.promoted_by is not None:
        refusal = "A promotion is already under way"
    elif state.wished.role is Role.PRIMARY:
        refusal = "This node is the primary"
    elif state.wished.role is Role.UNJOINED:
        refusal = "This node has never had a primary"
    if refusal is not None:
        fx.promotions.append(promotion(state, request, False, refusal, now_ms, forced=force))
        return
    state.promoting = (request, force, now_ms + SEAL_MS)
    if state.session is not None and state.session.phase is Phase.FOLLOWING:
        send(state, fx, SealRequest(), now_ms)
    else:
        promote_without_primary(state, fx, now_ms)


def promote_without_primary(state: PairState, fx: Effects, now_ms: int) -> None:
    """The old primary does not answer (or will not seal): decide by what is known of it."""
    if state.promoting is None:
        return
    _, force, _ = state.promoting
    mine = state.wished
    if (mine.sealed is not None and mine.sealed == state.last) or (
        mine.mode is Mode.STRICT and mine.told_in_step
    ):
        begin_promotion(state, fx, forced=False)
    elif force:
        begin_promotion(state, fx, forced=True)
    else:
        reason = "The old primary may have acknowledged writes that this node lacks"
        answer_promotion(state, fx, False, reason, now_ms)


def begin_promotion(state: PairState, fx: Effects, *, forced: bool) -> None:
    if state.promoting is None:
        return
    request, _, _ = state.promoting
    state.promoting = None
    state.promoted_by = (request, forced)
    epoch = state.wished.epoch + 1
    save(
        state,
        fx,
        role=Role.PRIMARY,
        epoch=epoch,
        in_step=False,
        told_in_step=False,
        sealed=None,
        shown_limit=None,
    )


def on_promoted_durable(state: PairState, fx: Effects, now_ms: int) -> None:
    """The new epoch is on disk: from here on this node is the primary."""
    if state.promoted_by is None:
        return
    request, forced = state.promoted_by
    state.promoted_by = None
    state.wants_replica = bool(state.wished.peer_url)
    state.mode_wanted = None
    state.confirmed = True
    state.making_until_ms = now_ms + WAIT_MS
    send(state, fx, Promoted(state.wished.epoch), now_ms)
    end_session(state, fx, "this node has been promoted")
    fx.notes.append(("promoted", f"epoch {state.wished.epoch}, forced={forced}"))
    fx.promotions.append(promotion(state, request, True, "Promoted", now_ms, forced=forced))


def answer_promotion(state: PairState, fx: Effects, ok: bool, reason: str, now_ms: int) -> None:
    if state.promoting is not None:
        request, force, _ = state.promoting
        state.promoting = None
        fx.promotions.append(promotion(state, request, ok, reason, now_ms, forced=force))


def promotion(
    state: PairState, request: int, ok: bool, reason: str, now_ms: int, *, forced: bool
) -> Promotion:
    ago_ms = None if state.last_contact_ms is None else now_ms - state.last_contact_ms
    return Promotion(request, ok, reason, state.wished.epoch, state.last.seq, ago_ms, forced and ok)


def on_sealed(state: PairState, fx: Effects, message: Sealed, now_ms: int) -> None:
    if state.session is None or state.session.phase is not Phase.FOLLOWING:
        return
    if message.last != state.last:
        end_session(state, fx, "Sealed at a position that is not this node's")
    elif state.promoting is not None:
        begin_promotion(state, fx, forced=False)
    elif message.leaving:
        number = save(state, fx, sealed=message.last)
        send_after(state, number, SealNoted())
