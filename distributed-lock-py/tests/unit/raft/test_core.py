"""The core seen by its integrator: what leaves when, and how much of it."""

from __future__ import annotations

import random

from lock_manager.core.raft import (
    Accepted,
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    InstallSnapshot,
    Member,
    RaftConfig,
    RaftCore,
    Refusal,
    Refused,
    RequestVote,
    Restored,
    Role,
    SteppedDown,
    VoteReply,
    WonElection,
)

from .one_core import MEMBERS, leader, make, settle

# -------------------------------------------------------------------------- what must precede what


def test_a_vote_leaves_only_after_it_is_durable() -> None:
    core = make(2)
    core.step(RequestVote(sender=1, to=2, term=3, last_index=0, last_term=0), 1)
    effects = core.drain()
    assert effects.messages == []
    assert effects.persist is not None
    assert effects.persist.hard_state == HardState(3, 1)
    core.persisted(effects.persist.seq, 2)
    assert core.drain().messages == [VoteReply(sender=2, to=1, term=3, granted=True)]


def test_a_vote_of_a_term_that_passed_meanwhile_never_leaves() -> None:
    core = make(2)
    core.step(RequestVote(sender=1, to=2, term=3, last_index=0, last_term=0), 1)
    first = core.drain()
    core.step(RequestVote(sender=3, to=2, term=4, last_index=0, last_term=0), 1)
    second = core.drain()
    assert first.persist is not None
    assert second.persist is not None
    core.persisted(first.persist.seq, 2)
    assert core.drain().messages == []
    core.persisted(second.persist.seq, 2)
    assert core.drain().messages == [VoteReply(sender=2, to=3, term=4, granted=True)]


def test_entries_are_acknowledged_once_for_all_that_became_durable() -> None:
    core = make(2)
    for index in (1, 2, 3):
        entry = Entry(index, 1, EntryKind.COMMAND, b"x")
        append = AppendEntries(
            sender=1,
            to=2,
            term=1,
            prev_index=index - 1,
            prev_term=min(index - 1, 1),
            entries=(entry,),
        )
        core.step(append, 1)
    effects = core.drain()
    assert effects.messages == []
    assert effects.persist is not None
    assert len(effects.persist.entries) == 3
    core.persisted(effects.persist.seq, 1)
    assert [m.match_index for m in core.drain().messages if isinstance(m, AppendReply)] == [3]


def test_a_heartbeat_is_answered_at_once_but_only_vouches_for_what_is_durable() -> None:
    core = make(2)
    entry = Entry(1, 1, EntryKind.COMMAND, b"x")
    core.step(AppendEntries(sender=1, to=2, term=1, prev_index=0, prev_term=0, entries=(entry,)), 1)
    effects = core.drain()
    core.step(AppendEntries(sender=1, to=2, term=1, prev_index=1, prev_term=1, read_round=5), 1)
    reply = core.drain().messages[0]
    assert isinstance(reply, AppendReply)
    assert (reply.success, reply.match_index, reply.read_round) == (True, 0, 5)
    assert effects.persist is not None
    core.persisted(effects.persist.seq, 1)
    late = core.drain().messages[0]
    assert isinstance(late, AppendReply)
    assert late.match_index == 1


def test_the_leader_replicates_beside_its_own_fsync_and_counts_itself_after_it() -> None:
    core = leader()
    assert core.propose([b"a", b"b"]) == Accepted(1, 2, 3)
    effects = core.drain()
    assert {m.to for m in effects.messages if isinstance(m, AppendEntries)} >= {2}
    assert effects.persist is not None
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=3), 1)
    assert core.drain().committed == []
    core.persisted(effects.persist.seq, 1)
    assert [entry.payload for entry in core.drain().committed] == [b"a", b"b"]


def test_two_others_commit_without_the_leaders_disk() -> None:
    core = leader()
    core.propose([b"a"])
    core.drain()
    for peer in (2, 3):
        core.step(AppendReply(sender=peer, to=1, term=1, success=True, match_index=2), 1)
    assert core.commit_index == 2


