"""A partition at its owner: drafts out, answers back, nothing answered before it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from message_queue.core.delivery.leases import encode_leases
from message_queue.core.delivery.lots import singly
from message_queue.core.delivery.model import Entry, Receipt, dead_letter_queue
from message_queue.core.delivery.owner import SETTINGS_KEY, PartitionOwner
from message_queue.core.delivery.pending import spans_of
from message_queue.core.ids import message_id, pack_dot, parse_id
from message_queue.core.operations import (
    Answer,
    Configure,
    Extend,
    Nack,
    NewMessage,
    Produce,
    Settle,
    results_decoder,
)
from message_queue.core.replication.drafts import AckDraft, Draft, PutDraft, RunDraft, SetDraft

PARTITION = 5
EPOCH = 130


def one_by_one(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Runs as the puts that they are short for."""
    for draft in drafts:
        if isinstance(draft, RunDraft):
            yield from (PutDraft(draft.meta, body) for body in draft.bodies)
        else:
            yield draft


class Bench:
    """An owner and the replication beneath it, reduced to a counter and a dict."""

    def __init__(self, owner: PartitionOwner | None = None) -> None:
        self.held: dict[int, tuple[bytes, bytes]] = {}
        self.settings: dict[str, bytes] = {}
        self.issued = 0
        self.now = 1_000
        self.token = 0
        self.answers: dict[int, Answer | None] = {}
        self.owner = owner or PartitionOwner(PARTITION, EPOCH, self.covers)
        self.proposed: list[tuple[Draft, ...]] = []

    def covers(self, dot: int) -> bool:
        return 0 < dot <= pack_dot(EPOCH, self.issued)

    def propose(self) -> None:
        drafts, gathered = self.owner.gather(1 << 20)
        first = self.issued + 1 if drafts else 0
        for draft in one_by_one(drafts):
            self.issued += 1
            match draft:
                case PutDraft(meta, body):
                    self.held[pack_dot(EPOCH, self.issued)] = (meta, body)
                case AckDraft(targets):
                    for epoch, low, high in targets:
                        for seq in range(low, high + 1):
                            self.held.pop(pack_dot(epoch, seq), None)
                case SetDraft(key, value):
                    self.settings[key] = value
        self.owner.proposed(gathered, first, self.now)
        self.drain()

    def commit(self) -> None:
        self.owner.committed(self.issued, self.now)
        self.drain()

    def store(self) -> None:
        """Until nothing more comes of it."""
        while self.owner.has_gathered:
            self.propose()
            self.commit()

    def drain(self) -> None:
        self.owner.collect(self.now)
        for token, answer in self.owner.finished:
            assert token not in self.answers, "answered twice"
            self.answers[token] = answer
        self.owner.finished.clear()

    def produce(self, queue: str, *messages: NewMessage, batch: bool = False) -> int:
        self.token += 1
        op = Produce(queue, messages, batch)
        answer = self.owner.produce(self.token, op, self.now, 1_700_000_000_000)
        if answer is not None:
            self.answers[self.token] = answer
        return self.token

    def settle(self, *dots: int, receipt: str | None = None) -> int:
        self.token += 1
        op = Settle(PARTITION, dots, tuple(receipt for _ in dots))
        answer = self.owner.settle(self.token, op)
        if answer is not None:
            self.answers[self.token] = answer
        return self.token

    def statuses(self, token: int) -> tuple[int, ...]:
        answer = self.answers[token]
        assert answer is not None
        return results_decoder.decode(answer.body).statuses

    def body(self, token: int) -> dict[str, Any]:
        answer = self.answers[token]
        assert answer is not None
        return {"http": answer.status, **msgspec.json.decode(answer.body)}

    def dot(self, token: int) -> int:
        name = parse_id(self.body(token)["id"])
        assert name is not None
        assert name.partition == PARTITION
        return name.dot

    def take(self, queue: str, most: int = 1, visibility_ms: int = 100) -> list[Entry]:
        taken = singly(self.owner.delivery.take(queue, most, visibility_ms, self.now))
        self.drain()
        return taken

    def pass_ms(self, ms: int) -> None:
        self.now += ms
        self.owner.tick(self.now)
        self.drain()

    def successor(self, leases: bytes = b"") -> Bench:
        """Another node takes over what is stored."""
        bench = Bench(PartitionOwner(PARTITION, EPOCH + 1, lambda _: True))
        bench.now = self.now
        held = [(dot, meta, len(body)) for dot, (meta, body) in sorted(self.held.items())]
        assert bench.owner.restore(held, self.settings, leases, self.now) == []
        bench.drain()
        return bench


