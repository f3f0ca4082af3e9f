"""What was leased, with its bodies: from memory, or read back where they are only on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from itertools import accumulate, groupby, islice
from typing import Any

import msgspec

from message_queue.api.rendering import Slice, slice_of
from message_queue.core.delivery.lots import Lot, Taken
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.delivery.stored import MessageMeta, complete, decode
from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import Spans
from message_queue.memory import MessageMemory
from message_queue.storage.store import Store

log = logging.getLogger(__name__)

AHEAD = 8192
"""Messages of a queue that lies on disk whose bodies may be in memory before their turn."""
AHEAD_BYTES = 4 << 20
AT_ONCE = 1024
"""Messages of one fetch: some milliseconds of the loop's time."""
MAX_QUEUES = 1000
_CHUNK_LOW = 1023
Read = dict[int, tuple[bytes, bytes]]
"""dot -> (meta, body)"""
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Reader:
    """Of one partition that this node owns. `report_damage`: stored records are unreadable."""

    def __init__(
        self, owner: PartitionOwner, store: Store, report_damage: Callable[[int, Spans], None]
    ) -> None:
        self.at_hand = True
        """What was asked for last had all its bodies in memory."""
        self.owner = owner
        self._store = store
        self._report_damage = report_damage

    def slices_now(self, taken: Sequence[Taken]) -> list[Slice] | None:
        """What was leased, ready to be rendered. None: some of it is on disk."""
        slices: list[Slice] = []
        for its in taken:
            if isinstance(its, Lot):
                meta, bodies = its.meta, its.bodies
                if meta is None or bodies is None:
                    self.at_hand = False
                    return None
                slices.append(
                    Slice(
                        its.first, its.queue, its.epoch, 1, 1, meta.wall_ms, meta.headers,
                        meta.origin, bodies,
                    )
                )  # fmt: skip
            elif its.body is None:
                self.at_hand = False
                return None
            else:
                slices.append(slice_of(its, its.body))
        self.at_hand = True
        return slices

    async def slices(self, taken: Sequence[Taken]) -> list[Slice] | None:
        """The same, with what is on disk. None: one is unreadable here, now or for good (then the
        replication was told)."""
        slices = self.slices_now(taken)
        if slices is not None:
            return slices
        read = await self._read(taken)
        if read is None:
            return None
        slices = []
        for its in taken:
            if isinstance(its, Entry):
                body = its.body
                if body is None:
                    meta, body = read[its.dot]
                    complete(its, meta)
                slices.append(slice_of(its, body))
            elif its.bodies is None:
                slices += _of_lot(its, read)
            else:
                slices += self.slices_now([its]) or []
        self.at_hand = False
        return slices

    async def bodies(self, entries: Sequence[Entry]) -> list[bytes] | None:
        """Of entries. None: as `slices`."""
        slices = await self.slices(entries)
        return [its.bodies[0] for its in slices] if slices is not None else None

    async def _read(self, taken: Sequence[Taken]) -> Read | None:
        wanted: list[int] = []
        for its in taken:
            if isinstance(its, Lot):
                if its.bodies is None:
                    wanted += range(its.first, its.first + its.count)
            elif its.body is None:
                wanted.append(its.dot)
        # Whose turn is next is read in the same breath: one read of many costs little more.
        delivery = self.owner.delivery
        ahead = {entry.dot: entry for entry in delivery.ahead(taken[0].queue)}
        needed = set(wanted)
        read = await self.read(needed.union(ahead))
        for dot in ahead.keys() & read.keys():
            meta, body = read[dot]
            complete(ahead[dot], meta)
            delivery.attach(ahead[dot], body)
        return read if needed.issubset(read) else None

    async def read(self, wanted: Collection[int]) -> Read:
        """What is on disk of these dots. What turns out unreadable is reported."""
        dots = [unpack_dot(dot) for dot in wanted]
        store, partition = self._store, self.owner.partition
        try:
            found, damaged = await store.read(partition, dots)
            if len(found) + len(damaged) < len(dots):
                # Committed by the others before this node's own disk had it.
                await store.flushed()
                found, damaged = await store.read(partition, dots)
        except OSError as e:
            log.error("cannot read the log: %s", e)
            return {}
        if damaged:
            self._report_damage(partition, tuple((e, s, s) for e, s in damaged))
        return {pack_dot(epoch, seq): (meta, body) for epoch, seq, meta, body in found}


