"""What must hold of a node after every step, and of the pair at every moment. For tests.

Asserted, not handled: a broken invariant is a bug, and a simulation stops at the first one.
"""

from __future__ import annotations

from collections.abc import Mapping

from secure_store.core.effects import AppendLog, InstallSnapshot
from secure_store.core.messages import Role
from secure_store.core.pair import PairState, Phase
from secure_store.core.records import Record, record_hash


def check_node(state: PairState) -> None:
    """One node's own state."""
    assert state.shown_seq <= state.durable_seq <= state.last.seq, "shown before it is durable"
    numbers = [op.number for op in state.in_flight]
    assert numbers == sorted(set(numbers)), "persist operations out of order"
    seqs = [w.seq for w in state.pending]
    assert seqs == sorted(set(seqs)), "waiting writes out of order"
    assert not seqs or seqs[0] > state.shown_seq, "a decided write still waits"
    assert not state.admitted, "an admitted write was neither appended nor dropped"
    session = state.session
    if session is not None and session.phase is Phase.LIVE:
        assert state.in_step, "live without a durable in-step mark"
    if session is not None and session.phase is Phase.FOLLOWING:
        assert state.durable.role is Role.REPLICA, "a node that is no replica follows"
    if state.durable.role is Role.PRIMARY:
        assert state.durable.cluster_id, "a primary of no cluster"
        assert state.durable.epoch >= 1, "a primary of no epoch"
    assert state.last.epoch <= state.wished.epoch, "a record of an epoch not heard of"
    assert in_flight_end(state) == state.last.seq, "the log's end is not on its way to the disk"


def check_early_sends(state: PairState) -> None:
    """The replica may be ahead of the primary's disk only under a durable in-step mark."""
    session = state.session
    if session is None or session.phase not in (Phase.CATCHUP, Phase.LIVE):
        return
    if session.next_seq - 1 > state.durable_seq:
        assert state.durable.in_step, "sent before it was durable, without the in-step mark"


def check_chain(cluster_id: str, records: list[Record]) -> None:
    """A stored log: no gap, each record bound to the one before."""
    for before, record in zip([None, *records], records, strict=False):
        digest = record_hash(cluster_id, record.epoch, record.seq, record.prev_hash, record.payload)
        assert digest == record.hash, "a record whose hash is not its own"
        if before is not None:
            assert record.seq == before.seq + 1, "a gap in the log"
            assert record.prev_hash == before.hash, "a record that follows another"
            assert record.epoch >= before.epoch, "an epoch that goes back"


def check_pair(states: Mapping[str, PairState]) -> None:
    """Both nodes at one moment (those that are up)."""
    primaries = [s for s in states.values() if s.durable.role is Role.PRIMARY]
    for a in primaries:
        for b in primaries:
            if a is not b and a.durable.cluster_id == b.durable.cluster_id:
                assert a.durable.epoch != b.durable.epoch, "two primaries of one epoch"


def in_flight_end(state: PairState) -> int:
    """Where the log will end once everything handed to the disk is on it."""
    end = state.durable_seq
    for op in state.in_flight:
        match op:
            case AppendLog(_, records):
                end = records[-1].seq
            case InstallSnapshot(_, begin, _):
                end = begin.position.seq
            case _:
                pass
    return end
