"""`step(state, event) -> Effects`: the pair machine's one door. See pair.py for its theory."""

from __future__ import annotations

from typing import assert_never

from secure_store.core import admission, feeding, greeting, handover, primary, replica
from secure_store.core.effects import (
    Append,
    Arrive,
    Durable,
    Effects,
    Event,
    Fetch,
    Fetched,
    InstallSnapshot,
    Leave,
    LinkDown,
    LinkUp,
    LookedUp,
    Persisted,
    Promote,
    Received,
    Rejected,
    SnapshotSent,
    Tick,
)
from secure_store.core.messages import (
    Ack,
    Hello,
    InStep,
    Message,
    Mode,
    Ping,
    Promoted,
    Records,
    Refuse,
    Role,
    Sealed,
    SealNoted,
    SealRefused,
    SealRequest,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotRows,
    Tail,
    TailRequest,
    Welcome,
)
from secure_store.core.messages import Durable as DurableAt
from secure_store.core.pair import (
    BATCH_RECORDS,
    PING_MS,
    SILENCE_MS,
    WAIT_MS,
    PairState,
    Phase,
    Session,
    demote,
    end_session,
    save,
    send,
    settle,
)
from secure_store.core.records import Position


def start(
    *,
    node_id: str,
    url: str,
    durable: Durable,
    last: Position,
    shown_seq: int,
    has_replica_flag: bool,
    may_found: bool,
    mode_wanted: Mode | None,
    fresh_cluster_id: str,
    genesis: bytes,
    now_ms: int,
) -> tuple[PairState, Effects]:
    """A node's state from what its disk holds; the effects of starting.

    `shown_seq` is what the disk knows to be decided. A replica, and a primary that was alone, may
    show all they hold; a primary that was in step may not, until it has reached its replica again.
    """
    state = PairState(
        node_id=node_id,
        url=url,
        wants_replica=has_replica_flag or bool(durable.peer_url),
        may_found=may_found and not has_replica_flag,
        mode_wanted=mode_wanted,
        fresh_cluster_id=fresh_cluster_id,
        genesis=genesis,
        durable=durable,
        wished=durable,
        last=last,
        durable_seq=last.seq,
        shown_seq=shown_seq,
        started_ms=now_ms,
        recent_from=last.seq + 1,
    )
    fx = Effects()
    if durable.role is Role.UNJOINED and has_replica_flag:
        primary.found(state, fx)
    elif durable.role is Role.PRIMARY and durable.in_step:
        state.confirmed = False
        state.open_seq = last.seq
    elif durable.role is not Role.UNJOINED:
        limit = last.seq if durable.shown_limit is None else durable.shown_limit
        state.shown_seq = max(shown_seq, min(last.seq, limit))
    if durable.role is Role.PRIMARY and mode_wanted is Mode.STRICT:
        save(state, fx, mode=Mode.STRICT)  # before the replica hears of it
    if state.wished.role is Role.PRIMARY and state.wants_replica:
        state.making_until_ms = now_ms + WAIT_MS
    fx.shown = state.shown_seq
    return state, fx


def step(state: PairState, event: Event) -> Effects:
    """Apply one event."""
    fx = Effects()
    match event:
        case Arrive(requests, now_ms):
            _arrive(state, fx, requests, now_ms)
        case Append(entries, now_ms):
            primary.append(state, fx, entries, now_ms)
        case Persisted(number, now_ms):
            _persisted(state, fx, number, now_ms)
        case LinkUp(link, dialed, now_ms):
            _link_up(state, fx, link, dialed, now_ms)
        case LinkDown(link, now_ms):
            _link_down(state, fx, link, now_ms)
        case Received(link, message, now_ms):
            _received(state, fx, link, message, now_ms)
        case Tick(now_ms):
            _tick(state, fx, now_ms)
        case Fetched(link, after_seq, records, now_ms):
            if _is_current(state, link):
                if state.wished.role is Role.PRIMARY:
                    feeding.on_fetched(state, fx, after_seq, records, now_ms)
                else:
                    replica.send_tail(state, fx, records, now_ms)
        case LookedUp(link, _, position, now_ms):
            session = state.session
            if session and session.link == link and session.phase is Phase.LOOKING:
                greeting.compare(state, fx, position, now_ms)
        case SnapshotSent(link, position, now_ms):
            if _is_current(state, link):
                feeding.on_snapshot_sent(state, fx, position, now_ms)
        case Promote(request, force, now_ms):
            replica.promote(state, fx, request, force, now_ms)
        case Leave(request, now_ms):
            handover.leave(state, fx, request, now_ms)
        case _:
            assert_never(event)
    return fx


def _is_current(state: PairState, link: int) -> bool:
    return state.session is not None and state.session.link == link


def _arrive(state: PairState, fx: Effects, requests: tuple[int, ...], now_ms: int) -> None:
    if state.wished.role is Role.REPLICA or (
        state.wished.role is Role.UNJOINED and not state.may_found
    ):
        fx.reject += [Rejected(r, "Not the primary", not_primary=True) for r in requests]
        return
    admission.arrive(state, fx, requests, now_ms)


