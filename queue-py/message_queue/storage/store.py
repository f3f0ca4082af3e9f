"""The node's durable store: records in, bodies out.

Persist in the order of the core's effects; `on_durable(batch)` says up to which batch everything
is on disk. Bodies are found again by their dots. What is needed no more is given back in the
background (`compaction`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from aiofiles.os import wrap

from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import (
    AppendRecord,
    ClockRecord,
    CopyRecord,
    LogRecord,
    Spans,
    owner_of,
)
from message_queue.storage.compaction import Housekeeper
from message_queue.storage.index import Place
from message_queue.storage.log import Durable, Fsync, SegmentLog, Trouble
from message_queue.storage.records import (
    Bodies,
    Moved,
    UnreadableRecord,
    decode,
    encode,
    replay_cost,
    runs_in,
)
from message_queue.storage.recovery import Recovered, recover
from message_queue.storage.segments import span_of
from message_queue.storage.shelf import PartitionShelf

log = logging.getLogger(__name__)

_CACHED_BYTES = 8 << 20
_WORTH_A_SNAPSHOT = 1_000
_LAST_SNAPSHOT_S = 1.5

Body = tuple[int, int, bytes, bytes]
"""(epoch, seq, meta, body)"""


class _FrameCache:
    """Frames read lately: a frame may hold a thousand messages that are asked for one by one."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._frames: OrderedDict[int, Bodies] = OrderedDict()

    def get(self, locator: int) -> Bodies | None:
        """A frame, if it is here."""
        return self._frames.get(locator)

    def add(self, locator: int, puts: Bodies) -> None:
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
        self._clock_ms = recovered.clock_ms
        self._on_durable = on_durable
        self._log: SegmentLog[_Ticket] = SegmentLog(
            directory,
            segment_bytes=segment_bytes,
            fsync=fsync,
            on_durable=self._written,
            on_halt=on_halt,
            on_trouble=on_trouble,
        )
        self._frames = _FrameCache(_CACHED_BYTES)
        self._replay = 0
        """What it takes to replay all that was handed to the log in this life."""
        self._keeper: asyncio.Task[None] | None = None
        self.position: int | None = None
        """This node's; what others own is indexed after it was reported."""
        self.on_damage: Callable[[int, Spans], None] = lambda _partition, _lost: None
        """Told of puts that compaction found unreadable."""
        self.housekeeper = Housekeeper(
            self._log,
            self._index,
            self.states,
            append=lambda record: self._log.append(encode(record), _Ticket(0, record)),
            barrier=self.flushed,
            replay=lambda: self._replay,
            clock_ms=lambda: self._clock_ms,
            on_damage=lambda partition, lost: self.on_damage(partition, lost),
            quarantine=set(recovered.damaged),
            marked=recovered.marked,
            behind=recovered.cost,
        )

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
        await store._log.start(recovered.sizes, recovered.crcs)
        for record in recovered.withdrawn:
            store._log.append(encode(record), _Ticket(0, record))
        if recovered.useless_snapshot:
            # What a snapshot ahead of its segments knew is on disk again before it goes.
            await store.flushed()
            await store.housekeeper.drop_snapshot()
        return store

    def start(self) -> None:
        """Begin to compact. Call when `states` is in the replication core's hands."""
        self._keeper = asyncio.create_task(self.housekeeper.run(), name="housekeeper")

    async def close(self) -> None:
        """Write what waits, and a snapshot if the next start would replay much; close the files."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
            if self.housekeeper.tail > _WORTH_A_SNAPSHOT:
                try:
                    async with asyncio.timeout(_LAST_SNAPSHOT_S):
                        await self.housekeeper.snapshot()
                except (OSError, TimeoutError) as failure:
                    log.warning("no snapshot of the index: %s", failure)
        await self._log.close()

    async def compact(self) -> None:
        """One round of compaction, now."""
        await self.housekeeper.compact()

    # ── records ─────────────────────────────────────────────────────────────────────────────────

    def persist(self, batch: int, records: Sequence[LogRecord]) -> None:
        """Hand records to the log; `on_durable(batch)` follows when they and all before them are
        on disk."""
        last = len(records) - 1
        for number, record in enumerate(records):
            self._replay += replay_cost(record)
            self._log.append(encode(record), _Ticket(batch if number == last else 0, record))

    def _written(self, written: list[Durable[_Ticket]]) -> None:
        newest = 0
        later: list[tuple[int, AppendRecord]] = []
        for item in written:
            batch, record, waiting = item.token
            if batch:
                newest = batch
            if isinstance(record, AppendRecord) and self._is_anothers(record):
                later.append((item.locator, record))
            elif isinstance(record, AppendRecord | CopyRecord | Moved):
                self._place(item.locator, record)
            elif isinstance(record, ClockRecord):
                self._clock_ms = record.cluster_ms
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
        if newest:
            self._on_durable(newest)
        # The owner waits for the answer; here nobody looks into the index before this call ends.
        for locator, record in later:
            self._place(locator, record)

    def _is_anothers(self, record: AppendRecord) -> bool:
        return self.position is not None and owner_of(record.epoch) != self.position

    def _place(self, locator: int, record: AppendRecord | CopyRecord | Moved) -> None:
        state = self.states.get(record.partition)
        if state is None:
            return
        for run in runs_in(record):
            epoch, first = unpack_dot(run.first)
            if state.held.covers(epoch, first, first + len(run.sizes) - 1):
                self._index.put_run(run.partition, run.first, locator, run.meta, run.sizes)
                continue
            for offset, size in enumerate(run.sizes):
                # It may have been acked (or voided) while it was being written.
                if state.has_body(epoch, first + offset):
                    dot = run.first + offset
                    self._index.put(run.partition, dot, locator, run.meta, size)

    def forget(self, partition: int, spans: Spans) -> None:
        """These puts are needed no more."""
        self._index.drop_spans(partition, spans)

    def shelf(self, partition: int) -> PartitionShelf:
        """What the index knows of a partition's messages."""
        return PartitionShelf(self._index, partition)

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
        locators = self._index.locators(partition, [pack_dot(*dot) for dot in dots])
        for dot, locator in zip(dots, locators, strict=True):
            if locator:
                wanted.setdefault(locator, []).append(dot)
        frames = {locator: self._frames.get(locator) for locator in wanted}
        frames |= await self._fetch([locator for locator, puts in frames.items() if puts is None])
        found: list[Body] = []
        damaged: list[tuple[int, int]] = []
        moved: list[tuple[int, int]] = []
        for locator, its_dots in wanted.items():
            bodies = frames[locator]
            if bodies is not None:
                for epoch, seq in its_dots:
                    meta, body = bodies.find(pack_dot(epoch, seq))
                    found.append((epoch, seq, meta, body))
                continue
            for dot in its_dots:
                now_at = self._index.locator(partition, pack_dot(*dot))
                if now_at is not None:
                    # Compaction may have moved it between the look-up and the read.
                    (damaged if now_at == locator else moved).append(dot)
        if moved:
            more, worse = await self.read(partition, moved)
            return found + more, damaged + worse
        return found, damaged

    async def _fetch(self, locators: list[int]) -> dict[int, Bodies | None]:
        """Frames from disk (and into the cache); None: unreadable, or its segment is gone."""
        if not locators:
            return {}
        payloads = await self._log.read(locators)
        frames: dict[int, Bodies | None] = {}
        for locator in locators:
            # Another reader of the same frame may have been quicker.
            frames[locator] = self._frames.get(locator)
            payload = payloads.get(locator)
            if payload is None or frames[locator] is not None:
                continue
            with suppress(UnreadableRecord):
                puts = Bodies(decode(payload))
                frames[locator] = puts
                if puts.several:
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

    @property
    def index_bytes(self) -> int:
        """About what the index takes in memory."""
        return 40 * self._index.count() + 2 * self._index.extra_bytes

    def figures(self) -> dict[str, int]:
        """For /status and /metrics."""
        return {
            "segments": len(self._log.sizes),
            "log_bytes": sum(self._log.sizes.values()),
            "stored_records": self._index.count(),
            "syncs": self._log.syncs,
            "compactions": self.housekeeper.compactions,
            "snapshots": self.housekeeper.snapshots,
            "index_bytes": self.index_bytes,
        }
