"""The node's durable store: records in, bodies out.

Persist in the order of the core's effects; `on_durable(batch)` says up to which batch everything
is on disk. Bodies are found again by their dots. What is needed no more is given back by
compaction, in the background and bounded: a round writes a checkpoint of every partition (which
makes all records before it redundant), then deletes closed segments without needed bodies and
rewrites those that are mostly unneeded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from aiofiles.os import wrap

from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import (
    AppendRecord,
    ClockRecord,
    Copy,
    CopyRecord,
    LogRecord,
    Spans,
)
from message_queue.core.replication.state import PartitionState
from message_queue.storage import files
from message_queue.storage.framing import Frame, scan
from message_queue.storage.index import Place
from message_queue.storage.log import (
    Durable,
    Fsync,
    SegmentLog,
    Trouble,
    segment_of,
    segment_path,
    span_of,
)
from message_queue.storage.records import Moved, UnreadableRecord, decode, encode
from message_queue.storage.recovery import Recovered, puts_in, recover

log = logging.getLogger(__name__)

COMPACT_CHECK_S = 1.0
_REWRITE_BELOW = 0.5
"""A segment is rewritten when less than this share of its puts is still needed."""
_MOVE_BYTES = 512 * 1024
_MANY_SEGMENTS = 32
_FRUITLESS_PAUSE_S = 30.0
_CACHED_BYTES = 8 << 20

Body = tuple[int, int, bytes, bytes]
"""(epoch, seq, meta, body)"""


_Puts = dict[tuple[int, int], tuple[bytes, bytes]]
"""(partition, dot) -> (meta, body) of a frame."""


class _FrameCache:
    """Frames read lately: a frame may hold a thousand messages that are asked for one by one."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._frames: OrderedDict[int, _Puts] = OrderedDict()

    def get(self, locator: int) -> _Puts | None:
        """A frame, if it is here."""
        return self._frames.get(locator)

    def add(self, locator: int, puts: _Puts) -> None:
        """The oldest ones make room (never the newest)."""
        if locator not in self._frames:
            self._frames[locator] = puts
            self._bytes += span_of(locator)[1]
        while self._bytes > self._most_bytes and len(self._frames) > 1:
            oldest, _ = self._frames.popitem(last=False)
            self._bytes -= span_of(oldest)[1]


class _Ticket(NamedTuple):
    """What the log gives back for a record."""

    batch: int
    """To be reported to `on_durable`; 0: not the last of its batch."""
    record: LogRecord | Moved | None = None
    waiting: asyncio.Future[None] | None = None


