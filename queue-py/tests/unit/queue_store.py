"""A store without a node, for tests: records in, bodies out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from message_queue.core.delivery import stored
from message_queue.core.messages import (
    Ack,
    AppendRecord,
    LogRecord,
    Put,
    SealRecord,
    View,
)
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import put_entry
from message_queue.storage.log import Fsync
from message_queue.storage.store import Store

EPOCH = 65


class StoreBench:
    """A store, driven as the node does: the state first, then the log."""

    def __init__(self, directory: Path, segment_bytes: int = 4096) -> None:
        self.directory = directory
        self.segment_bytes = segment_bytes
        self.durable = 0
        self.batch = 0
        self.store: Store

    async def open(self) -> StoreBench:
        self.store = await Store.open(
            self.directory,
            segment_bytes=self.segment_bytes,
            fsync=Fsync.NEVER,
            on_durable=self.on_durable,
            on_halt=pytest.fail,
            on_trouble=lambda _: None,
        )
        self.durable = self.batch = 0
        return self

    def on_durable(self, batch: int) -> None:
        self.durable = batch

    def persist(self, *records: LogRecord) -> None:
        for record in records:
            partition = record.partition  # type: ignore[union-attr]  # no clock records here
            state = self.store.states.setdefault(partition, PartitionState(partition))
            self.store.forget(partition, state.apply(record))
        self.batch += 1
        self.store.persist(self.batch, records)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - polls what has no event
                await asyncio.sleep(0.005)

    async def settled(self) -> None:
        await self.until(lambda: self.durable == self.batch)

    async def bodies(self, partition: int) -> dict[int, bytes]:
        state = self.store.states[partition]
        dots = list(state.held.dots())
        found, damaged = await self.store.read(partition, dots)
        assert not damaged
        assert len(found) == len(dots)
        return {seq: body for _, seq, _, body in found}


def seal(partition: int) -> SealRecord:
    return SealRecord(partition, EPOCH, 1, View(EPOCH, 7, (), (), ()))


def puts(partition: int, first: int, count: int, size: int = 100) -> AppendRecord:
    entries = tuple(
        Put(seq, b"meta %d" % seq, b"%d " % seq + b"b" * size)
        for seq in range(first, first + count)
    )
    return AppendRecord(partition, EPOCH, entries)


def ack(partition: int, seq: int, *targets: int) -> AppendRecord:
    return AppendRecord(partition, EPOCH, (Ack(seq, tuple((EPOCH, t, t) for t in targets)),))


def plain_puts(
    partition: int, first: int, count: int, queue: str = "q", size: int = 0
) -> AppendRecord:
    """Messages as the owner stores them, each in want of nothing."""
    meta = stored.encode(stored.MessageMeta(queue, 1_000 + first, 7, b'{"a":1}'))
    run = put_entry(
        first, meta, [b'"%d%b"' % (seq, b"x" * size) for seq in range(first, first + count)]
    )
    return AppendRecord(partition, EPOCH, (run,))