def _persisted(state: PairState, fx: Effects, number: int, now_ms: int) -> None:
    was_in_step = state.durable.in_step
    became = settle(state, number)
    if was_in_step and not state.durable.in_step and state.is_primary:
        fx.notes.append(("went_alone", f"after record {state.last.seq}: the replica is away"))
    for op in became:
        if isinstance(op, InstallSnapshot):
            state.shown_seq = op.begin.position.seq
            fx.shown = state.shown_seq
            fx.reset = True
    if state.is_primary:
        replica.on_promoted_durable(state, fx, now_ms)
        primary.on_durable(state, fx, now_ms)
    elif state.wished.role is Role.REPLICA:
        replica.on_durable(state, fx, now_ms)
    ready = [a for a in state.after_persist if a[0] <= number]
    state.after_persist = [a for a in state.after_persist if a[0] > number]
    for _, link, message in ready:
        if not _is_current(state, link):
            continue
        if message is not None:
            send(state, fx, message, now_ms)
        elif state.session is not None and state.session.dialed:
            greeting.greet(state, fx, now_ms)
        else:
            replica.welcome(state, fx, now_ms)


def _link_up(state: PairState, fx: Effects, link: int, dialed: bool, now_ms: int) -> None:
    if not dialed:
        return  # it is the dialer that speaks first: Hello decides what this link is worth
    if state.wished.role is not Role.PRIMARY:
        fx.close.append((link, "this node is not the primary"))
        return
    end_session(state, fx, "a newer link has replaced this one")
    state.session = Session(link, True, now_ms, now_ms, now_ms)
    state.making_until_ms = max(state.making_until_ms, now_ms + WAIT_MS)
    if state.in_flight:
        state.after_persist.append((state.numbers, link, None))
    else:
        greeting.greet(state, fx, now_ms)


def _link_down(state: PairState, fx: Effects, link: int, now_ms: int) -> None:
    if not _is_current(state, link):
        return
    end_session(state, fx, None)
    if state.wished.role is Role.PRIMARY:
        handover.link_lost(state, fx)
    elif state.promoting is not None:
        replica.promote_without_primary(state, fx, now_ms)


def _tick(state: PairState, fx: Effects, now_ms: int) -> None:
    session = state.session
    if session is not None:
        if now_ms - session.heard_ms >= SILENCE_MS:
            end_session(state, fx, "nothing was heard on this link")
            if state.wished.role is Role.PRIMARY:
                handover.link_lost(state, fx)
        elif now_ms - session.sent_ms >= PING_MS and session.phase is not Phase.GREETING:
            send(state, fx, Ping(), now_ms)
    if state.promoting is not None and (now_ms >= state.promoting[2] or state.session is None):
        replica.promote_without_primary(state, fx, now_ms)
    if state.wished.role is Role.UNJOINED:
        if state.held and now_ms >= state.held[0][1] + WAIT_MS:
            primary.found(state, fx)
    elif state.wished.role is Role.PRIMARY:
        primary.tick(state, fx, now_ms)


def _received(state: PairState, fx: Effects, link: int, message: Message, now_ms: int) -> None:
    if isinstance(message, Hello):
        replica.on_hello(state, fx, link, message, now_ms)
        return
    session = state.session
    if session is None or session.link != link:
        fx.close.append((link, "this link is not in use"))
        return
    session.heard_ms = now_ms
    state.last_contact_ms = now_ms
    if state.wished.role is Role.PRIMARY and session.dialed:
        _primary_received(state, fx, message, now_ms)
    elif state.wished.role is Role.REPLICA and not session.dialed:
        _replica_received(state, fx, link, message, now_ms)


def _primary_received(state: PairState, fx: Effects, message: Message, now_ms: int) -> None:
    match message:
        case Welcome():
            greeting.on_welcome(state, fx, message, now_ms)
        case Refuse(reason, epoch):
            if epoch > state.wished.epoch:
                demote(state, fx, epoch)
                end_session(state, fx, "replaced")
            else:
                greeting.refuse(state, fx, reason)
        case Ack():
            feeding.on_ack(state, fx, message, now_ms)
        case Tail(records):
            greeting.on_tail(state, fx, records, now_ms)
        case SealRequest():
            handover.on_seal_request(state, fx, now_ms)
        case SealNoted():
            handover.on_seal_noted(state, fx)
        case Promoted(epoch):
            if epoch > state.wished.epoch:
                demote(state, fx, epoch)
            end_session(state, fx, "replaced")
        case Ping():
            pass
        case _:
            end_session(state, fx, "not for a primary")


def _replica_received(
    state: PairState, fx: Effects, link: int, message: Message, now_ms: int
) -> None:
    match message:
        case Records():
            replica.on_records(state, fx, message, now_ms)
        case DurableAt(seq):
            replica.on_primary_durable(state, fx, seq, now_ms)
        case InStep():
            save(state, fx, told_in_step=True)
        case TailRequest(after):
            fx.fetch.append(Fetch(link, after.seq, after.seq + BATCH_RECORDS))
        case SnapshotBegin():
            replica.on_snapshot_begin(state, fx, message)
        case SnapshotRows():
            replica.on_snapshot_rows(state, fx, message)
        case SnapshotEnd(row_count):
            replica.on_snapshot_end(state, fx, row_count)
        case Sealed():
            replica.on_sealed(state, fx, message, now_ms)
        case SealRefused():
            replica.promote_without_primary(state, fx, now_ms)
        case Ping():
            pass
        case _:
            end_session(state, fx, "not for a replica")
