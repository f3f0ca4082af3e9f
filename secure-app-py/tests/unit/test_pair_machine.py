"""The pair machine by hand: two states, a disk that is told when to be done, messages passed
over."""

from __future__ import annotations

from collections import deque

import pytest

from secure_store.core import machine
from secure_store.core.effects import (
    Append,
    Arrive,
    Durable,
    Effects,
    Fetched,
    LinkDown,
    LinkUp,
    LookedUp,
    Persisted,
    Promote,
    Received,
    Tick,
)
from secure_store.core.invariants import check_node
from secure_store.core.messages import Hello, Mode, Refuse, Role, Sealed
from secure_store.core.pair import Phase
from secure_store.core.records import ORIGIN, Position, extend, follows


class Pair:
    """A (primary) and B. `sync(name)` lets a disk finish; messages flow unless `held` says no."""

    def __init__(self, mode: Mode = Mode.AVAILABLE) -> None:
        self.now_ms = 0
        self.mail: deque[tuple[str, object]] = deque()
        self.held: set[str] = set()
        self.seen: list[tuple[str, object]] = []
        self.out: dict[str, list] = {"A": [], "B": []}
        self.disk: dict[str, int] = {"A": 0, "B": 0}
        self.logs: dict[str, list] = {"A": [], "B": []}
        self.states = {}
        for name in "AB":
            self.states[name], fx = machine.start(
                node_id=name, url=name, durable=Durable(), last=ORIGIN, shown_seq=0,
                has_replica_flag=name == "A", may_found=False,
                mode_wanted=mode if name == "A" else None,
                fresh_cluster_id="c", genesis=b"g", now_ms=0,
            )  # fmt: skip
            self.carry(name, fx)

    def carry(self, name: str, fx: Effects) -> None:
        for op in fx.persist:
            self.logs[name] += getattr(op, "records", ())
        if fx.persist:
            self.disk[name] = fx.persist[-1].number
        other = "B" if name == "A" else "A"
        for _, message in fx.send:
            self.seen.append((name, message))
            self.mail.append((other, message))
        for look_up in fx.look_up:
            self.feed(name, LookedUp(look_up.link, look_up.seq, None, self.now_ms))
        for fetch in fx.fetch:
            kept = [r for r in self.logs[name] if fetch.after_seq < r.seq <= fetch.up_to_seq]
            self.feed(name, Fetched(fetch.link, fetch.after_seq, tuple(kept), self.now_ms))
        if fx.admit:
            entries = tuple((request, b"p%d" % request) for request in fx.admit)
            self.feed(name, Append(entries, self.now_ms))
        check_node(self.states[name])
        self.out[name] += [*fx.done, *fx.reject, *fx.unknown, *fx.promotions]

    def feed(self, name: str, event) -> None:
        self.carry(name, machine.step(self.states[name], event))

    def sync(self, *names: str) -> None:
        for name in names or "AB":
            self.feed(name, Persisted(self.disk[name], self.now_ms))

    def deliver(self) -> None:
        for _ in range(len(self.mail) + 50):
            if not self.mail:
                return
            to, message = self.mail.popleft()
            if to not in self.held:
                self.feed(to, Received(1, message, self.now_ms))

    def settle(self) -> None:
        for _ in range(10):
            self.sync()
            self.deliver()

    def connect(self) -> None:
        self.sync()
        self.feed("B", LinkUp(1, False, self.now_ms))
        self.feed("A", LinkUp(1, True, self.now_ms))
        self.settle()

    def write(self, request: int) -> None:
        self.feed("A", Arrive((request,), self.now_ms))

    def later(self, by_ms: int) -> None:
        """Time passes, tick by tick, with pings heard."""
        until = self.now_ms + by_ms
        while self.now_ms < until:
            self.now_ms += 50
            for name in "AB":
                self.feed(name, Tick(self.now_ms))
            self.deliver()


@pytest.fixture
def pair() -> Pair:
    made = Pair()
    made.connect()
    return made


def test_a_fresh_pair_finds_together(pair: Pair) -> None:
    assert pair.states["A"].session.phase is Phase.LIVE
    assert pair.states["B"].durable.role is Role.REPLICA
    assert pair.states["A"].durable.in_step
    assert pair.states["B"].shown_seq == 1


def test_a_write_is_done_when_both_disks_have_it_in_either_order(pair: Pair) -> None:
    pair.write(1)
    pair.deliver()
    pair.sync("A")
    pair.deliver()
    assert pair.out["A"] == []
    pair.sync("B")
    pair.deliver()
    assert pair.out["A"][0].degraded is False
    pair.write(2)
    pair.deliver()
    pair.sync("B")
    pair.deliver()
    assert len(pair.out["A"]) == 1
    assert pair.states["B"].shown_seq == 2, "the primary's disk has it not yet"
    pair.sync("A")
    pair.deliver()
    assert len(pair.out["A"]) == 2
    assert pair.states["B"].shown_seq == 3, "shown there before it is acknowledged here"