class Store:
    """Open with `Store.open`, then `start`; everything runs on one event loop."""

    def __init__(
        self,
        directory: Path,
        recovered: Recovered,
        *,
        segment_bytes: int,
        fsync: Fsync,
        on_durable: Callable[[int], None],
        on_halt: Callable[[str], None],
        on_trouble: Callable[[Trouble | None], None],
    ) -> None:
        self.directory = directory
        self.recovered = recovered
        self.states = recovered.states
        """Kept by reference: after start the replication core is their only writer."""
        self._index = recovered.index
        self._totals = recovered.totals
        self._clock_ms = recovered.clock_ms
        self._on_durable = on_durable
        self._quarantine = set(recovered.damaged)
        self._log: SegmentLog[_Ticket] = SegmentLog(
            directory,
            segment_bytes=segment_bytes,
            fsync=fsync,
            on_durable=self._written,
            on_halt=on_halt,
            on_trouble=on_trouble,
        )
        self._frames = _FrameCache(_CACHED_BYTES)
        self._compactor: asyncio.Task[None] | None = None
        self.compactions = 0

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        segment_bytes: int,
        fsync: Fsync,
        on_durable: Callable[[int], None],
        on_halt: Callable[[str], None],
        on_trouble: Callable[[Trouble | None], None],
    ) -> Store:
        """Recover what `directory` holds (made if absent). Raises OSError."""
        await wrap(Path.mkdir)(directory, parents=True, exist_ok=True)
        recovered = await asyncio.to_thread(recover, directory)
        store = cls(
            directory,
            recovered,
            segment_bytes=segment_bytes,
            fsync=fsync,
            on_durable=on_durable,
            on_halt=on_halt,
            on_trouble=on_trouble,
        )
        await store._log.start(recovered.sizes)
        for record in recovered.withdrawn:
            store._log.append(encode(record), _Ticket(0, record))
        return store

    def start(self) -> None:
        """Begin to compact. Call when `states` is in the replication core's hands."""
        self._compactor = asyncio.create_task(self._compact_loop(), name="compactor")

    async def close(self) -> None:
        """Write what waits, then close the files."""
        if self._compactor is not None:
            self._compactor.cancel()
            with suppress(asyncio.CancelledError):
                await self._compactor
        await self._log.close()

    # ── records ─────────────────────────────────────────────────────────────────────────────────

    def persist(self, batch: int, records: Sequence[LogRecord]) -> None:
        """Hand records to the log; `on_durable(batch)` follows when they and all before them are
        on disk."""
        last = len(records) - 1
        for number, record in enumerate(records):
            self._log.append(encode(record), _Ticket(batch if number == last else 0, record))

    def _written(self, written: list[Durable[_Ticket]]) -> None:
        newest = 0
        for item in written:
            batch, record, waiting = item.token
            if batch:
                newest = batch
            if isinstance(record, AppendRecord | CopyRecord | Moved):
                self._place(item.locator, record)
            elif isinstance(record, ClockRecord):
                self._clock_ms = record.cluster_ms
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
        if newest:
            self._on_durable(newest)

    def _place(self, locator: int, record: AppendRecord | CopyRecord | Moved) -> None:
        state = self.states.get(record.partition)
        segment = segment_of(locator)
        count = 0
        for partition, dot, meta, body in puts_in(record):
            count += 1
            # It may have been acked (or voided) while it was being written.
            if state is not None and state.has_body(*unpack_dot(dot)):
                self._index.put(partition, dot, Place(locator, meta, len(body)))
        if count:
            self._totals[segment] = self._totals.get(segment, 0) + count

    def forget(self, partition: int, spans: Spans) -> None:
        """These puts are needed no more."""
        self._index.drop_spans(partition, spans)

    # ── bodies ──────────────────────────────────────────────────────────────────────────────────

    def place(self, partition: int, epoch: int, seq: int) -> Place | None:
        """Meta and size of a stored put; None while it is only in memory, or not held."""
        return self._index.get(partition, pack_dot(epoch, seq))

    async def read(
        self, partition: int, dots: Sequence[tuple[int, int]]
    ) -> tuple[list[Body], list[tuple[int, int]]]:
        """Bodies of the dots, and the dots whose record is damaged. Dots that this node does not
        have are in neither. Raises OSError when the disk cannot be read just now."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for epoch, seq in dots:
            place = self._index.get(partition, pack_dot(epoch, seq))
            if place is not None:
                wanted.setdefault(place.locator, []).append((epoch, seq))
        frames = {locator: self._frames.get(locator) for locator in wanted}
        frames |= await self._fetch([locator for locator, puts in frames.items() if puts is None])
        found: list[Body] = []
        damaged: list[tuple[int, int]] = []
        moved: list[tuple[int, int]] = []
        for locator, its_dots in wanted.items():
            bodies = frames[locator]
            if bodies is not None:
                for epoch, seq in its_dots:
                    meta, body = bodies[partition, pack_dot(epoch, seq)]
                    found.append((epoch, seq, meta, body))
                continue
            for dot in its_dots:
                place = self._index.get(partition, pack_dot(*dot))
                if place is not None:
                    # Compaction may have moved it between the look-up and the read.
                    (damaged if place.locator == locator else moved).append(dot)
        if moved:
            more, worse = await self.read(partition, moved)
            return found + more, damaged + worse
        return found, damaged

    async def _fetch(self, locators: list[int]) -> dict[int, _Puts | None]:
        """Frames from disk (and into the cache); None: unreadable, or its segment is gone."""
        if not locators:
            return {}
        payloads = await self._log.read(locators)
        frames: dict[int, _Puts | None] = {}
        for locator in locators:
            frames[locator] = None
            payload = payloads.get(locator)
            if payload is None:
                continue
            with suppress(UnreadableRecord):
                puts = {(p, dot): (m, b) for p, dot, m, b in puts_in(decode(payload))}
                frames[locator] = puts
                self._frames.add(locator, puts)
        return frames

    async def flushed(self) -> None:
        """Return when everything handed over so far is durable (and indexed)."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log.append(encode(ClockRecord(self._clock_ms)), _Ticket(0, waiting=done))
        await done

    # ── figures ─────────────────────────────────────────────────────────────────────────────────

    @property
    def trouble(self) -> Trouble | None:
        """Why new messages must be refused, if they must."""
        return self._log.trouble

    @property
    def queued_bytes(self) -> int:
        """Bytes handed over and not yet durable."""
        return self._log.queued_bytes

    def figures(self) -> dict[str, int]:
        """For /status and /metrics."""
        return {
            "segments": len(self._log.sizes),
            "log_bytes": sum(self._log.sizes.values()),
            "stored_records": self._index.count(),
            "syncs": self._log.syncs,
            "compactions": self.compactions,
        }

    # ── compaction ──────────────────────────────────────────────────────────────────────────────

    async def _compact_loop(self) -> None:
        pause_s = COMPACT_CHECK_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = COMPACT_CHECK_S
            if not (self._quarantine or self._worth_it()):
                continue
            before = sum(self._log.sizes.values())
            try:
                await self.compact()
            except OSError as failure:
                log.warning("compaction put off: %s", failure)
            fruitless = sum(self._log.sizes.values()) > 0.9 * before
            if fruitless and self.trouble is None:
                # It gained next to nothing (a limit on file sizes keeps segments small, say).
                pause_s = _FRUITLESS_PAUSE_S

    def _shares(self) -> dict[int, float]:
        """Closed segment -> share of its puts that is still needed."""
        return {
            segment: self._index.live.get(segment, 0) / max(1, self._totals.get(segment, 0))
            for segment in self._log.sizes
            if segment != self._log.segment
        }

    def _worth_it(self) -> bool:
        shares = self._shares()
        needed = sum(self._log.sizes[s] * share for s, share in shares.items())
        total = sum(self._log.sizes[s] for s in shares)
        # At most half of a large log is waste; restarts leave small segments, which add up too.
        many = len(shares) > _MANY_SEGMENTS + 4 * needed // self._log.segment_bytes
        wasted = total - needed
        if self.trouble is not None:
            return wasted > total / 10
        return many or wasted > max(self._log.segment_bytes, needed)

    async def compact(self) -> None:
        """One round: checkpoint everything, then delete and rewrite closed segments. May be
        cancelled at any point: a segment goes only when all that is needed of it is durable."""
        closed = [s for s in self._log.sizes if s != self._log.segment]
        quarantined = self._quarantine & set(closed)
        for state in list(self.states.values()):
            # Same step: the checkpoint stands in the log exactly where the state is.
            self._log.append(encode(state.checkpoint()), _Ticket(0))
            await asyncio.sleep(0)
        await self._barrier([ClockRecord(self._clock_ms)] if self._clock_ms else [])
        for segment in closed:
            live = self._index.live.get(segment, 0)
            share = live / max(1, self._totals.get(segment, 0))
            small = self._log.sizes[segment] * 2 < self._log.segment_bytes
            wanted = live and (share < _REWRITE_BELOW or small or segment in quarantined)
            # On a full disk, copies would take the room that acks need.
            if wanted and await self._log.has_room(int(self._log.sizes[segment] * share)):
                await self._rewrite(segment)
            if not self._index.live.get(segment):
                await self._remove(segment, keep=segment in quarantined)
        self.compactions += 1

    async def _barrier(self, records: Sequence[LogRecord | Moved]) -> None:
        """Return when `records` and everything before them are durable."""
        for record in records:
            self._log.append(encode(record), _Ticket(0, record))
        await self.flushed()

    async def _rewrite(self, segment: int) -> None:
        """Copy the needed puts of a closed segment to the log's head."""
        data = await self._log.read_segment(segment)
        for partition, copies in self._needed_of(segment, data):
            await self._barrier([Moved(partition, copies)])

    def _needed_of(self, segment: int, data: bytes) -> Iterator[tuple[int, tuple[Copy, ...]]]:
        gathered: dict[int, list[Copy]] = {}
        size = 0
        for item in scan(data):
            if not isinstance(item, Frame):
                continue
            try:
                record = decode(item.payload)
            except UnreadableRecord:
                continue  # reported at start-up; what it held was withdrawn
            for partition, dot, meta, body in puts_in(record):
                place = self._index.get(partition, dot)
                if place is not None and segment_of(place.locator) == segment:
                    gathered.setdefault(partition, []).append(Copy(*unpack_dot(dot), meta, body))
                    size += len(meta) + len(body)
            if size > _MOVE_BYTES:
                for partition, copies in gathered.items():
                    yield partition, tuple(copies)
                gathered, size = {}, 0
        for partition, copies in gathered.items():
            yield partition, tuple(copies)

    async def _remove(self, segment: int, keep: bool) -> None:
        if keep:
            await wrap(_set_aside)(self.directory, segment)
            self._quarantine.discard(segment)
            log.warning("segment %d went to quarantine/: it has damaged records", segment)
        await self._log.delete(segment)
        self._totals.pop(segment, None)


def _set_aside(directory: Path, segment: int) -> None:
    quarantine = directory / "quarantine"
    quarantine.mkdir(exist_ok=True)
    path = segment_path(directory, segment)
    path.replace(quarantine / path.name)
    files.sync_directory(quarantine)
    files.sync_directory(directory)


def metas_of(store: Store, state: PartitionState) -> Iterator[tuple[int, int, Place | None]]:
    """(epoch, seq, place) of every put that a partition holds, in the order of dots."""
    for epoch, seq in state.held.dots():
        yield epoch, seq, store.place(state.partition, epoch, seq)
