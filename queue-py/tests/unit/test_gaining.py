"""A node whose offices come and go faster than it builds their delivery machines: the look across
steps in `Node.apply`. The replication is played by hand, the disk is real."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from message_queue import node as node_module
from message_queue.core.delivery.stored import MessageMeta, encode
from message_queue.core.messages import Ack, AppendRecord, LogRecord, PromiseRecord, SealRecord
from message_queue.core.operations import Answer, Consume, NewMessage, Produce
from message_queue.core.placement.ring import partition_of
from message_queue.core.replication.drafts import Accepted, Draft, RunDraft
from message_queue.core.replication.effects import Committed, Effects, Gained, Lost
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import last_seq, put_entry
from message_queue.hosting import Host
from message_queue.node import Node

sys.path.insert(0, str(Path(__file__).parent))
from lone_node import lone_node

QUEUE = "jobs"
P = partition_of(QUEUE)
EARLIER, FIRST, SECOND = 1025, 2048, 3072
"""Epochs: another node's, and two of this one, which stands at position 0."""


class Offices:
    """Says what the replication core would say, when the test wants it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.epochs: dict[int, int] = {}
        self.proposed: list[int] = []
        """The last seq of each batch."""

    def keep(self, *records: LogRecord) -> None:
        state = self.state(P)
        for record in records:
            state.apply(record)
        self.node.store.persist(0, list(records))

    def seal(self, epoch: int) -> None:
        view = msgspec.structs.replace(self.state(P).view(), sealed=epoch)
        self.keep(PromiseRecord(P, epoch, 1), SealRecord(P, epoch, 1, view))

    def elect(self, epoch: int) -> Effects:
        self.seal(epoch)
        self.epochs[P] = epoch
        return Effects(gained=[Gained(P, epoch, b"")])

    def oust(self) -> Effects:
        return Effects(lost=[Lost(P, self.epochs.pop(P), clean=False)])

    # what the node asks of it

    def state(self, partition: int) -> PartitionState:
        return self.node.store.states.setdefault(partition, PartitionState(partition))

    def owner(self, partition: int) -> int | None:
        return 0 if partition in self.epochs else None

    def may_serve(self, partition: int, _: int) -> bool:
        return partition in self.epochs

    def cluster_ms(self, now_ms: int) -> int:
        return now_ms

    def propose(self, partition: int, drafts: tuple[Draft, ...], _: int) -> Accepted:
        epoch = self.epochs[partition]
        first = self.state(partition).records.context.last(epoch) + 1
        (draft,) = drafts
        assert isinstance(draft, RunDraft)
        run = put_entry(first, draft.meta, draft.bodies)
        self.keep(AppendRecord(partition, epoch, (run,)))
        self.proposed.append(last_seq(run))
        return Accepted(epoch, first, Effects())


class NoPeers:
    """Nothing is said to anybody: what the core would have sent is not played."""

    together = staticmethod(nullcontext)


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with lone_node(tmp_path) as node:
        node.store.start()
        node.replicator = Offices(node)  # type: ignore[assignment]  # all that is asked of it here
        node.links = NoPeers()  # type: ignore[assignment]
        yield node
        for host in node.hosts.values():
            host.end(clean=False)
    assert not node.halted.done()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of all delivery machines that took up their work."""
    epochs: list[int] = []

    class Told(Host):
        def __init__(self, owner: Any, *others: Any) -> None:
            epochs.append(owner.epoch)
            super().__init__(owner, *others)

    monkeypatch.setattr(node_module, "Host", Told)
    return epochs


def offices(node: Node) -> Offices:
    assert isinstance(node.replicator, Offices)
    return node.replicator


async def at_rest(node: Node) -> None:
    """All that was begun has come to its end."""
    async with asyncio.timeout(20):
        while node._tasks:
            await asyncio.gather(*node._tasks)