def text(value: str, **fields: Any) -> NewMessage:
    return NewMessage(msgspec.json.encode(value), **fields)


def test_a_produce_is_answered_and_delivered_only_when_stored() -> None:
    bench = Bench()
    token = bench.produce("q", text("a"))
    assert bench.answers == {}
    bench.propose()
    assert bench.answers == {}
    assert bench.take("q") == []
    bench.commit()
    assert bench.body(token) == {
        "http": 201,
        "id": message_id(PARTITION, pack_dot(EPOCH, 1)),
        "queue": "q",
        "status": "created",
    }
    [entry] = bench.take("q")
    assert entry.body == b'"a"'


def test_what_gathers_goes_out_as_one_batch_bounded_in_bytes() -> None:
    bench = Bench()
    tokens = [bench.produce("q", NewMessage(b'"' + b"x" * 998 + b'"')) for _ in range(5)]
    drafts, gathered = bench.owner.gather(2_500)
    assert (len(drafts), len(gathered)) == (2, 2)
    bench.owner.proposed(gathered, 1, bench.now)
    bench.issued = 2
    bench.store()
    assert [bench.dot(t) & 0xFF for t in tokens] == [1, 2, 3, 4, 5]


def test_a_single_message_larger_than_a_batch_still_goes_out() -> None:
    bench = Bench()
    token = bench.produce("q", NewMessage(b'"' + b"x" * 5_000 + b'"'))
    drafts, gathered = bench.owner.gather(100)
    assert len(drafts) == 1
    bench.owner.proposed(gathered, 1, bench.now)
    bench.issued = 1
    bench.commit()
    assert bench.body(token)["http"] == 201


def test_an_ack_is_answered_when_stored_and_a_retry_says_the_same() -> None:
    bench = Bench()
    produced = bench.produce("q", text("a"))
    bench.store()
    [entry] = bench.take("q")
    first = bench.settle(entry.dot, receipt=f"{EPOCH}.1")
    second = bench.settle(entry.dot, receipt=f"{EPOCH}.1")
    assert first not in bench.answers
    assert second not in bench.answers
    bench.store()
    assert bench.statuses(first) == bench.statuses(second) == (200,)
    third = bench.settle(bench.dot(produced), receipt=f"{EPOCH}.1")
    assert bench.statuses(third) == (200,)
    assert bench.held == {}


def test_acks_of_never_issued_and_overtaken_deliveries_settle_nothing() -> None:
    bench = Bench()
    bench.produce("q", text("a"))
    bench.store()
    [entry] = bench.take("q", visibility_ms=10)
    bench.pass_ms(11)
    assert len(bench.take("q")) == 1
    token = bench.settle(entry.dot, pack_dot(EPOCH, 99), receipt=f"{EPOCH}.1")
    assert bench.statuses(token) == (409, 404)
    assert not bench.owner.has_gathered
    assert len(bench.held) == 1


def test_a_message_whose_ack_is_in_doubt_is_not_delivered_again() -> None:
    bench = Bench()
    bench.produce("q", text("a"))
    bench.store()
    [entry] = bench.take("q", visibility_ms=10)
    bench.settle(entry.dot)
    bench.propose()
    bench.pass_ms(1_000)
    assert bench.take("q") == []


