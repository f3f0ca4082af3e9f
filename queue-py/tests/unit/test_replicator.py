"""The replication core step by step: the rules that a random run meets too rarely."""

from __future__ import annotations

from collections.abc import Iterable

from message_queue.core.messages import (
    MAX_NODES,
    Ack,
    Append,
    AppendRecord,
    Attest,
    Canvass,
    CanvassAnswer,
    Claim,
    Copies,
    Copy,
    Heartbeat,
    HeartbeatAnswer,
    Inquire,
    LogRecord,
    PeerMessage,
    Promise,
    PromiseRecord,
    Pull,
    Put,
    Puts,
    Refusal,
    Seal,
    SealRecord,
    Standing,
    Stored,
    View,
    WithdrawRecord,
)
from message_queue.core.replication.config import NEVER_MS
from message_queue.core.replication.contract import (
    Accepted,
    AckDraft,
    NotOwner,
    PutDraft,
    ReplicationConfig,
    RunDraft,
)
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.effects import Effects
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import bodies_of, put_entry

P = 0
EPOCH_A, EPOCH_B, EPOCH_C = MAX_NODES, MAX_NODES + 1, MAX_NODES + 2
ORIGIN = 77


def view(
    sealed: int = EPOCH_A,
    context: tuple[tuple[int, int, int], ...] = (),
    held: tuple[tuple[int, int, int], ...] = (),
) -> View:
    return View(sealed, ORIGIN, context, DotSet(held).chunks(), ())


def member(*records: LogRecord) -> PartitionState:
    """A replica that sealed epoch A, and then logged these."""
    state = PartitionState(P)
    state.apply(PromiseRecord(P, EPOCH_A, 1))
    state.apply(SealRecord(P, EPOCH_A, 1, view()))
    for record in records:
        state.apply(record)
    return state


class Bench:
    """One node under test; the others are played by the test."""

    def __init__(
        self,
        state: PartitionState | None = None,
        *,
        node: int = 1,
        now_ms: int = 1_000,
        fresh: bool = False,
        genesis_ms: int = NEVER_MS,
    ) -> None:
        self.now_ms = now_ms
        self.core = Replicator(
            ReplicationConfig(
                node=node,
                nodes=3,
                incarnation=10,
                preference=((0, 1, 2),),
                seed=1,
                fresh=fresh,
                genesis_ms=genesis_ms,
            ),
            {} if state is None else {P: state},
            0,
            now_ms,
        )
        self.last = Effects()

    def hear(self, sender: int, *messages: PeerMessage, incarnation: int = 5) -> Effects:
        return self.did(self.core.receive_all(sender, incarnation, messages, self.now_ms))

    def did(self, fx: Effects) -> Effects:
        self.last = fx
        return fx

    def synced(self) -> Effects:
        return self.did(self.core.durable(self.core._desk.batch, self.now_ms))

    def later(self, ms: int) -> Effects:
        self.now_ms += ms
        return self.did(self.core.tick(self.now_ms))

    def sent(self, kind: type[PeerMessage], to: int | None = None) -> list[PeerMessage]:
        return [m for t, m in self.last.send if isinstance(m, kind) and to in (None, t)]

    def stand(self) -> int:
        """Time passes until this node stands for election; how much."""
        began = self.now_ms
        while not any(isinstance(m, Canvass) for _, m in self.later(25).send):
            assert self.now_ms - began < 5_000
        return self.now_ms - began

    def sealed_alone(self) -> int:
        """Node 1 has a majority's promises, and its own disk has its seal; no other has. The epoch,
        which is B."""
        self.stand()
        for peer in (0, 2):
            self.hear(peer, CanvassAnswer(P, EPOCH_A, True, EPOCH_A, Standing.MEMBER))
        self.synced()
        epoch = 2 * MAX_NODES + 1
        self.hear(0, Promise(P, epoch, Standing.MEMBER, view()))
        self.synced()
        return epoch

    def elected(self) -> None:
        """Node 1 becomes the owner of epoch B, all others consenting."""
        epoch = self.sealed_alone()
        self.hear(0, Stored(P, epoch, 0, False))
        assert [g.epoch for g in self.last.gained] == [epoch]
        self.epoch = epoch


def records(fx: Effects) -> Iterable[str]:
    return [type(record).__name__ for record in fx.persist]


def test_a_promise_is_durable_before_it_is_answered() -> None:
    bench = Bench(member())
    bench.later(700)
    fx = bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    assert records(fx) == ["PromiseRecord"]
    assert not bench.sent(Promise)
    bench.synced()
    assert [m.epoch for m in bench.sent(Promise, 2)] == [EPOCH_C]