def fill(node: Node, chunks: int) -> AppendRecord:
    """Messages of an earlier life, in several chunks: each is looked at in a step of its own. The
    record that the disk does not have yet."""
    meta = encode(MessageMeta(QUEUE, 0, 7))
    run = put_entry(1, meta, [b"0"] * (1024 * chunks - 1))
    offices(node).seal(EARLIER)
    record = AppendRecord(P, EARLIER, (run,))
    offices(node).state(P).apply(record)
    return record


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_an_office_that_ends_while_its_machine_is_built_gets_none(
    node: Node, made: list[int], chunks: int, turns: int
) -> None:
    if chunks:
        node.store.persist(0, [fill(node, chunks)])
        await node.store.flushed()
    elif turns:
        return  # nothing to look at: it is built in one turn
    node.apply(offices(node).elect(FIRST))
    for _ in range(turns):
        await asyncio.sleep(0)
    node.apply(offices(node).oust())
    await at_rest(node)
    assert (made, node.hosts) == ([], {})


@pytest.mark.parametrize("chunks", [0, 3])
async def test_who_is_elected_again_meanwhile_has_one_machine_and_it_is_the_new_offices(
    node: Node, made: list[int], chunks: int
) -> None:
    if chunks:
        node.store.persist(0, [fill(node, chunks)])
        await node.store.flushed()
    node.apply(offices(node).elect(FIRST))
    if chunks:
        await asyncio.sleep(0)
    node.apply(offices(node).oust())
    node.apply(offices(node).elect(SECOND))
    await at_rest(node)
    assert made == [SECOND]
    assert node.hosts[P].owner.epoch == SECOND


async def test_a_machine_that_waited_for_the_disk_does_not_replace_its_successor(
    node: Node, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one found records that the node's own disk did not have yet; its wait is long."""
    late = fill(node, 2)
    disk = asyncio.Event()
    waiting = asyncio.Event()
    flushed = node.store.flushed

    async def slow() -> None:
        waiting.set()
        await disk.wait()
        await flushed()

    monkeypatch.setattr(node.store, "flushed", slow)
    node.apply(offices(node).elect(FIRST))
    async with asyncio.timeout(20):
        await waiting.wait()
    monkeypatch.setattr(node.store, "flushed", flushed)
    node.store.persist(0, [late])
    await flushed()
    node.apply(offices(node).oust())
    node.apply(offices(node).elect(SECOND))
    async with asyncio.timeout(20):
        while P not in node.hosts:  # noqa: ASYNC110 - polls what has no event
            await asyncio.sleep(0)
    assert node.hosts[P].owner.delivery.held == 2047
    # All are acked in the meantime: what the first one still looks for is no damage.
    acked = AppendRecord(P, SECOND, (Ack(1, ((EARLIER, 1, 2047),)),))
    node.store.forget(P, offices(node).state(P).apply(acked))
    disk.set()
    await at_rest(node)
    assert made == [SECOND]
    assert not node.halted.done()


async def test_lost_and_gained_in_one_step_the_old_machine_ends_and_the_new_one_begins(
    node: Node, made: list[int]
) -> None:
    node.apply(offices(node).elect(FIRST))
    await at_rest(node)
    old = node.hosts[P]
    poll = asyncio.create_task(old.consume(Consume(QUEUE, 1, wait_ms=20_000)))
    produced = asyncio.create_task(old.perform(Produce(QUEUE, (NewMessage(b"1"),))))
    while not offices(node).proposed:  # noqa: ASYNC110 - polls what has no event
        await asyncio.sleep(0)
    over, begun = offices(node).oust(), offices(node).elect(SECOND)
    node.apply(Effects(lost=over.lost, gained=begun.gained))
    answer = await produced
    assert isinstance(answer, Answer)
    assert answer.status == 503
    assert await poll is None, "ask elsewhere"
    await at_rest(node)
    assert made == [FIRST, SECOND]
    assert old.ended
    assert node.hosts[P].owner.epoch == SECOND
    # What comes late about the first office is none of the second one's business.
    waits = asyncio.create_task(node.hosts[P].perform(Produce(QUEUE, (NewMessage(b"2"),))))
    while len(offices(node).proposed) < 2:  # noqa: ASYNC110 - polls what has no event
        await asyncio.sleep(0)
    node.apply(Effects(committed=[Committed(P, FIRST, 99)], lost=[Lost(P, FIRST, clean=False)]))
    await asyncio.sleep(0)
    assert not waits.done()
    assert node.hosts[P].owner.epoch == SECOND
    node.apply(Effects(committed=[Committed(P, SECOND, offices(node).proposed[-1])]))
    stored = await waits
    assert isinstance(stored, Answer)
    assert stored.status == 201
