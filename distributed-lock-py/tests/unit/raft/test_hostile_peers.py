"""Whatever a peer says, the core neither raises nor breaks a promise of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lock_manager.core.invariants import DiskImage, RaftChecker
from lock_manager.core.raft import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    Forgetful,
    HardState,
    InstallSnapshot,
    Member,
    Message,
    RequestVote,
    Restored,
    Snapshot,
    SnapshotReply,
    Suspicious,
    TimeoutNow,
    VoteReply,
)
from lock_manager.core.raft.membership import encode_configuration

from .one_core import MEMBERS, leader, make, settle


def test_a_leaders_committed_entries_are_never_overwritten() -> None:
    core = make(2)
    good = AppendEntries(
        sender=1,
        to=2,
        term=1,
        prev_index=0,
        prev_term=0,
        entries=(Entry(1, 1, EntryKind.COMMAND, b"x"),),
        commit=1,
    )
    core.step(good, 1)
    settle(core)
    bad = AppendEntries(
        sender=3,
        to=2,
        term=2,
        prev_index=0,
        prev_term=0,
        entries=(Entry(1, 2, EntryKind.COMMAND, b"y"),),
    )
    core.step(bad, 2)
    notes = [note for effects in settle(core) for note in effects.notes]
    assert any(isinstance(note, Suspicious) for note in notes)
    assert core.entry_term(1) == 1


@pytest.mark.parametrize(
    "entries",
    [
        (Entry(2, 1, EntryKind.COMMAND, b""),),  # a gap
        (Entry(1, 9, EntryKind.COMMAND, b""),),  # of a term above the sender's
        (Entry(1, 2, EntryKind.COMMAND, b""), Entry(2, 1, EntryKind.COMMAND, b"")),  # decreasing
        (Entry(1, 2, EntryKind.CONFIGURATION, b"\xc1"),),  # not readable
    ],
)
def test_entries_that_cannot_be_a_log_are_left_alone(entries: tuple[Entry, ...]) -> None:
    core = make(2)
    core.step(AppendEntries(sender=1, to=2, term=2, prev_index=0, prev_term=0, entries=entries), 1)
    notes = [note for effects in settle(core) for note in effects.notes]
    assert any(isinstance(note, Suspicious) for note in notes)
    assert core.last_index == 0


small = st.integers(0, 6)
terms = st.integers(0, 4)
peers = st.sampled_from([1, 2, 3, 4])
entry_lists = st.lists(
    st.builds(
        Entry,
        index=small,
        term=terms,
        kind=st.sampled_from(list(EntryKind)),
        payload=st.sampled_from([b"", b"x", encode_configuration(MEMBERS)]),
    ),
    max_size=4,
).map(tuple)
messages = st.one_of(
    st.builds(
        RequestVote,
        sender=peers,
        to=peers,
        term=terms,
        last_index=small,
        last_term=terms,
        pre_vote=st.booleans(),
        transfer=st.booleans(),
    ),
    st.builds(
        VoteReply,
        sender=peers,
        to=peers,
        term=terms,
        granted=st.booleans(),
        pre_vote=st.booleans(),
    ),
    st.builds(
        AppendEntries,
        sender=peers,
        to=peers,
        term=terms,
        prev_index=small,
        prev_term=terms,
        entries=entry_lists,
        commit=small,
        read_round=small,
        stamp_ms=small,
    ),
    st.builds(
        AppendReply,
        sender=peers,
        to=peers,
        term=terms,
        success=st.booleans(),
        match_index=small,
        prev_index=small,
        hint_index=small,
        hint_term=terms,
        read_round=small,
    ),
    st.builds(
        InstallSnapshot,
        sender=peers,
        to=peers,
        term=terms,
        index=small,
        index_term=terms,
        configuration=st.just(MEMBERS),
        offset=small,
        data=st.binary(max_size=3),
        total_bytes=small,
    ),
    st.builds(SnapshotReply, sender=peers, to=peers, term=terms, index=small, next_offset=small),
    st.builds(TimeoutNow, sender=peers, to=peers, term=terms),
)
own_calls = st.sampled_from(["campaign", "tick", "propose", "read", "transfer", "add", "remove"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(messages, own_calls), max_size=40), st.booleans())
def test_no_sequence_of_messages_makes_the_core_raise_or_break_its_own_state(
    sequence: list[Message | str], as_leader: bool
) -> None:
    core = leader() if as_leader else make(1)
    checker = RaftChecker(contents=False)
    disk = DiskImage(
        Restored(
            hard_state=HardState(core.term, core.voted_for),
            snapshot=Snapshot(),
            entries=tuple(core.state.log.entries),
        )
    )
    checker.started(1, disk)
    # Liars may claim to lead or to hold anything: only promises about this node can be checked.
    checker._check_commit = lambda *_: None  # type: ignore[method-assign]
    checker._check_matching = lambda *_: None  # type: ignore[method-assign]
    now = 0
    for item in sequence:
        now += 60
        match item:
            case "campaign":
                core.campaign(now)
            case "tick":
                core.tick(now)
            case "propose":
                core.propose([b"p"])
            case "read":
                core.read_index(now)
            case "transfer":
                core.transfer(2, now)
            case "add":
                core.add(Member(node_id=4))
            case "remove":
                core.remove(3)
            case str():
                raise AssertionError(item)
            case message:
                core.step(message, now)
        while core.has_effects:
            effects = core.drain()
            checker.drained(1, core, effects)
            if effects.persist is not None:
                checker.stored(1, effects.persist)
                core.persisted(effects.persist.seq, now)


def test_a_peer_that_lost_what_it_acknowledged_is_told_of_and_not_asked_in_a_circle() -> None:
    core = leader()
    settle(core)
    core.propose([b"kept on its disk, it says"])
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=2), 1)
    core.peer_disconnected(2, 2)  # it restarts, and its store has lost its tail
    core.propose([b"more"])
    settle(core)
    asked = 0
    for now in range(60, 700, 60):
        core.tick(now)
        for _ in range(3):
            effects = core.drain()
            asked += sum(1 for m in effects.messages if m.to == 2)
            for message in effects.messages:
                if message.to == 2:
                    assert isinstance(message, AppendEntries)
                    refusal = AppendReply(
                        sender=2, to=1, term=1, success=False, prev_index=message.prev_index
                    )
                    core.step(refusal, now)
                    told = core.drain()
                    assert Forgetful(2, 2, 0) in told.notes
                    assert not [m for m in told.messages if m.to == 2]
                if message.to == 3:
                    reply = AppendReply(sender=3, to=1, term=1, success=True, match_index=2)
                    core.step(reply, now)
    assert 5 <= asked <= 20
