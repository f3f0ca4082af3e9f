"""Delivery against a model so naive that it is obviously right: a list, searched from the front."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from message_queue.core.delivery.backlog import Card
from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.lots import Spanned, receipts_of, singly
from message_queue.core.delivery.model import Ended, Receipt, Settings, Verdict
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.pending import joined
from message_queue.core.delivery.stored import MessageMeta
from message_queue.core.ids import pack_dot

QUEUES = ["a", "b"]


MESSAGES = st.lists(
    st.tuples(
        st.integers(0, 2),  # priority
        st.sampled_from(["g", None, "h"]),  # group
        st.sampled_from([0, 0, 5, 20]),  # delay
        st.sampled_from([0, 0, 30]),  # ttl
    ),
    min_size=1,
    max_size=5,
)


@dataclass
class Naive:
    """One message of the model; `where` is ready, delayed, leased or settling."""

    dot: int
    queue: str
    priority: int
    group: str | None
    ready_at: int
    expires: int
    where: str = "ready"
    due: int = 0
    acked: bool = False
    attempt: int = 0
    number: int = 0
    """Of deliveries, those included that reached nobody."""


@dataclass
class Model:
    messages: list[Naive] = field(default_factory=list)
    max_deliveries: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(QUEUES, 5))
    ended: list[tuple[int, Ended]] = field(default_factory=list)

    def blocked(self, m: Naive) -> bool:
        return m.group is not None and any(
            o.dot < m.dot and o.queue == m.queue and o.group == m.group for o in self.messages
        )

    def tick(self, now: int) -> None:
        for m in self.messages:
            if m.where == "leased" and m.due <= now:
                self.give_back(m, now)
            elif m.where == "delayed" and m.due <= now:
                m.where = "ready"
            if m.where in ("ready", "delayed") and m.expires and m.expires <= now:
                m.where = "settling"
                self.ended.append((m.dot, Ended.EXPIRED))

    def give_back(self, m: Naive, now: int, delay: int = 0) -> None:
        most = self.max_deliveries[m.queue]
        if most is not None and m.attempt >= most:
            m.where = "settling"
            self.ended.append((m.dot, Ended.EXHAUSTED))
        else:
            m.where, m.due = ("delayed", now + delay) if delay else ("ready", m.due)
            self.expire(m, now)

    def expire(self, m: Naive, now: int) -> None:
        """Nothing is ready past its time, also not for the moment until the next tick."""
        if m.where == "ready" and m.expires and m.expires <= now:
            m.where = "settling"
            self.ended.append((m.dot, Ended.EXPIRED))

    def order(self, queue: str) -> list[Naive]:
        ready = [
            m
            for m in self.messages
            if m.queue == queue and m.where == "ready" and not self.blocked(m)
        ]
        return sorted(ready, key=lambda m: (-m.priority, m.dot))


SIZES = st.sampled_from([1, 1, 3, 20])
"""Messages of a run."""


class FakeShelf:
    """What a disk would know."""

    def __init__(self) -> None:
        self.cards: dict[int, Card] = {}

    def card(self, dot: int) -> Card | None:
        return self.cards.get(dot)

    def sizes(self, first: int, count: int) -> array[int]:
        cards = (self.cards.get(dot) for dot in range(first, first + count))
        return array("I", [card.body_bytes if card is not None else 0 for card in cards])


class DeliveryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000
        self.shelf = FakeShelf()
        self.sut = PartitionDelivery(3, self.shelf)
        self.model = Model()
        self.next_dot = 1
        self.receipts: list[tuple[int, Receipt]] = []
        self.deliveries: list[Spanned] = []
        self.lagging: dict[int, Card] = {}
        """Plain messages that the owner's own disk has yet to store."""

    def settle_endings(self) -> None:
        grants, endings = self.sut.drain()
        assert not grants
        found = [(e.entry.dot, e.reason) for e in endings]
        assert sorted(found) == sorted(self.model.ended)
        self.model.ended.clear()

    def pick(self, draw: st.DataObject) -> Naive:
        return draw.draw(st.sampled_from(self.model.messages))

    @rule()
    def the_own_disk_catches_up(self) -> None:
        held = {m.dot for m in self.model.messages}
        self.shelf.cards |= {dot: card for dot, card in self.lagging.items() if dot in held}
        self.lagging.clear()

    @rule(
        queue=st.sampled_from(QUEUES), messages=MESSAGES, memory_full=st.booleans(),
        on_disk=st.booleans(), sizes=st.lists(SIZES, min_size=5, max_size=5),
    )  # fmt: skip
    def put(
        self,
        queue: str,
        messages: list[tuple[int, str | None, int, int]],
        memory_full: bool,
        on_disk: bool,
        sizes: list[int],
    ) -> None:
        for (priority, group, delay, ttl), size in zip(messages, sizes, strict=False):
            first, self.next_dot = self.next_dot, self.next_dot + size
            meta = MessageMeta(
                queue,
                self.now,
                7,
                group=group,
                priority=priority,
                ready_at_ms=self.now + delay if delay else 0,
                expires_ms=self.now + ttl if ttl else 0,
            )
            if group is None and not delay and not ttl:
                cards = self.shelf.cards if on_disk else self.lagging
                for dot in range(first, self.next_dot):
                    cards[dot] = Card(queue, priority, 1, self.now)
            bodies = [b"%d" % (dot % 10) for dot in range(first, self.next_dot)]
            self.sut.put_run(first, meta, bodies, not memory_full, self.now)
            where = "delayed" if delay else "ready"
            for dot in range(first, self.next_dot):
                due = meta.ready_at_ms
                self.model.messages.append(
                    Naive(dot, queue, priority, group, due, meta.expires_ms, where, due)
                )

    @rule(
        queue=st.sampled_from(QUEUES),
        most=st.sampled_from([1, 2, 3, 17, 30]),
        visibility=st.sampled_from([5, 20]),
    )
    def take(self, queue: str, most: int, visibility: int) -> None:
        expected = []
        while len(expected) < most and (line := self.model.order(queue)):
            m = line[0]
            m.where, m.due = "leased", self.now + visibility
            m.attempt, m.number = m.attempt + 1, m.number + 1
            expected.append(m.dot)
        lots = self.sut.take(queue, most, visibility, self.now)
        taken = singly(lots)
        assert [e.dot for e in taken] == expected
        told = {m.dot: m.attempt for m in self.model.messages}
        assert all(e.seen == told[e.dot] for e in taken)
        assert all(e.body in (None, b"%d" % (e.dot % 10)) for e in taken)
        self.receipts += [(e.dot, Receipt(e.epoch, e.attempt)) for e in taken]
        self.deliveries.append(receipts_of(lots))

    @rule(queue=st.sampled_from(QUEUES), most=st.integers(1, 4))
    def browse(self, queue: str, most: int) -> None:
        expected = [m.dot for m in self.model.order(queue)][:most]
        assert [e.dot for e in self.sut.browse(queue, most)] == expected

    @rule(queue=st.sampled_from(QUEUES), most=st.sampled_from([3, 40]), late=st.booleans())
    def read_ahead(self, queue: str, most: int, late: bool) -> None:
        """Bodies of what waits on disk come into memory, or come too late."""
        head = self.sut.head(queue)
        if head is None:
            return
        priority, dot, _ = head
        line = [m.dot for m in self.model.order(queue) if m.priority == priority and m.dot >= dot]
        found: list[int] = []
        for first, last in self.sut.behind(queue, priority, dot - 1, most):
            found += range(first, last + 1)
            if self.sut.parcels.holding(first) is not None:
                continue
            meta = MessageMeta(queue, self.shelf.cards[first].enqueued_ms, 7, priority=priority)
            if late:
                self.take(queue, 17, 5)
            waits = all(self.sut.card(n) is not None for n in range(first, last + 1))
            filled = self.sut.fill(
                queue, first, meta, [b"%d" % (n % 10) for n in range(first, last + 1)]
            )
            assert waits
            assert filled or late
            if late:
                return
        assert found == [n for n in line if n in set(found)][:most]

    @rule(step=st.integers(1, 12))
    def pass_time(self, step: int) -> None:
        # One millisecond at a time, as the model knows no order within a longer stretch.
        for _ in range(step):
            self.now += 1
            self.model.tick(self.now)
            self.sut.tick(self.now)
        self.settle_endings()

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), delay=st.sampled_from([0, 7]))
    def nack(self, data: st.DataObject, delay: int) -> None:
        dot, receipt = data.draw(st.sampled_from(self.receipts))
        verdict = self.sut.nack(dot, receipt, delay, self.now)
        m = next((m for m in self.model.messages if m.dot == dot), None)
        if m is None:
            assert verdict is Verdict.UNKNOWN
        elif m.where == "settling":
            assert verdict is Verdict.SETTLING
        elif receipt.attempt < m.number:
            assert verdict is Verdict.OVERTAKEN
        else:
            assert verdict is Verdict.DONE
            if m.where == "leased":
                self.model.give_back(m, self.now, delay)
            elif m.where == "ready" and delay:
                m.where, m.due = "delayed", self.now + delay
        self.settle_endings()

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), more=st.sampled_from([3, 15]))
    def extend(self, data: st.DataObject, more: int) -> None:
        dot, receipt = data.draw(st.sampled_from(self.receipts))
        verdict = self.sut.extend(dot, receipt, more, self.now)
        m = next((m for m in self.model.messages if m.dot == dot), None)
        if m is None:
            assert verdict is Verdict.UNKNOWN
        elif m.where == "settling":
            assert verdict is Verdict.SETTLING
        elif receipt.attempt < m.number:
            assert verdict is Verdict.OVERTAKEN
        elif m.where == "delayed" or not m.attempt:
            assert verdict is Verdict.NOT_LEASED
        else:
            assert verdict is Verdict.DONE
            m.where, m.due = "leased", self.now + more

    @precondition(lambda self: self.model.messages)
    @rule(data=st.data())
    def settle_without_receipt(self, data: st.DataObject) -> None:
        m = self.pick(data)
        verdict = self.sut.settle(m.dot, None)
        assert verdict is (Verdict.SETTLING if m.where == "settling" else Verdict.DONE)
        m.acked = m.acked or m.where != "settling"
        m.where = "settling"

    def held(self, dot: int) -> Naive | None:
        return next((m for m in self.model.messages if m.dot == dot), None)

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), strict=st.booleans(), width=st.sampled_from([0, 1, 5, 19, 40]))
    def settle_span(self, data: st.DataObject, strict: bool, width: int) -> None:
        """An ack of neighbours, some of which may be anything, in whatever state."""
        first, receipt = data.draw(st.sampled_from(self.receipts))
        self.settled(first, first + width, receipt if strict else None)

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data())
    def settle_delivery(self, data: st.DataObject) -> None:
        """A whole delivery at once, as far as it is still that."""
        for first, last, receipt in data.draw(st.sampled_from(self.deliveries)):
            self.settled(first, last, receipt)

    def settled(self, first: int, last: int, receipt: Receipt | None) -> None:
        at = first
        text = str(receipt) if receipt is not None else None
        for low, high, verdict in self.sut.settle_span(first, last, text):
            assert low == at <= high
            at = high + 1
            for dot in range(low, high + 1):
                m = self.held(dot)
                if m is None:
                    assert verdict is Verdict.UNKNOWN
                elif m.where == "settling":
                    assert verdict is Verdict.SETTLING
                elif receipt is not None and receipt.attempt != m.number:
                    assert verdict is Verdict.OVERTAKEN
                else:
                    assert verdict is Verdict.DONE
                    m.where, m.acked = "settling", True
        assert at == last + 1

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data())
    def release_delivery(self, data: st.DataObject) -> None:
        """It never reached its consumer; some of it may have been settled meanwhile."""
        spans = data.draw(st.sampled_from(self.deliveries))
        self.sut.release_all(spans, self.now)
        for first, last, receipt in spans:
            for dot in range(first, last + 1):
                m = self.held(dot)
                if m is not None and m.where == "leased" and m.number == receipt.attempt:
                    m.where, m.attempt = "ready", m.attempt - 1
                    self.model.expire(m, self.now)
        self.settle_endings()

    @precondition(lambda self: any(m.acked for m in self.model.messages))
    @rule(data=st.data(), width=st.sampled_from([0, 3, 25]))
    def end_is_refused(self, data: st.DataObject, width: int) -> None:
        """Acks that were not stored, for certain: their messages stand where they stood."""
        acked = {m.dot: m for m in self.model.messages if m.acked and not (m.group or m.expires)}
        if not acked:
            return
        first = last = data.draw(st.sampled_from(sorted(acked)))
        while last + 1 in acked and last < first + width:
            last += 1
        self.sut.unsettle_all([(first, last)], self.now)
        for dot in range(first, last + 1):
            m = acked[dot]
            m.acked = False
            m.where = "leased" if m.number and m.due > self.now else "ready"
        self.settle_endings()

    @rule(by=st.sampled_from([1, 30]))
    def cluster_time_jumps(self, by: int) -> None:
        self.sut.postpone(by)
        for m in self.model.messages:
            if m.where in ("leased", "settling") and m.number:
                m.due += by

    @precondition(lambda self: any(m.where == "settling" for m in self.model.messages))
    @rule()
    def all_ends_are_stored(self) -> None:
        ended = [m.dot for m in self.model.messages if m.where == "settling"]
        self.sut.gone_all(joined((dot, dot) for dot in (*ended, self.next_dot)), self.now)
        self.model.messages = [m for m in self.model.messages if m.where != "settling"]
        self.settle_endings()

    @precondition(lambda self: any(m.where == "settling" for m in self.model.messages))
    @rule(data=st.data())
    def end_is_stored(self, data: st.DataObject) -> None:
        m = data.draw(st.sampled_from([m for m in self.model.messages if m.where == "settling"]))
        self.model.messages.remove(m)
        assert self.sut.gone(m.dot, self.now) is not None
        # A member behind the head may have expired while it waited; its turn shows it.
        self.settle_endings()

    @precondition(lambda self: any(m.where == "leased" for m in self.model.messages))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        m = data.draw(st.sampled_from([m for m in self.model.messages if m.where == "leased"]))
        assert self.sut.release(m.dot, Receipt(3, m.number), self.now) is Verdict.DONE
        m.where, m.attempt = "ready", m.attempt - 1
        if m.expires and m.expires <= self.now:
            m.where = "settling"
            self.model.ended.append((m.dot, Ended.EXPIRED))
        self.settle_endings()

    @rule(queue=st.sampled_from(QUEUES), most=st.sampled_from([None, 1, 2, 5]))
    def configure(self, queue: str, most: int | None) -> None:
        self.sut.configure(queue, Settings(max_deliveries=most, dead_letter="d"), self.now)
        self.model.max_deliveries[queue] = most

    @rule(queue=st.sampled_from(QUEUES), refused=st.booleans())
    def purge(self, queue: str, refused: bool) -> None:
        expected = [m for m in self.model.messages if m.queue == queue and m.where != "settling"]
        dots, waiting = self.sut.purge(queue)
        shelved = [pack_dot(*dot) for dot in waiting.all().dots()] if waiting is not None else []
        assert sorted(dots + shelved) == sorted(m.dot for m in expected)
        assert self.sut.counts(queue).ready == 0
        for m in expected:
            if m.dot not in shelved:
                m.where = "settling"
        if waiting is None:
            return
        assert all(self.sut.settle(dot, None) is Verdict.SETTLING for dot in shelved)
        if refused:
            self.sut.unpurge(waiting, self.now)
        else:
            self.sut.purged(waiting)
            self.model.messages = [m for m in self.model.messages if m.dot not in shelved]

    @invariant()
    def counts_agree(self) -> None:
        check(self.sut)
        for queue in QUEUES:
            counts = self.sut.counts(queue)
            mine = [m for m in self.model.messages if m.queue == queue]
            assert counts.bytes == len(mine)
            assert self.sut.length(queue) == len(mine)
            assert counts.in_flight == sum(m.where in ("leased", "settling") for m in mine)
            assert counts.oldest_ms is None or mine
        held = {e.dot for e in self.sut.entries.values() if e.state is not State.GONE}
        held |= {dot for lot in self.sut.lots for dot in range(lot.first, lot.last + 1)}
        held |= {dot for view in self.sut.views() for _, dot in view.backlog.dots()}
        assert self.sut.held == len(held)
        assert held == {m.dot for m in self.model.messages}


TestDelivery = DeliveryMachine.TestCase
TestDelivery.settings = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "80")),
    stateful_step_count=40,
    deadline=None,
    # Shrinking takes minutes, and a planted bug (teeth.toml) needs no small example.
    phases=[p for p in Phase if p is not Phase.shrink or "NO_SHRINK" not in os.environ],
    suppress_health_check=list(HealthCheck),
)