def test_two_simultaneous_produces_with_one_dedupe_id_store_one_message() -> None:
    bench = Bench()
    first = bench.produce("q", text("a", dedupe_id="d"))
    second = bench.produce("q", text("a", dedupe_id="d"))
    bench.propose()
    third = bench.produce("q", text("a", dedupe_id="d"))
    assert second not in bench.answers
    bench.propose()
    assert third not in bench.answers, "a repetition is not answered before its first is stored"
    bench.commit()
    assert bench.body(first)["http"] == 201
    for token in (second, third):
        assert bench.body(token)["http"] == 200
        assert bench.body(token)["duplicate"] is True
        assert bench.dot(token) == bench.dot(first)
    assert len(bench.take("q", 10)) == 1


def test_the_dedupe_window_outlives_its_message_a_failover_and_then_closes() -> None:
    bench = Bench()
    first = bench.produce("q", text("a", dedupe_id="d"))
    bench.store()
    bench.settle(bench.dot(first))
    bench.store()
    later = bench.successor()
    later.pass_ms(299_000)
    repeated = later.produce("q", text("a", dedupe_id="d"))
    later.propose()
    assert later.body(repeated)["duplicate"] is True
    assert later.dot(repeated) == bench.dot(first)
    later.pass_ms(2_000)
    later.store()
    again = later.produce("q", text("a", dedupe_id="d"))
    later.store()
    assert later.body(again)["http"] == 201


def test_a_batch_with_repetitions_names_them_and_stores_the_rest() -> None:
    bench = Bench()
    first = bench.produce("q", text("a", dedupe_id="d"))
    token = bench.produce(
        "q", text("b"), text("a", dedupe_id="d"), text("c", dedupe_id="e"),
        text("c", dedupe_id="e"), batch=True,
    )  # fmt: skip
    bench.store()
    body = bench.body(token)
    assert body["http"] == 201
    assert body["duplicates"] == [1, 3]
    assert body["ids"][1] == bench.body(first)["id"]
    assert body["ids"][2] == body["ids"][3]
    assert [e.body for e in bench.take("q", 10)] == [b'"a"', b'"b"', b'"c"']


def test_marks_of_a_batch_name_their_own_messages_after_a_failover() -> None:
    bench = Bench()
    first = bench.produce("q", *(text(n, dedupe_id=n) for n in "abc"), text("d"), batch=True)
    bench.store()
    later = bench.successor()
    for n, name in enumerate("abc"):
        repeated = later.produce("q", text(name, dedupe_id=name))
        later.store()
        assert later.body(repeated)["duplicate"] is True
        assert later.body(repeated)["id"] == bench.body(first)["ids"][n]


def test_a_batch_of_unlike_messages_keeps_order_bodies_and_ids() -> None:
    bench = Bench()
    kinds: list[dict[str, Any]] = [{}, {}, {"priority": 3}, {"headers": b'{"a":1}'}, {}, {}]
    token = bench.produce("q", *(text(str(n), **kind) for n, kind in enumerate(kinds)), batch=True)
    bench.store()
    ids = [parse_id(name) for name in bench.body(token)["ids"]]
    taken = bench.take("q", 50)
    assert [entry.body for entry in taken] == [b'"2"', b'"0"', b'"1"', b'"3"', b'"4"', b'"5"']
    assert [entry.headers for entry in taken] == [None, None, None, b'{"a":1}', None, None]
    names = {entry.body: entry.dot for entry in taken}
    assert ids == [(PARTITION, names[b'"%d"' % n]) for n in range(6)]


def test_a_refused_batch_asks_elsewhere_and_frees_its_dedupe_ids() -> None:
    bench = Bench()
    token = bench.produce("q", text("a", dedupe_id="d"))
    _, gathered = bench.owner.gather(1 << 20)
    bench.owner.refused(gathered, bench.now)
    bench.drain()
    assert bench.answers == {token: None}
    again = bench.produce("q", text("a", dedupe_id="d"))
    bench.store()
    assert bench.body(again)["http"] == 201