def test_one_drain_makes_one_write_and_one_message_a_peer_of_a_whole_batch() -> None:
    core = leader()
    core.step(AppendReply(sender=3, to=1, term=1, success=True, match_index=1), 0)
    settle(core)
    for _ in range(10):
        core.propose([b"x"] * 50)
    effects = core.drain()
    assert effects.persist is not None
    assert len(effects.persist.entries) == 500
    appends = [m for m in effects.messages if isinstance(m, AppendEntries)]
    assert sorted((m.to, len(m.entries)) for m in appends) == [(2, 500), (3, 500)]


def test_sending_ahead_stops_at_the_window() -> None:
    core = leader(max_inflight_messages=3, max_message_entries=2)
    core.propose([b"x"] * 20)
    sent = [m for m in core.drain().messages if m.to == 2]
    assert [len(m.entries) for m in sent if isinstance(m, AppendEntries)] == [2, 2, 2]
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=3), 1)
    sent = [m for m in core.drain().messages if m.to == 2]
    assert [len(m.entries) for m in sent if isinstance(m, AppendEntries)] == [2]


def test_a_dead_peer_costs_no_entries() -> None:
    core = leader()  # node 3 never answered its first probe
    for _ in range(20):
        core.propose([b"x" * 1000])
        to_dead = [m for m in core.drain().messages if m.to == 3]
        assert all(m.entries == () for m in to_dead if isinstance(m, AppendEntries))
        assert len(to_dead) <= 2


def test_committed_entries_come_in_bounded_batches() -> None:
    core = leader(max_apply_entries=10)
    core.propose([b"x"] * 25)
    core.drain()
    core.persisted(core.state.log.seq, 1)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=26), 1)
    sizes = []
    while core.has_effects:
        sizes.append(len(core.drain().committed))
    assert [size for size in sizes if size] == [10, 10, 5]


def test_a_removed_node_is_told_until_it_knows() -> None:
    core = leader()
    core.step(AppendReply(sender=3, to=1, term=1, success=True, match_index=1), 0)
    settle(core)
    assert isinstance(core.remove(3), Accepted)
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=2), 0)
    told = [m for one in settle(core) for m in one.messages if m.to == 3]
    assert [m.commit for m in told if isinstance(m, AppendEntries)] == [2]
    core.step(AppendReply(sender=3, to=1, term=1, success=True, match_index=2), 0)
    settle(core)
    core.propose([b"x"])
    assert not [m for one in settle(core) for m in one.messages if m.to == 3]
    assert {peer.node_id for peer in core.progress()} == {2}


def test_a_removed_node_that_is_dead_is_given_up() -> None:
    core = leader()
    core.remove(3)
    settle(core)
    for now in range(50, 4_000, 50):
        core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=2), now)
        core.tick(now)
        settle(core)
    assert core.role is Role.LEADER
    assert {peer.node_id for peer in core.progress()} == {2}


# ---------------------------------------------------------------------------------------- refusals


def test_proposals_are_refused_with_a_reason() -> None:
    assert make().propose([b"x"]) == Refused(Refusal.NOT_LEADER)
    core = leader(max_uncommitted_bytes=100)
    assert isinstance(core.propose([b"x" * 101]), Accepted)
    assert core.propose([b"x"]) == Refused(Refusal.OVERLOADED)
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=2), 1)
    assert isinstance(core.propose([b"x"]), Accepted)
    assert core.transfer(2, 1) is None
    assert core.propose([b"x"]) == Refused(Refusal.TRANSFERRING)


def test_a_paused_leader_does_not_blame_its_peers() -> None:
    core = leader()
    core.tick(10_000)  # stopped for ten seconds
    assert core.role is Role.LEADER
    core.tick(10_299)
    core.tick(10_598)
    assert core.role is Role.LEADER
    core.tick(10_610)
    assert core.role is not Role.LEADER  # now they really were silent for two timeouts
    assert any(isinstance(note, SteppedDown) for note in core.drain().notes)


def test_of_peers_whose_connections_broke_a_leader_expects_nothing() -> None:
    core = leader()
    core.peer_disconnected(2, 10)
    core.tick(250)
    core.tick(299)
    core.tick(310)
    assert core.role is Role.LEADER  # the third one may still be there
    core = leader()
    core.peer_disconnected(2, 10)
    core.peer_disconnected(3, 10)
    core.tick(250)
    assert core.role is Role.LEADER
    core.tick(310)
    assert core.role is not Role.LEADER


