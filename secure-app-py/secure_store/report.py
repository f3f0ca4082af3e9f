"""What a node says of itself: readiness, the pair's state, gauges."""

from __future__ import annotations

import time

from secure_store.config import Config
from secure_store.core.messages import Role
from secure_store.core.pair import PairState, Phase


def not_ready_because(state: PairState, audit_failure: str | None) -> str | None:
    """Why a node cannot serve; None: it can."""
    if audit_failure is not None:
        return f"audit log: {audit_failure}"
    if state.wished.role is Role.PRIMARY:
        if state.refused:
            return state.refused
        if not state.is_primary:
            return "starting"
        making = time.monotonic_ns() // 1_000_000 < state.making_until_ms
        if state.degraded and making:
            return "a link to the replica is being made"
    return None


def replication(state: PairState, config: Config) -> dict[str, object]:
    """GET /replication."""
    session = state.session
    mine = state.wished
    contact = state.last_contact_ms
    body: dict[str, object] = {
        "role": mine.role.value,
        "cluster_id": mine.cluster_id,
        "epoch": mine.epoch,
        "mode": mine.mode.value,
        "in_step": mine.in_step if mine.role is Role.PRIMARY else mine.told_in_step,
        "degraded": state.degraded,
        "last_seq": state.last.seq,
        "durable_seq": state.durable_seq,
        "shown_seq": state.shown_seq,
        "link": session.phase.value if session is not None else "down",
        "last_contact_ms_ago": (
            None if contact is None else time.monotonic_ns() // 1_000_000 - contact
        ),
        "peer": {"id": mine.peer_id, "url": mine.peer_url or config.replica or ""},
        "refused": state.refused or None,
        "sealed": state.sealed or mine.sealed is not None,
    }
    if mine.role is Role.PRIMARY and session is not None:
        live = session.phase in (Phase.CATCHUP, Phase.LIVE)
        body["replica_lag"] = state.last.seq - session.acked_seq if live else None
    return body


def gauges(state: PairState) -> dict[str, int]:
    """The pair machine's part of the metrics."""
    return {
        "last_seq": state.last.seq,
        "shown_seq": state.shown_seq,
        "epoch": state.wished.epoch,
        "is_primary": int(state.is_primary),
        "degraded": int(state.degraded),
        "link_up": int(state.session is not None),
        "waiting_writes": len(state.held) + len(state.pending),
    }