def test_a_restarted_replica_keeps_the_lease_that_it_may_have_given() -> None:
    bench = Bench(member())
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    assert bench.sent(Refusal), "the owner of epoch A may still be serving"
    bench.later(600)
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 2))
    assert records(bench.last) == ["PromiseRecord"]


def test_the_owner_itself_ends_that_lease_by_naming_nothing() -> None:
    bench = Bench(member())
    bench.hear(0, Heartbeat(1, 9, 0, (), ()))
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    assert bench.sent(Refusal), "that heartbeat was meant for an earlier life of this node"
    bench.hear(0, Heartbeat(2, 10, 0, (), ()))
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    assert records(bench.last) == ["PromiseRecord"]


def test_a_peer_that_comes_is_greeted_at_once_by_the_name_of_its_life() -> None:
    bench = Bench(member())
    bench.did(bench.core.peer_connected(0, bench.now_ms))
    assert [b.heard for b in bench.sent(Heartbeat, 0)] == [0], "nothing came from it yet"
    assert not bench.sent(Heartbeat, 2)
    bench.hear(0, Heartbeat(1, 9, 0, (), ()), incarnation=5)
    assert [b.heard for b in bench.sent(Heartbeat, 0)] == [5], "it need not wait for a round"
    bench.hear(0, Heartbeat(2, 10, 0, (), ()), incarnation=5)
    assert not bench.sent(Heartbeat)


def test_a_peer_whose_link_was_not_up_is_asked_again() -> None:
    bench = Bench(member())
    bench.stand()
    bench.did(bench.core.peer_connected(0, bench.now_ms))
    assert [type(m) for m in bench.sent(Canvass, 0)] == [Canvass]
    assert not bench.sent(Canvass, 2)
    for peer in (0, 2):
        bench.hear(peer, CanvassAnswer(P, EPOCH_A, True, EPOCH_A, Standing.MEMBER))
    bench.synced()
    bench.did(bench.core.peer_connected(2, bench.now_ms))
    (claim,) = bench.sent(Claim)
    bench.hear(2, Promise(P, claim.epoch, Standing.MEMBER, view()))
    bench.did(bench.core.peer_connected(2, bench.now_ms))
    assert not bench.sent(Claim), "it has promised"


def test_who_refuses_while_all_are_starting_is_asked_again_soon() -> None:
    bench = Bench(member())
    bench.stand()
    for peer in (0, 2):
        bench.hear(peer, CanvassAnswer(P, EPOCH_A, False, EPOCH_A, Standing.MEMBER))
    assert {to for to, m in bench.later(50).send if isinstance(m, Canvass)} == {0, 2}
    bench.later(3_000)
    bench.stand()
    assert not any(isinstance(m, Canvass) for _, m in bench.later(50).send)


def test_what_was_gained_is_told_at_the_next_tick() -> None:
    bench = Bench(member())
    bench.elected()
    told = [m.owned for _, m in bench.later(1).send if isinstance(m, Heartbeat)]
    assert told == [((P, bench.epoch),)] * 2


def test_a_lease_is_renewed_by_heartbeats_and_given_to_nobody_else() -> None:
    bench = Bench(member())
    for beat in range(1, 20):
        bench.later(100)
        bench.hear(0, Heartbeat(beat, 10, 0, ((P, EPOCH_A),), ()))
        assert not bench.sent(HeartbeatAnswer)[0].refused
    bench.later(500)
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    assert bench.sent(Refusal)


def test_a_lease_needs_a_durable_promise() -> None:
    bench = Bench(member())
    bench.hear(2, Heartbeat(1, 10, 0, ((P, EPOCH_C),), ()))
    assert bench.sent(HeartbeatAnswer)[0].refused, "elected without this node: promise first"
    bench.hear(2, Heartbeat(2, 10, 0, ((P, EPOCH_C),), ()))
    assert bench.sent(HeartbeatAnswer)[0].refused, "not durable yet"
    bench.synced()
    bench.hear(2, Heartbeat(3, 10, 0, ((P, EPOCH_C),), ()))
    assert not bench.sent(HeartbeatAnswer)[0].refused


def test_older_epochs_are_refused_after_a_promise() -> None:
    bench = Bench(member())
    bench.later(700)
    bench.hear(2, Claim(P, EPOCH_C, 1, False, 1))
    fx = bench.hear(0, Append(P, EPOCH_A, (Put(1, b"", b"x"),)))
    assert not fx.persist
    assert [m.promised for m in bench.sent(Refusal, 0)] == [EPOCH_C]