def test_a_transfer_finds_out_at_once_what_its_target_lacks() -> None:
    core = leader()
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=1), 1)
    core.propose([b"lost on the way"])
    settle(core)
    assert core.transfer(2, 2) is None
    (probe,) = [m for m in core.drain().messages if m.to == 2]
    assert isinstance(probe, AppendEntries)
    assert (probe.prev_index, probe.entries) == (2, ())


def test_an_idle_leader_wakes_only_for_heartbeats() -> None:
    core = leader()
    start = core.next_deadline_ms
    wakes = 0
    now = 0
    while now < start + 1_000:
        now = core.next_deadline_ms
        core.tick(now)
        core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=1), now)
        settle(core)
        wakes += 1
    assert wakes <= 25


def test_a_broken_connection_with_the_leader_brings_an_election_soon() -> None:
    core = make(2)
    core.step(AppendEntries(sender=1, to=2, term=1, prev_index=0, prev_term=0), 100)
    settle(core)
    assert core.next_deadline_ms >= 400
    core.peer_disconnected(3, 110)
    assert core.next_deadline_ms >= 400
    core.peer_disconnected(1, 110)
    assert core.next_deadline_ms <= 161


def test_a_single_node_leads_and_commits_alone() -> None:
    core = RaftCore(
        RaftConfig(node_id=1, bootstrap=Configuration((Member(node_id=1),))),
        Restored(),
        random.Random(1).randrange,
        0,
    )
    core.campaign(0)
    notes = [note for effects in settle(core) for note in effects.notes]
    assert any(isinstance(note, WonElection) for note in notes)
    core.propose([b"x"])
    assert [e.payload for one in settle(core) for e in one.committed] == [b"x"]
    core.read_index(9)
    assert [ready.read_id for one in settle(core) for ready in one.reads_ready] == [9]


def test_cluster_time_is_the_newest_leaders_also_if_an_older_one_let_more_pass() -> None:
    core = leader()
    core.advance_stamp(1_099)  # cut off meanwhile: nobody hears of it
    heartbeat = {"sender": 2, "to": 1, "prev_index": 1, "prev_term": 1}
    core.step(AppendEntries(term=2, stamp_ms=454, **heartbeat), 10)  # type: ignore[arg-type]
    assert core.stamp_ms == 454
    core.step(AppendEntries(term=2, stamp_ms=470, **heartbeat), 20)  # type: ignore[arg-type]
    core.step(AppendEntries(term=2, stamp_ms=460, **heartbeat), 30)  # type: ignore[arg-type]
    assert core.stamp_ms == 470  # of one leader, the latest
    chunk = InstallSnapshot(
        sender=3,
        to=1,
        term=3,
        index=5,
        index_term=2,
        configuration=MEMBERS,
        offset=0,
        data=b"s",
        total_bytes=9,
        stamp_ms=465,
    )
    core.step(chunk, 40)
    assert core.stamp_ms == 465


def test_an_append_of_an_earlier_term_confirms_no_round_of_a_leader_that_leads_again() -> None:
    """Found by a simulation seed: leader in term 3, then in term 5, and a late message between."""
    core = make(2)
    core.step(AppendEntries(sender=1, to=2, term=5, prev_index=0, prev_term=0, read_round=1), 1)
    settle(core)
    core.step(AppendEntries(sender=1, to=2, term=3, prev_index=0, prev_term=0, read_round=10), 2)
    reply = core.drain().messages[0]
    assert isinstance(reply, AppendReply)
    assert (reply.term, reply.success, reply.read_round) == (5, False, 0)


def test_a_new_leader_answers_reads_only_after_an_entry_of_its_own_term() -> None:
    core = make()
    core.campaign(0)
    settle(core)
    core.step(VoteReply(sender=2, to=1, term=1, granted=True, pre_vote=True), 0)
    settle(core)
    core.step(VoteReply(sender=2, to=1, term=1, granted=True), 0)
    core.read_index(7)
    settle(core)
    assert core.role is Role.LEADER
    # The peer confirms that it still leads, but lacks the no-op: others may have committed more.
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=0, read_round=1), 1)
    assert not [ready for one in settle(core) for ready in one.reads_ready]
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=1), 2)
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=1, read_round=1), 3)
    assert [(r.read_id, r.index) for one in settle(core) for r in one.reads_ready] == [(7, 1)]
