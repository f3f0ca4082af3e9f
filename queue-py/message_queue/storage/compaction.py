"""What storage does beside its work: snapshots of the index, and giving back what is needless.

Everything here runs on the event loop in short steps, and one thing at a time. A round of
compaction writes a checkpoint of every partition (which makes all records before it redundant but
for the bodies still needed), copies the needed puts of segments that are mostly waste to the log's
head, writes a snapshot that no longer rests on those segments, then deletes them. It may be
stopped at any point: a segment goes only when all that is needed of it is durable elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Container, Iterator
from pathlib import Path
from typing import Any, Final

import aiofiles
from aiofiles.os import wrap

from message_queue.core.ids import unpack_dot
from message_queue.core.messages import Copy, LogRecord, Spans
from message_queue.core.replication.state import PartitionState
from message_queue.storage import files
from message_queue.storage.index import BLOCK_BITS, FRAME_BYTES, Index
from message_queue.storage.log import SegmentLog
from message_queue.storage.records import Bodies, Moved, UnreadableRecord, decode
from message_queue.storage.segments import segment_path
from message_queue.storage.snapshot import MAGIC, End, Page, State, encode, pages, path_in

log = logging.getLogger(__name__)

CHECK_S = 1.0
REWRITE_BELOW = 0.5
"""A segment is rewritten when less than this share of its bytes is still needed."""
MANY_SEGMENTS = 32
_FRUITLESS_PAUSE_S = 30.0
_MOVE_BYTES = 512 * 1024
_WRITE_BYTES = 1 << 20
_BLOCKS_A_STEP: Final = 32
TAIL_COST = 20_000
"""Behind a snapshot, a start replays about so much (`records.replay_cost`) before the next one is
worth it, or a quarter of what is stored. Where a quarter of that is much log (small messages came
in large batches, which cost a start little and a snapshot as much as any),"""
TAIL_SIZE = 4
"""the next one waits until so many times its own size was written. So snapshots cost a bounded
share of what is written, and starts a bounded time."""
_ROW_BYTES = 48
"""Of a put in a snapshot."""


class Housekeeper:
    """`barrier` returns when all that was appended is durable and indexed; `replay()` is what
    it takes to replay all that was appended since the start; `behind`: what this start replayed."""

    def __init__(
        self,
        log_: SegmentLog[Any],
        index: Index,
        states: dict[int, PartitionState],
        *,
        append: Callable[[LogRecord | Moved], None],
        barrier: Callable[[], Awaitable[None]],
        replay: Callable[[], int],
        clock_ms: Callable[[], int],
        on_damage: Callable[[int, Spans], None],
        quarantine: set[int],
        marked: frozenset[int],
        behind: int,
    ) -> None:
        self.compactions = 0
        self.snapshots = 0
        self._log = log_
        self._index = index
        self._states = states
        self._append = append
        self._barrier = barrier
        self._replay = replay
        self._clock_ms = clock_ms
        self._on_damage = on_damage
        self._quarantine = quarantine
        self._marked = marked
        """Segments that the snapshot on disk rests on."""
        self._snapshot_at = -behind
        self._replay_from = (0, 0)
        """(segment, offset) from which the snapshot on disk is replayed."""
        self._path = path_in(log_.directory)

    async def run(self) -> None:
        """For ever: look once a second whether there is something to do."""
        pause_s = CHECK_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = CHECK_S
            try:
                if self._quarantine or self._worth_it():
                    before = sum(self._log.sizes.values())
                    await self.compact()
                    fruitless = sum(self._log.sizes.values()) > 0.9 * before
                    if fruitless and self._log.trouble is None:
                        # It gained next to nothing (a limit on file sizes keeps segments small).
                        pause_s = _FRUITLESS_PAUSE_S
                elif self.due:
                    await self.snapshot()
            except OSError as failure:
                log.warning("storage puts its housekeeping off: %s", failure)

    @property
    def tail(self) -> int:
        """What a start would have to replay."""
        return self._replay() - self._snapshot_at

    @property
    def due(self) -> bool:
        """A snapshot is worth what it costs."""
        if self.tail <= TAIL_COST:
            return False
        segment, offset = self._replay_from
        sizes = self._log.sizes
        written = sum(size for number, size in sizes.items() if number >= segment) - offset
        count = self._index.count()
        return self.tail > count // 4 or written > TAIL_SIZE * self._size(count)

    def _size(self, count: int) -> int:
        """About what a snapshot takes."""
        return _ROW_BYTES * count + self._index.extra_bytes + (1 << 20)

    # ── snapshots ───────────────────────────────────────────────────────────────────────────────

    async def snapshot(self, without: Container[int] = ()) -> bool:
        """Write one that does not rest on the segments `without`: nothing needed is in them. False
        when the disk has no room for it: acks go first. Raises OSError."""
        size = self._size(self._index.count())
        if self._log.trouble is not None or not await self._log.has_room(size):
            await self.drop_snapshot()
            return False
        scratch = self._path.with_suffix(".new")
        replay_from = self._log.segment, self._log.sizes.get(self._log.segment, 0)
        if replay_from[1] == 0:  # between two segments, after a failure: everything is behind it
            replay_from = max(self._log.sizes, default=0), 0
        at = self._replay()
        frames = 0
        async with aiofiles.open(scratch, "wb", buffering=0) as file:
            await file.write(MAGIC)
            gathered: list[bytes] = []
            size = 0
            for part in self._parts():
                gathered.append(encode(part))
                size += len(gathered[-1])
                frames += 1
                if size > _WRITE_BYTES:
                    await file.write(b"".join(gathered))
                    gathered, size = [], 0
                else:
                    await asyncio.sleep(0)
            await self._barrier()
            await self._log.synced()
            marks = tuple(m for m in self._log.marks() if m.segment not in without)
            end = End(frames, sys.byteorder, replay_from, marks, self._clock_ms())
            await file.write(b"".join([*gathered, encode(end)]))
            await wrap(files.sync_data)(file.fileno())
        await wrap(scratch.replace)(self._path)
        await wrap(files.sync_directory)(self._path.parent)
        self._marked = frozenset(mark.segment for mark in marks)
        self._snapshot_at, self._replay_from = at, replay_from
        self.snapshots += 1
        return True

    def _parts(self) -> Iterator[State | Page]:
        for state in list(self._states.values()):
            yield State(state.checkpoint())
        yield from pages(self._index)

    async def drop_snapshot(self) -> None:
        """Do without: the next start replays the log. Raises OSError."""
        await wrap(Path.unlink)(self._path, missing_ok=True)
        await wrap(files.sync_directory)(self._path.parent)
        self._marked = frozenset()

    # ── compaction ──────────────────────────────────────────────────────────────────────────────

    def _needed(self, segment: int) -> int:
        """Bytes of a segment that are still needed."""
        live = self._index.live.get(segment)
        return min(live.bytes, self._log.sizes[segment]) if live is not None else 0

    def _worth_it(self) -> bool:
        closed = [s for s in self._log.sizes if s != self._log.segment]
        needed = sum(self._needed(s) for s in closed)
        total = sum(self._log.sizes[s] for s in closed)
        # At most half of a large log is waste; restarts leave small segments, which add up too.
        many = len(closed) > MANY_SEGMENTS + 4 * needed // self._log.segment_bytes
        wasted = total - needed
        if self._log.trouble is not None:
            return wasted > total / 10
        return many or wasted > max(self._log.segment_bytes, needed)

    async def compact(self) -> None:
        """One round: checkpoint everything, then delete and rewrite closed segments."""
        closed = [s for s in self._log.sizes if s != self._log.segment]
        quarantined = self._quarantine & set(closed)
        for state in list(self._states.values()):
            # Same step: the checkpoint stands in the log exactly where the state is.
            self._append(state.checkpoint())
            await asyncio.sleep(0)
        await self._barrier()
        victims = []
        for segment in closed:
            live = self._index.live.get(segment)
            if live is not None:
                size = self._log.sizes[segment]
                small = size * 2 < self._log.segment_bytes
                share = self._needed(segment) / size
                wanted = share < REWRITE_BELOW or small or segment in quarantined
                # On a full disk, copies would take the room that acks need.
                if wanted and await self._log.has_room(live.bytes):
                    await self._rewrite(segment)
            if segment not in self._index.live:
                victims.append(segment)
        if self._marked & set(victims):
            await self.snapshot(without=victims)
            if self._marked & set(victims):
                await self.drop_snapshot()
        for segment in victims:
            await self._remove(segment, keep=segment in quarantined)
        self.compactions += 1

    async def _rewrite(self, segment: int) -> None:
        """Copy the needed puts of a closed segment to the log's head."""
        for partition in self._index.partitions():
            page: dict[int, list[int]] = {}
            size = 0
            for dot, locator, body_bytes in await self._puts_of(segment, partition):
                page.setdefault(locator, []).append(dot)
                size += body_bytes + FRAME_BYTES
                if size > _MOVE_BYTES:
                    await self._move(partition, page)
                    page, size = {}, 0
            if page:
                await self._move(partition, page)

    async def _puts_of(self, segment: int, partition: int) -> list[tuple[int, int, int]]:
        """(dot, locator, body bytes) of a partition's puts in a segment, from the index: what is
        dead there is not even read."""
        found = []
        for count, (key, block) in enumerate(list(self._index.blocks(partition).items())):
            if count % _BLOCKS_A_STEP == 0:
                await asyncio.sleep(0)
            frames = block.frames
            if not frames or not min(frames) >> 32 <= segment <= max(frames) >> 32:
                continue
            for row, frame, length, size in zip(
                block.rows, frames, block.lengths, block.sizes, strict=True
            ):
                if length and frame >> 32 == segment:
                    found.append((key << BLOCK_BITS | row, frame << 32 | length, size))
        return found

    async def _move(self, partition: int, page: dict[int, list[int]]) -> None:
        payloads = await self._log.read(list(page))
        copies: list[Copy] = []
        lost: list[int] = []
        for locator, dots in page.items():
            needed = [d for d in dots if self._index.locator(partition, d) == locator]
            if not needed:
                continue
            try:
                bodies = Bodies(decode(payloads.get(locator, b"")))
            except UnreadableRecord:
                lost += needed
                continue
            copies += [Copy(*unpack_dot(dot), *bodies.find(dot)) for dot in needed]
        if lost:
            spans = tuple((epoch, seq, seq) for epoch, seq in map(unpack_dot, sorted(lost)))
            self._on_damage(partition, spans)
        if copies:
            self._append(Moved(partition, tuple(copies)))
            await self._barrier()

    async def _remove(self, segment: int, keep: bool) -> None:
        if keep:
            await wrap(_set_aside)(self._log.directory, segment)
            self._quarantine.discard(segment)
            log.warning("segment %d went to quarantine/: it has damaged records", segment)
        await self._log.delete(segment)


def _set_aside(directory: Path, segment: int) -> None:
    quarantine = directory / "quarantine"
    quarantine.mkdir(exist_ok=True)
    path = segment_path(directory, segment)
    path.replace(quarantine / path.name)
    files.sync_directory(quarantine)
    files.sync_directory(directory)