def test_losing_the_ownership_says_what_is_known_and_no_more() -> None:
    bench = Bench()
    flying = bench.produce("q", text("a"))
    bench.propose()
    waiting = bench.produce("q", text("b"))
    bench.owner.lost(clean=False)
    bench.drain()
    assert bench.answers[waiting] is None
    assert bench.body(flying)["http"] == 503
    assert bench.body(flying)["definite"] is False


def test_a_full_queue_counts_what_is_still_being_stored() -> None:
    bench = Bench()
    bench.owner.configure(100, Configure("q", b'{"max_length":2}'))
    bench.store()
    assert bench.body(100)["settings"]["max_length"] == 2
    bench.produce("q", text("a"))
    bench.propose()
    bench.produce("q", text("b"))
    third = bench.produce("q", text("c"))
    assert bench.body(third)["http"] == 429
    bench.store()
    [entry] = bench.take("q")
    bench.settle(entry.dot)
    bench.store()
    fourth = bench.produce("q", text("d"))
    bench.store()
    assert bench.body(fourth)["http"] == 201


def test_settings_survive_a_failover_and_deletion_forgets_them() -> None:
    bench = Bench()
    bench.owner.configure(100, Configure("q", b'{"visibility_ms":77}'))
    bench.produce("q", text("a"))
    bench.store()
    later = bench.successor()
    assert later.owner.delivery.settings("q").visibility_ms == 77
    assert later.owner.delivery.settings("q").max_deliveries == 5
    later.settings = dict(bench.settings)
    assert later.owner.purge(7, "q", delete=True) is None
    later.store()
    assert later.body(7) == {"http": 200, "status": "deleted", "queue": "q", "messages": 1}
    assert later.settings[SETTINGS_KEY + "q"] == b""
    assert not later.owner.delivery.exists("q")


def test_a_purge_ends_everything_and_opens_the_dedupe_window() -> None:
    bench = Bench()
    bench.produce("q", text("a", dedupe_id="d"), text("b", delay_ms=50), text("c"), batch=True)
    bench.produce("other", text("x"))
    bench.store()
    bench.take("q")
    assert bench.owner.purge(7, "q", delete=False) is None
    bench.store()
    assert bench.body(7)["messages"] == 3
    assert len(bench.held) == 1
    bench.pass_ms(1_000)
    assert bench.take("q") == []
    again = bench.produce("q", text("a", dedupe_id="d"))
    bench.store()
    assert bench.body(again)["http"] == 201


def test_leases_that_were_passed_on_are_honoured_by_the_successor() -> None:
    bench = Bench()
    bench.produce("q", text("a"), text("b"), batch=True)
    bench.store()
    [entry] = bench.take("q", visibility_ms=500)
    leases = bench.owner.leases()
    assert leases is not None
    assert bench.owner.leases() is None, "nothing changed since"
    later = bench.successor(leases)
    assert [e.body for e in later.take("q", 10)] == [None]
    assert later.settle(entry.dot, receipt=str(Receipt(EPOCH, 1)))
    later.store()
    assert later.statuses(later.token) == (200,)
    # One that did not hear of the lease delivers again, and the old receipt is overtaken then.
    deaf = bench.successor()
    assert len(deaf.take("q", 10)) == 2
    token = deaf.settle(entry.dot, receipt=str(Receipt(EPOCH, 1)))
    assert deaf.statuses(token) == (409,)


def test_leases_that_are_no_leases_are_ignored() -> None:
    bench = Bench()
    bench.produce("q", text("a"))
    bench.store()
    for leases in (b"\xff\x00", encode_leases([], []), b"\x91\x91\x01"):
        assert len(bench.successor(leases).take("q")) == 1


def test_expired_messages_are_removed_for_good() -> None:
    bench = Bench()
    bench.produce("q", text("a", ttl_ms=50))
    bench.store()
    assert bench.owner.due(bench.now) is False
    bench.pass_ms(60)
    bench.store()
    assert bench.held == {}
    assert bench.take("q") == []