class ReadAhead:
    """Fetches the bodies of what waits behind the head of a backlog before their turn comes, some
    hundreds at a time: so consumers of a queue that lies on disk are served from memory.

    Where memory is short nothing is fetched: then each delivery reads its own.
    """

    def __init__(self, reader: Reader, memory: MessageMemory, spawn: Spawn) -> None:
        self._reader = reader
        self._memory = memory
        self._spawn = spawn
        self._upto: dict[tuple[str, int], int] = {}
        """(queue, priority) -> the dot up to which everything was fetched, or is here anyway."""
        self._idle = asyncio.Event()
        """Nothing is being fetched."""
        self._idle.set()

    async def wait(self, queue: str) -> None:
        """Until what is next in this queue is in memory, as far as that is to be had."""
        self.soon(queue)
        await self._idle.wait()

    def soon(self, queue: str) -> None:
        """Somebody consumes this queue. Cheap where there is nothing to do."""
        delivery = self._reader.owner.delivery
        if not self._idle.is_set() or not self._memory.keep_bodies or delivery.shelf is None:
            return
        head = delivery.head(queue)
        if head is None:
            return
        priority, dot, mean_bytes = head
        window = min(AHEAD, AHEAD_BYTES // max(1, mean_bytes))
        upto = max(self._upto.get((queue, priority), 0), dot - 1)
        # Dots for messages: acks lie between them, which makes the window a little narrower.
        if upto - dot > window // 2 or window < 2:
            return
        wanted: list[int] = []
        size = 0
        for first, last in delivery.behind(queue, priority, upto, min(AT_ONCE, window // 2)):
            if delivery.parcels.holding(first) is None:
                sizes = accumulate(delivery.shelf.sizes(first, last - first + 1), initial=size)
                # As many as fit, whatever the others' mean is; the first one in any case.
                count = sum([before < AHEAD_BYTES for before in islice(sizes, last - first + 1)])
                wanted += range(first, first + count)
                size += sum(delivery.shelf.sizes(first, count)) if count else 0
                if count < last - first + 1:
                    upto = first + count - 1
                    break
            upto = last
        if len(self._upto) >= MAX_QUEUES:
            self._upto.clear()
        self._upto[queue, priority] = upto
        if wanted:
            self._idle.clear()
            self._spawn(self._fetch(queue, wanted))

    async def _fetch(self, queue: str, wanted: list[int]) -> None:
        try:
            self._fill(queue, await self._reader.read(wanted))
        finally:
            self._idle.set()

    def _fill(self, queue: str, read: Read) -> None:
        delivery = self._reader.owner.delivery
        first, raw, bodies = 0, b"", list[bytes]()
        for dot in [*sorted(read), 0]:
            meta, body = read.get(dot, (b"", b""))
            if not bodies or dot != first + len(bodies) or meta != raw or not dot & _CHUNK_LOW:
                if bodies:
                    delivery.fill(queue, first, _meta(raw), bodies)
                first, raw, bodies = dot, meta, []
            bodies.append(body)
        self._reader.at_hand = True


def _of_lot(lot: Lot, read: Read) -> list[Slice]:
    """Those that were stored together share a meta."""
    slices: list[Slice] = []
    first = lot.first
    of_each = (read[dot] for dot in range(first, first + lot.count))
    for raw, group in groupby(of_each, lambda its: its[0]):
        bodies = [body for _, body in group]
        meta = _meta(raw)
        slices.append(
            Slice(
                first, lot.queue, lot.epoch, 1, 1, meta.wall_ms, meta.headers, meta.origin, bodies
            )
        )  # fmt: skip
        first += len(bodies)
    return slices


def _meta(raw: bytes) -> MessageMeta:
    """Raises msgspec.MsgspecError."""
    meta = decode(raw)
    if not isinstance(meta, MessageMeta):
        raise msgspec.ValidationError("a mark among messages")
    return meta