def test_a_batch_is_one_record_and_its_answer_waits_for_the_disk() -> None:
    bench = Bench(member())
    entries = (Put(1, b"", b"x"), Put(2, b"", b"y"))
    fx = bench.hear(0, Append(P, EPOCH_A, entries))
    assert fx.persist == [AppendRecord(P, EPOCH_A, entries)]
    assert not bench.sent(Stored)
    bench.synced()
    assert bench.sent(Stored, 0) == [Stored(P, EPOCH_A, 2, False)]
    bench.hear(0, Append(P, EPOCH_A, entries))
    assert not bench.last.persist, "a duplicate is answered, not stored again"
    assert bench.sent(Stored, 0) == [Stored(P, EPOCH_A, 2, False)]


def test_only_a_prefix_is_acknowledged() -> None:
    bench = Bench(member())
    bench.hear(0, Append(P, EPOCH_A, (Put(3, b"", b"x"),)))
    bench.synced()
    assert bench.sent(Stored, 0) == [Stored(P, EPOCH_A, 0, True)]


def test_an_owner_serves_when_a_majority_has_its_seal_and_its_lease() -> None:
    bench = Bench(member())
    bench.elected()
    assert bench.core.may_serve(P, bench.now_ms)
    assert not bench.core.may_serve(P, bench.now_ms + 541), "leases end early at the owner"
    assert isinstance(bench.core.propose(P, (PutDraft(b"", b"x"),), bench.now_ms + 541), NotOwner)


def test_what_is_gained_and_lost_in_one_step_is_told_to_nobody() -> None:
    bench = Bench(member())
    epoch = bench.sealed_alone()
    later = Seal(P, 3 * MAX_NODES, 1, view(3 * MAX_NODES))
    done = bench.hear(0, Stored(P, epoch, 0, False), later)
    assert (done.gained, done.lost) == ([], [])
    assert not bench.core.may_serve(P, bench.now_ms)


def test_a_seal_on_one_disk_does_not_serve() -> None:
    bench = Bench(member())
    bench.sealed_alone()
    assert not bench.last.gained
    assert not bench.core.may_serve(P, bench.now_ms)


def test_records_are_committed_by_a_majority_of_durable_copies() -> None:
    bench = Bench(member())
    bench.elected()
    accepted = bench.core.propose(
        P, (PutDraft(b"", b"x"), AckDraft(((EPOCH_A, 1, 1),))), bench.now_ms
    )
    assert isinstance(accepted, Accepted)
    assert (accepted.epoch, accepted.first) == (bench.epoch, 1)
    assert [to for to, m in accepted.effects.send if isinstance(m, Append)] == [0]
    assert not bench.hear(0, Stored(P, bench.epoch, 2, False)).committed, "own copy not durable"
    assert [c.upto for c in bench.synced().committed] == [2]


def test_neighbours_that_share_a_meta_leave_as_one_entry_and_count_one_by_one() -> None:
    bench = Bench(member())
    bench.elected()
    drafts = (
        PutDraft(b"m", b"a"),
        RunDraft(b"m", (b"b", b"")),
        AckDraft(((bench.epoch, 1, 1),)),
        RunDraft(b"n", (b"c",)),
        RunDraft(b"m", (b"d", b"e")),
    )
    accepted = bench.core.propose(P, drafts, bench.now_ms)
    assert isinstance(accepted, Accepted)
    (append,) = [m for _, m in accepted.effects.send if isinstance(m, Append)]
    first, ack, single, last = append.entries
    assert isinstance(first, Puts)
    assert isinstance(last, Puts)
    assert (first.seq, bodies_of(first)) == (1, [b"a", b"b", b""])
    assert ack == Ack(4, ((bench.epoch, 1, 1),))
    assert single == Put(5, b"n", b"c")
    assert (last.seq, bodies_of(last)) == (6, [b"d", b"e"])
    bench.synced()
    assert [c.upto for c in bench.hear(0, Stored(P, bench.epoch, 5, False)).committed] == [5]
    assert [c.upto for c in bench.hear(0, Stored(P, bench.epoch, 7, False)).committed] == [7]
    again = bench.core.propose(P, (PutDraft(b"", b"x"),), bench.now_ms)
    assert isinstance(again, Accepted)
    assert again.first == 8


def test_a_run_whose_first_was_acked_before_it_came_is_stored_for_the_others() -> None:
    bench = Bench(member(AppendRecord(P, EPOCH_A, (Ack(4, ((EPOCH_A, 1, 1),)),))))
    run = put_entry(1, b"", [b"a", b"b", b"c"])
    fx = bench.hear(0, Append(P, EPOCH_A, (run,)))
    assert fx.persist == [AppendRecord(P, EPOCH_A, (run,))]
    assert bench.core.state(P).held.spans() == ((EPOCH_A, 2, 3),)
    assert [m for _, m in bench.synced().send] == [Stored(P, EPOCH_A, 4, False)]