def test_an_exhausted_message_waits_for_its_burial() -> None:
    bench = Bench()
    bench.owner.configure(100, Configure("q", b'{"max_deliveries":1}'))
    bench.produce("q", text("a"))
    bench.store()
    [entry] = bench.take("q", visibility_ms=10)
    bench.pass_ms(20)
    assert bench.owner.dead_letters == [entry]
    bench.store()
    assert len(bench.held) == 1, "not removed before it is stored elsewhere"
    bench.owner.remove([entry.dot])
    bench.store()
    assert bench.held == {}


def test_nack_and_extend_need_a_delivery_that_is_the_last_one() -> None:
    bench = Bench()
    token = bench.produce("q", text("a"))
    bench.store()
    dot = bench.dot(token)
    unknown = pack_dot(EPOCH, 77)
    now = bench.now
    assert bench.owner.nack(Nack(PARTITION, unknown), now).status == 404
    assert bench.owner.extend(Extend(PARTITION, dot, None, 10), now).status == 409
    bench.take("q")
    assert (
        bench.owner.extend(Extend(PARTITION, dot, f"{EPOCH}.1", 13 * 3600_000), now).status == 400
    )
    assert bench.owner.extend(Extend(PARTITION, dot, f"{EPOCH}.1", 60_000), now).status == 200
    bench.pass_ms(30_000)
    assert bench.take("q") == []
    assert bench.owner.nack(Nack(PARTITION, dot, f"{EPOCH}.1", 0), bench.now).status == 200
    assert len(bench.take("q")) == 1


def test_restore_reports_what_it_cannot_read_and_keeps_the_rest() -> None:
    bench = Bench()
    bench.produce("q", text("a"))
    bench.store()
    dot, (meta, body) = next(iter(bench.held.items()))
    owner = PartitionOwner(PARTITION, EPOCH + 1, lambda _: True)
    held = [(dot, meta, len(body)), (dot + 1, b"\xc1", 0)]
    sentences = owner.restore(held, {SETTINGS_KEY + "q": b"{"}, b"", 0)
    assert len(sentences) == 2
    assert owner.delivery.length("q") == 1


def test_spans_are_sorted_and_joined() -> None:
    dots = [pack_dot(2, 5), pack_dot(1, 2), pack_dot(1, 1), pack_dot(2, 6), pack_dot(1, 9)]
    assert spans_of(dots) == ((1, 1, 2), (1, 9, 9), (2, 5, 6))
    assert spans_of([]) == ()


def test_attempts_that_were_passed_on_count_at_the_successor() -> None:
    bench = Bench()
    bench.owner.configure(100, Configure("q", b'{"max_deliveries":2}'))
    bench.produce("q", text("a"), text("b"), batch=True)
    bench.store()
    first, second = bench.take("q", 2, visibility_ms=10)
    bench.pass_ms(20)
    assert [e.attempt for e in bench.take("q", 1, visibility_ms=10)] == [2]
    leases = bench.owner.leases()
    assert leases is not None
    later = bench.successor(leases)
    assert later.owner.dead_letters == []
    later.pass_ms(20)
    # The one that had its last delivery is dead, the other one has one delivery left.
    assert [e.dot for e in later.owner.dead_letters] == [first.dot]
    assert [(e.dot, e.attempt) for e in later.take("q", 2)] == [(second.dot, 2)]
    # Exhausted and not yet buried when the owner went: the successor buries it.
    bench.pass_ms(20)
    leases = bench.owner.leases()
    assert leases is not None
    assert [e.dot for e in bench.successor(leases).owner.dead_letters] == [first.dot]


def test_a_dead_letter_queue_always_has_a_name_that_clients_can_ask_for() -> None:
    assert dead_letter_queue("jobs") == "jobs.dead"
    for queue in ("q" * 256, "é" * 128, "q" * 255 + "é"):
        name = dead_letter_queue(queue)
        assert len(name.encode()) <= 256
        assert name.endswith(".dead")
        assert name != dead_letter_queue("x" + queue[1:])