def test_a_silent_replica_is_given_up_after_a_second_and_the_mark_comes_first(pair: Pair) -> None:
    pair.held = {"B"}
    pair.write(1)
    pair.sync("A")
    pair.later(900)
    assert pair.out["A"] == []
    pair.later(200)
    assert pair.states["A"].durable.in_step
    assert pair.out["A"] == [], "the mark is not durable yet"
    pair.sync("A")
    assert pair.out["A"][0].degraded is True


def test_nothing_is_acknowledged_alone_between_the_wish_and_the_mark(pair: Pair) -> None:
    pair.held = {"B"}
    pair.write(1)
    record = pair.disk["A"]
    pair.later(1_100)
    assert not pair.states["A"].wished.in_step
    pair.feed("A", Persisted(record, pair.now_ms))
    assert pair.states["A"].durable_seq == 2
    assert pair.out["A"] == [], "a crash now would leave a mark that says: in step"
    pair.sync("A")
    assert pair.out["A"][0].degraded is True


def test_a_stale_replica_is_sent_only_what_the_primarys_disk_holds() -> None:
    pair = Pair()
    pair.sync()
    pair.later(1_100)
    for request in range(400):
        pair.write(request)
    pair.sync("A")
    pair.feed("B", LinkUp(1, False, pair.now_ms))
    pair.feed("A", LinkUp(1, True, pair.now_ms))
    for _ in range(2):
        pair.sync("B")
        pair.deliver()
    session = pair.states["A"].session
    assert session.phase is Phase.CATCHUP
    pair.now_ms += 1_100  # the link is no longer in the making: writes go on alone
    pair.write(1_000)
    pair.deliver()
    assert pair.states["A"].last.seq == 402
    assert session.next_seq <= 402, "record 402 is on nobody's disk yet"
    pair.settle()
    assert pair.states["A"].session.phase is Phase.LIVE
    assert pair.states["B"].shown_seq == 402


def test_a_write_waits_for_a_link_in_the_making_and_no_longer() -> None:
    pair = Pair()
    pair.sync()
    pair.write(1)
    assert pair.out["A"] == []
    pair.connect()
    assert pair.out["A"][0].degraded is False
    lone = Pair()
    lone.sync()
    lone.now_ms = 600
    lone.write(1)
    lone.later(500)
    lone.sync("A")
    assert lone.out["A"][0].degraded is True


def test_strict_mode_says_unknown_when_it_had_begun_and_refuses_when_it_had_not() -> None:
    pair = Pair(Mode.STRICT)
    pair.connect()
    pair.held = {"B"}
    pair.write(1)
    pair.sync("A")
    pair.later(1_100)
    assert pair.out["A"] == [(1, "Replica did not confirm in time")]
    pair.write(2)
    pair.later(1_100)
    assert pair.out["A"][1].reason == "Replica is not reached"


def test_a_seal_waits_until_the_replica_has_everything(pair: Pair) -> None:
    pair.write(1)
    pair.feed("B", Promote(9, False, 0))
    pair.deliver()
    assert not any(isinstance(m, Sealed) for _, m in pair.seen)
    pair.write(2)
    assert pair.out["A"][-1].reason == "The primary is handing over"
    pair.settle()
    assert next(m for _, m in pair.seen if isinstance(m, Sealed)).last.seq == 2
    assert pair.states["B"].is_primary
    assert pair.states["B"].durable.epoch == 2
    assert pair.states["A"].wished.role is Role.REPLICA
    assert any(getattr(o, "ok", False) for o in pair.out["B"])


def test_a_primary_of_an_old_epoch_is_turned_away_and_follows(pair: Pair) -> None:
    pair.feed("B", LinkDown(1, 0))
    pair.feed("B", Promote(9, True, 0))
    pair.sync("B")
    assert pair.states["B"].is_primary
    pair.feed("A", LinkDown(1, 0))
    pair.feed("A", LinkUp(2, True, 0))
    hello = next(m for _, m in reversed(pair.seen) if isinstance(m, Hello))
    pair.mail.clear()
    pair.feed("B", Received(7, hello, 0))
    refused = next(m for _, m in reversed(pair.seen) if isinstance(m, Refuse))
    assert refused.epoch == 2
    pair.feed("A", Received(2, refused, 0))
    assert pair.states["A"].wished.role is Role.REPLICA


def test_another_clusters_replica_stops_the_writes() -> None:
    pair = Pair()
    pair.sync()
    pair.feed("A", LinkUp(1, True, 0))
    pair.mail.clear()
    pair.feed("A", Received(1, Refuse("Replica belongs to another cluster", 1), 0))
    pair.write(1)
    assert pair.out["A"][0].reason == "Replica belongs to another cluster"


def test_a_history_is_named_by_its_position() -> None:
    one = extend("c", ORIGIN, 1, b"x")
    two = extend("c", one.position, 1, b"y")
    assert follows("c", ORIGIN, (one, two))
    assert not follows("d", ORIGIN, (one, two)), "another cluster"
    assert not follows("c", ORIGIN, (two,)), "a gap"
    assert not follows("c", Position(1, 1, b"z" * 32), (two,)), "another past"
    late = extend("c", one.position, 3, b"y")
    assert not follows("c", late.position, (extend("c", late.position, 2, b"z"),)), "back in time"