def test_a_claim_above_what_was_sent_is_ignored() -> None:
    bench = Bench(member())
    bench.elected()
    assert not bench.hear(0, Stored(P, bench.epoch, 99, False)).committed


def test_a_blank_node_among_members_claims_nothing() -> None:
    bench = Bench(fresh=True)
    bench.later(5_000)
    bench.stand()
    bench.hear(0, CanvassAnswer(P, 0, True, EPOCH_A, Standing.MEMBER))
    assert not bench.last.persist, "one member and a blank node are no majority"


def test_two_blank_nodes_never_found_a_cluster_without_the_third() -> None:
    bench = Bench(fresh=True)
    for _ in range(3):
        bench.later(60_000)
        bench.stand()
        bench.hear(0, CanvassAnswer(P, 0, True, 0, Standing.BLANK))
        assert not bench.last.persist


def test_told_to_found_with_a_majority_two_blank_nodes_first_wait_for_the_third() -> None:
    bench = Bench(fresh=True, genesis_ms=3_000)
    bench.stand()
    bench.hear(0, CanvassAnswer(P, 0, True, 0, Standing.BLANK))
    assert not bench.last.persist
    bench.later(3_000)
    bench.stand()
    bench.hear(0, CanvassAnswer(P, 0, True, 0, Standing.BLANK))
    assert records(bench.last) == ["PromiseRecord"]
    assert all(claim.total for claim in bench.sent(Claim))


def test_a_node_whose_peers_know_it_is_no_founder() -> None:
    bench = Bench(fresh=True)
    bench.hear(0, Heartbeat(1, 3, 0, (), ()))
    assert bench.core.state(P).standing is Standing.DAMAGED
    bench.later(3_000)
    bench.stand()
    bench.hear(0, CanvassAnswer(P, 0, True, 0, Standing.BLANK))
    assert not bench.last.persist


def test_a_lost_disk_counts_only_when_witnesses_attest() -> None:
    bench = Bench(fresh=True)
    seal = Seal(P, EPOCH_A, 1, view(EPOCH_A, ((EPOCH_A, 1, 1),), ((EPOCH_A, 1, 1),)))
    bench.hear(0, seal)
    assert bench.sent(Pull, 0) == [Pull(P, EPOCH_A, ((EPOCH_A, 1, 1),))]
    inquiries = bench.sent(Inquire)
    assert len(inquiries) == 2
    nonce = inquiries[0].nonce
    bench.hear(0, Copies(P, EPOCH_A, (Copy(EPOCH_A, 1, b"", b"x"),), ()))
    assert records(bench.last) == ["CopyRecord"]
    bench.hear(0, Attest(P, nonce, EPOCH_A, Standing.MEMBER))
    assert not bench.last.persist, "one of two others may not know"
    bench.hear(2, Attest(P, nonce, EPOCH_A, Standing.MEMBER))
    assert records(bench.last) == ["SealRecord"]
    assert not bench.sent(Stored)
    bench.synced()
    assert bench.sent(Stored, 0) == [Stored(P, EPOCH_A, 1, False)]


def test_a_witness_of_a_later_owner_stops_the_copy() -> None:
    bench = Bench(fresh=True)
    bench.hear(0, Seal(P, EPOCH_A, 1, view()))
    nonce = bench.sent(Inquire)[0].nonce
    bench.hear(0, Attest(P, nonce, EPOCH_A, Standing.MEMBER))
    bench.hear(2, Attest(P, nonce, EPOCH_C, Standing.MEMBER))
    assert not bench.last.persist
    assert bench.core.state(P).standing is not Standing.MEMBER


def test_an_earlier_life_of_a_peer_is_not_heard() -> None:
    bench = Bench(member())
    bench.later(700)
    bench.hear(2, incarnation=6)
    fx = bench.hear(2, Claim(P, EPOCH_C, 1, False, 1), incarnation=5)
    assert not fx.persist
    assert not fx.send


def test_an_older_record_outside_the_sealed_union_is_void() -> None:
    bench = Bench(member(AppendRecord(P, EPOCH_A, (Put(1, b"", b"refused"),))))
    fx = bench.hear(2, Seal(P, EPOCH_C, 1, view(EPOCH_C)))
    assert fx.forget == [(P, ((EPOCH_A, 1, 1),))]
    assert not bench.core.state(P).held


