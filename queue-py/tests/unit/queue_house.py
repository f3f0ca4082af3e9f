"""A partition at its owner with a real disk and a replication that is always of its opinion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from message_queue.core.delivery.owner import NOTE_KEY, SETTINGS_KEY, PartitionOwner
from message_queue.core.ids import parse_id, unpack_dot
from message_queue.core.messages import (
    Ack,
    AppendRecord,
    Entry,
    PromiseRecord,
    Put,
    SealRecord,
    Set,
    Spans,
)
from message_queue.core.operations import (
    Answer,
    Configure,
    Consume,
    Nack,
    NewMessage,
    Operation,
    Produce,
    Purge,
    Redrive,
    refusal,
)
from message_queue.core.placement.ring import partition_of
from message_queue.core.replication.drafts import (
    AckDraft,
    Draft,
    PutDraft,
    RunDraft,
    SetDraft,
    seqs,
)
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import last_seq, put_entry
from message_queue.hosting import Host
from message_queue.memory import MessageMemory
from message_queue.metrics import Metrics
from message_queue.storage.log import Fsync
from message_queue.storage.store import Store


class House:
    """A node without peers: what is on its disk is committed."""

    def __init__(self) -> None:
        self.store: Store
        self.hosts: dict[int, Host] = {}
        self.memory = MessageMemory(1 << 27)
        self.now_ms = 1_000
        self.epoch = 65
        self.refuse: Callable[[Operation], Answer | None] = lambda _: None
        self.tasks: set[asyncio.Task[None]] = set()
        self.batch = 0
        self.waiting: dict[int, tuple[Host, int]] = {}

    @classmethod
    @asynccontextmanager
    async def opened(cls, directory: Path) -> AsyncIterator[House]:
        """One to use; at its end all stops, and nothing may have failed in the background."""
        house = cls()
        await house.open(directory)
        yield house
        house.crash()
        for task in house.tasks:
            task.cancel()
        failures = await asyncio.gather(*house.tasks, return_exceptions=True)
        await house.store.close()
        assert not [f for f in failures if isinstance(f, Exception)]

    async def open(self, directory: Path) -> None:
        self.store = await Store.open(
            directory, segment_bytes=1 << 20, fsync=Fsync.NEVER, on_durable=self.durable,
            on_halt=pytest.fail, on_trouble=lambda _: None,
        )  # fmt: skip

    async def host(self, queue: str) -> Host:
        """The owner of a queue's partition, made as `Node._gained` makes it."""
        partition = partition_of(queue)
        if partition in self.hosts:
            return self.hosts[partition]
        state = self.store.states.setdefault(partition, PartitionState(partition))
        view = state.view()
        epoch = self.epoch
        seal = SealRecord(partition, epoch, 1, msgspec.structs.replace(view, sealed=epoch))
        for record in (PromiseRecord(partition, epoch, 1), seal):
            state.apply(record)
            self.store.persist(0, [record])
        await self.store.flushed()
        shelf = self.store.shelf(partition)
        context = state.records.context
        owner = PartitionOwner(partition, epoch, lambda dot: context.has(*unpack_dot(dot)), shelf)
        settings = {k: s.value for k, s in state.records.settings.items()}
        queues = {k: v for k, v in settings.items() if k.startswith(SETTINGS_KEY)}
        assert not owner.restore_settings(queues, self.now_ms)
        for chunk in state.held.numbered():
            part = shelf.part(*chunk)
            assert not part.missing
            assert not owner.restore_part(part, self.now_ms)
        owner.restore_leases(b"", self.now_ms)
        host = self.hosts[partition] = Host(owner, self.store, self, Metrics())
        host.mover.resume({k: v for k, v in settings.items() if k.startswith(NOTE_KEY)})
        host.after()
        return host

    def crash(self) -> None:
        """Every ownership ends without a word."""
        for host in self.hosts.values():
            host.end(clean=False)
        self.hosts.clear()
        self.waiting.clear()
        self.epoch += 64

    # what a host asks of the node

    def cluster_ms(self) -> int:
        return self.now_ms

    def wall_ms(self) -> int:
        return 7

    def may_serve(self, partition: int) -> bool:
        return partition in self.hosts

    def time_matters(self, host: Host) -> None:
        pass

    def report_damage(self, partition: int, lost: Spans) -> None:
        pytest.fail(f"partition {partition} lacks {lost}")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)

    async def ask(self, operation: Operation) -> Answer:
        refused = self.refuse(operation)
        if refused is not None:
            return refused
        assert isinstance(operation, Produce | Redrive | Configure | Purge | Consume)
        answer = await (await self.host(operation.queue)).perform(operation)
        return answer if answer is not None else refusal(503, "moved")

    def flush_soon(self, host: Host) -> None:
        if not host.flushing:
            host.flushing = True
            asyncio.get_running_loop().call_soon(self.flush, host)

    def flush(self, host: Host) -> None:
        host.flushing = False
        drafts, gathered = host.owner.gather(1 << 22)
        if host.ended:
            return
        state = self.store.states[host.partition]
        first = state.records.context.last(host.owner.epoch) + 1
        entries = stamped(drafts, first)
        if entries:
            record = AppendRecord(host.partition, host.owner.epoch, entries)
            gone = state.apply(record)
            self.batch += 1
            self.waiting[self.batch] = host, last_seq(entries[-1])
            self.store.persist(self.batch, [record])
            self.store.forget(host.partition, gone)
        host.owner.proposed(gathered, first if entries else 0, self.now_ms)
        host.after()

    def durable(self, batch: int) -> None:
        for number in sorted(n for n in self.waiting if n <= batch):
            host, upto = self.waiting.pop(number)
            if not host.ended:
                host.committed(upto, self.now_ms)


def stamped(drafts: Sequence[Draft], seq: int) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for draft in drafts:
        match draft:
            case PutDraft(meta, body):
                entries.append(Put(seq, meta, body))
            case RunDraft(meta, bodies):
                entries.append(put_entry(seq, meta, bodies))
            case AckDraft(targets):
                entries.append(Ack(seq, targets))
            case SetDraft(key, value):
                entries.append(Set(seq, key, value))
        seq += seqs(draft)
    return tuple(entries)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - polls what has no event
            await asyncio.sleep(0.005)


async def fill(house: House, queue: str, count: int, **fields: Any) -> list[str]:
    messages = tuple(NewMessage(b"%d" % n, b'{"n":%d}' % n, **fields) for n in range(count))
    answer = await house.ask(Produce(queue, messages, batch=True))
    assert answer.status == 201, answer
    ids: list[str] = msgspec.json.decode(answer.body)["ids"]
    return ids


async def consume(house: House, queue: str, most: int) -> list[dict[str, Any]]:
    answer = await house.ask(Consume(queue, most, batch=True))
    found: list[dict[str, Any]] = (
        msgspec.json.decode(answer.body)["messages"] if answer.body else []
    )
    return found


async def exhaust(house: House, queue: str, count: int) -> None:
    """Deliver once, give back: with one delivery allowed, they are dead letters."""
    await house.ask(Configure(queue, b'{"max_deliveries":1}'))
    host = await house.host(queue)
    for message in await consume(house, queue, count):
        name = parse_id(message["id"])
        assert name is not None
        answer = await host.perform(Nack(name.partition, name.dot))
        assert answer is not None
        assert answer.status == 200


def length(house: House, queue: str) -> int:
    host = house.hosts.get(partition_of(queue))
    return host.owner.delivery.length(queue) if host is not None else 0
