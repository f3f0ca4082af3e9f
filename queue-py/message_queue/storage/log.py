"""One append-only log per node, in segments, with group commit.

```
append ──▶ waiting ──▶ [ one write + one fdatasync ] ──▶ on_durable, in order
              ▲                    │
              └── gathers meanwhile┘      (no timer: a batch is what came while the disk was busy)
```

Theory of operation. A single writer drains everything that waits into one write and one sync, then
reports the records in the order in which they were appended. A record is reported only when it
and all records before it are durable. The usual batch needs no task: a turn of the loop writes it,
or hands it to the thread and is called back. What takes more than one step (another segment, a
failure, the end) is the writer task's, and only one of the two is ever at work. Failures:

* **A write fails** (disk full, I/O error): the batch was not reported, so nothing is lost. The
  segment is cut back to its last synced byte and closed, and the batch is written again to a
  *new* segment. A full disk first gives its reserve file back, so that acks (which free space)
  still fit; until the reserve can be made again `trouble` is set and the node refuses new
  messages.
* **A sync fails**: what the kernel still holds of this file can no longer be trusted, and a
  second fsync would report success about pages already dropped (Rebello et al., "Can Applications
  Recover from fsync Failures?", 2020). So it is never repeated on that file: the batch, which is
  still in memory, goes to a new segment. A second failure in a row, or any failure when records
  were reported before they were synced (`--fsync interval`), halts the node.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar
from zlib import crc32

import aiofiles
from aiofiles.os import wrap
from aiofiles.threadpool.binary import AsyncFileIO

from message_queue.storage import files
from message_queue.storage.framing import HEADER, frame, frame_at
from message_queue.storage.segments import Mark as Mark  # named here by those who recover
from message_queue.storage.segments import locate, segment_of, segment_path, span_of
from message_queue.storage.space import RESERVE_BYTES, Space
from message_queue.storage.space import Trouble as Trouble  # named here by those who write

T = TypeVar("T")

SYNC_INTERVAL_S = 0.1
SPACE_CHECK_S = 0.5
OWN_WRITE_BYTES = 256 * 1024
PATIENCE_S = 0.0007
THREAD_DOES = 100
"""The loop writes and syncs by itself what is small while that takes no longer than this on
average: to wake a thread and be woken by it costs more (DESIGN.md, Speed). A disk that is slower
gets the thread for the next so many batches."""
_WEIGHT = 1 / 16
MAX_BATCH_BYTES = 8 * 1024 * 1024
_RETRY_FIRST_S = 0.02
_RETRY_MOST_S = 1.0


class Fsync(StrEnum):
    """When a record counts as stored: synced, synced within 100 ms, or handed to the kernel."""

    ALWAYS = "always"
    INTERVAL = "interval"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Durable(Generic[T]):
    """A record that reached the disk: what the caller gave, and where it lies."""

    token: T
    locator: int


class SegmentLog(Generic[T]):
    """The writer. Call `start` once with the running loop, `append` at will, `close` at the end.

    `on_durable(records)` is called in order; `on_halt(reason)` at most once, after which nothing is
    reported any more and the process must stop; `on_trouble(trouble)` when new messages
    must be refused (or None: no longer).
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int,
        fsync: Fsync,
        on_durable: Callable[[list[Durable[T]]], None],
        on_halt: Callable[[str], None],
        on_trouble: Callable[[Trouble | None], None],
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self.directory = directory
        self.segment_bytes = segment_bytes
        self.sizes: dict[int, int] = {}
        """Bytes of every segment on disk. Invariant: the last key is the one being written."""
        self.crcs: dict[int, int] = {}
        """CRC-32 of those bytes, kept while they are written."""
        self.trouble: Trouble | None = None
        self.queued_bytes = 0
        """Bytes appended and not yet reported; the node's backpressure."""
        self.syncs = 0
        self._fsync = fsync
        self._on_durable = on_durable
        self._on_halt = on_halt
        self._on_trouble = on_trouble
        self._waiting: list[tuple[bytes, T]] = []
        self._wake = asyncio.Event()
        self._file: AsyncFileIO | None = None
        self._segment = 0
        self._synced_size = 0
        self._loop = asyncio.get_running_loop()
        self._turn_due = False
        """`_turn` is called when this turn of the loop is over."""
        self._resting = False
        """The writer task waits for `_wake`: a turn may write."""
        self._out = False
        """A batch is with the thread."""
        self._failure: OSError | _SyncFailed | None = None
        """What became of the batch that waits first: the writer task goes on from there."""
        self._writer: asyncio.Task[None] | None = None
        self._minder: asyncio.Task[None] | None = None
        self._slow_for = 0
        """Batches that the thread shall write, because the disk was slow."""
        self._mean_s = 0.0
        self._rotate = False
        self._closing = False
        self._halted = False
        # One thread writes, one reads: a slow read of an old segment never delays a commit.
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="log-writer")
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="log-reader")
        self._write_and_sync = wrap(self._write_and_sync_blocking)
        self._space = Space(
            directory, reserve_bytes, self._write_thread, self._read_thread, self._in_trouble
        )

    async def start(self, sizes: dict[int, int], crcs: dict[int, int]) -> None:
        """Open a fresh segment after those recovered (`sizes`) and start the writer."""
        self.sizes = dict(sorted(sizes.items()))
        self.crcs = dict(crcs)
        self._segment = max(self.sizes, default=0)
        await self._space.start()
        await self._next_segment()
        self._writer = asyncio.create_task(self._write_loop(), name="log-writer")
        self._writer.add_done_callback(self._writer_ended)
        self._minder = asyncio.create_task(self._mind_loop(), name="log-minder")

    def append(self, payload: bytes, token: T) -> None:
        """Queue a record; `on_durable` names it by `token`. ValueError when it is too long."""
        framed = frame(payload)
        self._waiting.append((framed, token))
        self.queued_bytes += len(framed)
        if self._resting:
            self._turn_soon()

    async def read(self, locators: list[int]) -> dict[int, bytes]:
        """Payloads read back from disk, by locator. One that is not in the answer is damaged, or
        its segment is gone. Raises OSError when the disk cannot be read."""
        by_segment: dict[int, list[int]] = {}
        for locator in locators:
            by_segment.setdefault(segment_of(locator), []).append(locator)
        read_at = wrap(files.read_at)
        found: dict[int, bytes] = {}
        for segment, its in by_segment.items():
            path = segment_path(self.directory, segment)
            spans = [span_of(locator) for locator in its]
            with suppress(FileNotFoundError):
                parts = await read_at(path, spans, executor=self._read_thread)
                for locator, part in zip(its, parts, strict=True):
                    good = frame_at(part, 0)
                    if good is not None and good.end == span_of(locator)[1]:
                        found[locator] = bytes(good.payload)
        return found

    def marks(self) -> list[Mark]:
        """Every segment as far as it was reported durable."""
        return [Mark(n, size, self.crcs.get(n, 0)) for n, size in self.sizes.items()]

    async def synced(self) -> None:
        """Return when the open segment is on the medium, whatever `fsync` says."""
        if self._fsync is not Fsync.ALWAYS:
            await self._sync_now()

    async def delete(self, segment: int) -> None:
        """Remove a closed segment from the disk. The open one is never removed."""
        if (segment == self._segment and self._file is not None) or segment not in self.sizes:
            return
        del self.sizes[segment]
        self.crcs.pop(segment, None)
        unlink = wrap(Path.unlink)
        await unlink(
            segment_path(self.directory, segment), missing_ok=True, executor=self._read_thread
        )

    async def has_room(self, size: int) -> bool:
        """Whether `size` more bytes leave the disk with room to spare."""
        return await self._space.has_room(size)

    @property
    def segment(self) -> int:
        """The segment being written."""
        return self._segment

    async def close(self) -> None:
        """Write and sync what waits, then stop. A full disk is not waited for."""
        self._closing = True
        self._wake.set()
        if self._minder is not None:
            self._minder.cancel()
            with suppress(asyncio.CancelledError):
                await self._minder
        if self._writer is not None:
            done, _ = await asyncio.wait({self._writer}, timeout=2)
            if not done:
                self._writer.cancel()
            with suppress(asyncio.CancelledError):
                await self._writer
        if self._file is not None:
            await self._file.close()
        self._write_thread.shutdown(wait=False)
        self._read_thread.shutdown(wait=False)

    # ── the writer ──────────────────────────────────────────────────────────────────────────────

    def _turn_soon(self) -> None:
        """Not at once: the frames that this turn of the loop queued for the peers leave first, so
        that their disks work while this one does."""
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Write what waits, or have it written."""
        self._turn_due = False
        if not self._waiting or not self._resting or self._out or self._halted:
            return
        if self._is_a_task():
            self._wake.set()
            return
        batch, self._waiting = self._waiting, []
        data = b"".join([framed for framed, _ in batch])
        assert self._file is not None  # noqa: S101 - see _is_a_task
        descriptor, before = self._file.fileno(), self.crcs[self._segment]
        if self._slow_for or len(data) > OWN_WRITE_BYTES:
            self._slow_for = max(0, self._slow_for - 1)
            self._out = True
            writing = self._write_thread.submit(
                self._write_and_sync_blocking, descriptor, data, before
            )
            writing.add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(self._came_back, batch, done)
            )
            return
        began_s = perf_counter()
        try:
            crc = self._write_and_sync_blocking(descriptor, data, before)
        except Exception as failure:  # noqa: BLE001 - `_failed` judges it
            self._failed(batch, failure)
            return
        self._mean_s += (perf_counter() - began_s - self._mean_s) * _WEIGHT
        if self._mean_s > PATIENCE_S:
            self._slow_for, self._mean_s = THREAD_DOES, PATIENCE_S / 2
        self._report(batch, crc)

    def _came_back(self, batch: list[tuple[bytes, T]], writing: Future[int]) -> None:
        """The thread has written it, or failed to."""
        self._out = False
        failure = writing.exception()
        if failure is None:
            self._report(batch, writing.result())
        else:
            self._failed(batch, failure)
        if self._closing:
            self._wake.set()
        elif self._waiting:
            self._turn()

    def _failed(self, batch: list[tuple[bytes, T]], failure: BaseException) -> None:
        """The writer task goes on from there, if the disk is the cause."""
        if not isinstance(failure, OSError | _SyncFailed):
            self._halt(f"a write failed: {failure!r}")
            raise failure
        self._waiting = batch + self._waiting
        self._failure = failure
        self._wake.set()

    def _is_a_task(self) -> bool:
        """What waits takes more than one step."""
        return (
            self._file is None
            or self._closing
            or self._failure is not None
            or self.queued_bytes > MAX_BATCH_BYTES
            or self._would_overflow(self.queued_bytes)
        )

    async def _write_loop(self) -> None:
        while not self._halted:
            if self._out or not self._waiting or not self._is_a_task():
                if self._closing and not self._out:
                    break
                self._resting = True
                if self._waiting:
                    self._turn_soon()
                self._wake.clear()
                await self._wake.wait()
                self._resting = False
                continue
            batch = self._take()
            if not await self._commit(batch):
                return
        if self._fsync is not Fsync.NEVER and not self._halted:
            await self._sync_now()

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and (failure := writer.exception()) is not None:
            self._halt(f"the log's writer failed: {failure!r}")

    def _take(self) -> list[tuple[bytes, T]]:
        """Everything that waits, as far as it fits into one write."""
        total = 0
        for count, (framed, _) in enumerate(self._waiting):
            total += len(framed)
            if total > MAX_BATCH_BYTES and count:
                batch, self._waiting = self._waiting[:count], self._waiting[count:]
                return batch
        batch, self._waiting = self._waiting, []
        return batch

    async def _commit(self, batch: list[tuple[bytes, T]]) -> bool:
        """Make a batch durable, however long the disk takes. False: the node halts."""
        data = b"".join([framed for framed, _ in batch])
        retry_s = _RETRY_FIRST_S
        failed_syncs = 0
        while True:
            try:
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                if self._file is None or self._would_overflow(len(data)):
                    await self._next_segment()
                assert self._file is not None  # noqa: S101 - _next_segment opened it
                descriptor, before = self._file.fileno(), self.crcs[self._segment]
                crc: int = await self._write_and_sync(
                    descriptor, data, before, executor=self._write_thread
                )
                break
            except _SyncFailed as failure:
                failed_syncs += 1
                if failed_syncs > 1 or self._fsync is not Fsync.ALWAYS:
                    self._halt(f"fdatasync failed ({failure}); unsynced records cannot be trusted")
                    return False
                await self._abandon()
            except OSError as failure:
                await self._abandon()
                await self._space.write_failed(failure)
                if self._closing:
                    self._halt(f"stopped with unwritten records: {failure}")
                    return False
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, _RETRY_MOST_S)
        self._report(batch, crc)
        return True

    def _report(self, batch: list[tuple[bytes, T]], crc: int) -> None:
        """It is as durable as `fsync` wants it."""
        segment = self._segment
        offset = before = self.sizes[segment]
        written = []
        for framed, token in batch:
            written.append(Durable(token, locate(segment, offset, len(framed))))
            offset += len(framed)
        self.sizes[segment] = offset
        self.crcs[segment] = crc
        if self._fsync is not Fsync.INTERVAL:
            self._synced_size = offset
        self.queued_bytes -= offset - before
        try:
            self._on_durable(written)
        except Exception as failure:
            self._halt(f"stored, and then: {failure!r}")
            raise

    def _would_overflow(self, more: int) -> bool:
        size = self.sizes[self._segment]
        too_long = size + more > self.segment_bytes or self._rotate
        return size > len(HEADER) and too_long

    def _write_and_sync_blocking(self, descriptor: int, data: bytes, crc: int) -> int:
        """Returns the segment's CRC-32 with `data` after what gave `crc`."""
        files.write_all(descriptor, data)
        if self._fsync is Fsync.ALWAYS:
            try:
                files.sync_data(descriptor)
            except OSError as failure:
                raise _SyncFailed(str(failure)) from failure
            self.syncs += 1
        return crc32(data, crc)

    async def _next_segment(self) -> None:
        """Close the open segment and begin the next one, its name durable before any record."""
        if self._file is not None:
            if self._fsync is Fsync.INTERVAL:
                await self._sync_now()
            await self._file.close()
            self._file = None
        number = self._segment + 1
        path = segment_path(self.directory, number)
        file = await aiofiles.open(path, "wb", buffering=0, executor=self._write_thread)
        try:
            crc = await self._write_and_sync(file.fileno(), HEADER, 0, executor=self._write_thread)
            sync_directory = wrap(files.sync_directory)
            await sync_directory(self.directory, executor=self._write_thread)
        except (OSError, _SyncFailed) as failure:
            await file.close()
            await wrap(Path.unlink)(path, missing_ok=True, executor=self._write_thread)
            raise OSError(getattr(failure, "errno", None) or errno.EIO, str(failure)) from failure
        self._file, self._segment = file, number
        self._rotate = False
        self.sizes[number] = self._synced_size = len(HEADER)
        self.crcs[number] = crc

    async def _abandon(self) -> None:
        """Leave the open segment at its last durable byte; the next write begins another."""
        if self._file is None:
            return
        file, self._file = self._file, None
        good = self.sizes[self._segment]
        # Whether the cut succeeds does not matter for safety: the batch is written again after it,
        # and a second copy of a record is harmless. It only spares a false alarm at the next start.
        truncate = wrap(os.ftruncate)
        with suppress(OSError):
            await truncate(file.fileno(), good, executor=self._write_thread)
        with suppress(OSError):
            await file.close()
        if good == len(HEADER):
            with suppress(OSError):
                await self.delete(self._segment)

    async def _sync_now(self) -> None:
        if self._file is None or self._synced_size == self.sizes[self._segment]:
            return
        segment, size = self._segment, self.sizes[self._segment]
        sync_data = wrap(files.sync_data)
        try:
            await sync_data(self._file.fileno(), executor=self._write_thread)
        except OSError as failure:
            self._halt(f"fdatasync failed ({failure}); records already confirmed may be lost")
            return
        self.syncs += 1
        if segment == self._segment:
            self._synced_size = size

    def _halt(self, reason: str) -> None:
        if not self._halted:
            self._halted = True
            self._on_halt(reason)

    def _in_trouble(self, trouble: Trouble | None) -> None:
        # On a full disk a fresh segment lets the present one be given back when it is acked.
        self._rotate = trouble is not None
        self.trouble = trouble
        self._on_trouble(trouble)

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    async def _mind_loop(self) -> None:
        """Sync on the interval, watch the free space, and win the reserve back."""
        looked_s, written = 0.0, -1
        while True:
            if self._fsync is Fsync.INTERVAL:
                await asyncio.sleep(SYNC_INTERVAL_S)
                await self._sync_now()
            else:
                await asyncio.sleep(SPACE_CHECK_S)
            # What others write fills the disk as well, but nothing here depends on it meanwhile.
            now_s, busy = asyncio.get_running_loop().time(), written != self.syncs
            troubled = self._space.trouble is not None
            pause_s = SPACE_CHECK_S if busy or troubled else 10 * SPACE_CHECK_S
            if now_s - looked_s >= pause_s:
                looked_s, written = now_s, self.syncs
                await self._space.mind(more=bool(self._waiting))


class _SyncFailed(Exception):
    pass