def test_an_acked_message_of_an_absent_replica_does_not_come_back() -> None:
    """It held the put, was away for the ack and for the takeover; nobody kept a tombstone."""
    bench = Bench(member(AppendRecord(P, EPOCH_A, (Put(1, b"", b"x"),))))
    bench.hear(2, Seal(P, EPOCH_C, 1, view(EPOCH_C, ((EPOCH_A, 1, 2),), ())))
    assert not bench.core.state(P).held
    bench.synced()
    assert bench.sent(Stored, 2)


def test_another_clusters_state_is_refused() -> None:
    bench = Bench(member())
    stranger = View(EPOCH_C, ORIGIN + 1, (), (), ())
    fx = bench.hear(2, Seal(P, EPOCH_C, 1, stranger))
    assert [note.name for note in fx.notes] == ["origin_conflict"]
    assert not fx.persist


def test_damage_takes_a_node_out_of_the_majority_and_an_owner_out_of_office() -> None:
    bench = Bench(member())
    bench.elected()
    fx = bench.did(bench.core.damaged(P, ((EPOCH_A, 1, 1),), bench.now_ms))
    assert fx.persist == [WithdrawRecord(P, ((EPOCH_A, 1, 1),))]
    assert [lost.clean for lost in fx.lost] == [False]
    assert bench.core.state(P).standing is Standing.DAMAGED


def test_hostile_messages_change_nothing() -> None:
    huge = 2**53
    for message in (
        Claim(P, EPOCH_A, 1, False, 1),  # not the sender's epoch
        Append(P, EPOCH_C, (Put(1, b"", b""), Put(1, b"", b""))),
        Append(P, EPOCH_C, ()),
        Append(P, EPOCH_C, (Ack(1, ((EPOCH_C, 5, 3),)),)),
        Append(P, EPOCH_C, (Ack(2, ((huge, 1, 1),)),)),
        Seal(P, EPOCH_C, 1, view(EPOCH_C, (), ((EPOCH_A, 1, 1),))),  # held, not covered
        Seal(P, EPOCH_C, 1, View(EPOCH_C, ORIGIN, (), ((EPOCH_A, 2**43, b"\1"),), ())),
        Seal(P, EPOCH_C, 1, View(EPOCH_C, ORIGIN, ((EPOCH_A, 1, huge),), ((64, 0, b"\1"),), ())),
        Seal(P, EPOCH_C, 1, View(EPOCH_C, ORIGIN, ((EPOCH_A, 1, huge),), ((64, 0, b"\0"),), ())),
        Heartbeat(1, 10, 0, ((P, EPOCH_A),), ()),
        Stored(P, EPOCH_C, 1, False),
        Promise(P, EPOCH_C, Standing.MEMBER, view()),
        Copies(P, EPOCH_C, (Copy(EPOCH_A, 1, b"", b""),), ()),
    ):
        bench = Bench(member())
        bench.later(700)
        fx = bench.hear(2, message)
        assert not fx.persist, message
        assert not fx.gained, message


def test_a_silent_owner_is_replaced_within_two_seconds() -> None:
    """At the lease's end if its connection broke; after some patience if it only hangs."""
    bench = Bench(member())
    bench.hear(0, Heartbeat(1, 10, 0, ((P, EPOCH_A),), ()))
    assert 900 <= bench.stand() < 1_500
    bench = Bench(member())
    bench.hear(0, Heartbeat(1, 10, 0, ((P, EPOCH_A),), ()))
    bench.core.peer_disconnected(0, bench.now_ms)
    assert 600 <= bench.stand() < 750


def test_a_node_whose_clock_went_back_with_its_disk_is_told_so() -> None:
    bench = Bench(fresh=True)
    fx = bench.hear(0, Heartbeat(1, 99, 0, (), ()))
    assert [note.name for note in fx.notes] == ["outlived"]
    assert not bench.hear(0, Heartbeat(2, 99, 0, (), ())).notes, "once"


def test_a_ring_that_nobody_can_tell_any_more_stops_no_election() -> None:
    """Who knew it asked for this promise, and lost its disk before it told what is in that ring."""
    bench = Bench(member(PromiseRecord(P, EPOCH_C, 4)))
    bench.later(600)
    bench.stand()
    bench.hear(0, CanvassAnswer(P, EPOCH_A, True, EPOCH_C, Standing.MEMBER))
    assert {m.ring for m in bench.sent(Claim)} == {4}, "replicas accept none below their own"
    (promise,) = bench.last.persist
    assert isinstance(promise, PromiseRecord)
    assert promise.ring == 4
    bench.synced()
    bench.hear(0, Promise(P, promise.epoch, Standing.MEMBER, view()))
    assert {m.ring for m in bench.sent(Seal)} == {4}
