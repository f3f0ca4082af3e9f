"""What was leased, with its bodies: from memory, or read back where they are only on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

import msgspec

from message_queue.api.rendering import Slice, slice_of
from message_queue.core.delivery.lots import Lot, Taken
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.delivery.stored import MessageMeta, complete, decode
from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import Spans
from message_queue.storage.store import Store

log = logging.getLogger(__name__)

Read = dict[int, tuple[bytes, bytes]]
"""dot -> (meta, body)"""


class Reader:
    """Of one partition that this node owns. `report_damage`: stored records are unreadable."""

    def __init__(
        self, owner: PartitionOwner, store: Store, report_damage: Callable[[int, Spans], None]
    ) -> None:
        self.at_hand = True
        """What was asked for last had all its bodies in memory."""
        self._owner = owner
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
        delivery = self._owner.delivery
        ahead = {entry.dot: entry for entry in delivery.ahead(taken[0].queue)}
        needed = set(wanted)
        dots = [unpack_dot(dot) for dot in needed.union(ahead)]
        store, partition = self._store, self._owner.partition
        try:
            found, damaged = await store.read(partition, dots)
            if len(found) + len(damaged) < len(dots):
                # Committed by the others before this node's own disk had it.
                await store.flushed()
                found, damaged = await store.read(partition, dots)
        except OSError as e:
            log.error("cannot read the log: %s", e)
            return None
        if damaged:
            self._report_damage(partition, tuple((e, s, s) for e, s in damaged))
        read: Read = {}
        for epoch, seq, meta, body in found:
            dot = pack_dot(epoch, seq)
            read[dot] = meta, body
            if dot in ahead:
                complete(ahead[dot], meta)
                delivery.attach(ahead[dot], body)
        return read if needed.issubset(read) else None


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
