"""What the home keeps, and when it may tell: log first, store later.

    append -> (durable as the flags say) -> the node may send and answer
    ... every now and then: checkpoint = everything logged goes to the store, old segments go

Reads look at what is not in the store yet, then at what was stored or read lately (recent.py), then
at the store, in a thread. The event loop never waits for a disk, except for the plain write of
`append`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from mesi_cache.config import Config, ConfigError
from mesi_cache.core.directory.retries import RetryRow
from mesi_cache.core.records import Record
from mesi_cache.core.step import Logged
from mesi_cache.storage.data_dir import write_durably
from mesi_cache.storage.origin_store import OriginStore
from mesi_cache.storage.origins import HttpOrigin, Origin, RedisOrigin
from mesi_cache.storage.recent import Recent
from mesi_cache.storage.sqlite_store import SqliteFile, SqliteStore
from mesi_cache.storage.store import (
    AppliedRow,
    Loaded,
    MemoryStore,
    Restored,
    Saving,
    Store,
    StoreUnavailable,
)
from mesi_cache.storage.write_log import WriteLog

log = logging.getLogger(__name__)

CHECKPOINT_S = 1.0
CHECKPOINT_BYTES = 8 << 20
LOADS_AT_ONCE = 8
LOAD_CHUNK = 64
MOST_PENDING = 100_000
RECENT_BYTES = 16 << 20


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Durable before anything is granted: which life this is, and how long a lease may be out."""

    epoch: int
    longest_lease_ms: int


class MainMemory:
    """The home's durable state. Made before the event loop runs; used on it."""

    def __init__(
        self, config: Config, store: Store, write_log: WriteLog | None, logged: list[Logged],
        started: Started, lease_wait_ms: int, reader: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self.epoch = started.epoch
        self.lease_wait_ms = lease_wait_ms  # how long leases of an earlier life may still run
        self.trouble = ""  # why the store does not answer; "": it does
        self._store = store
        self._log = write_log
        # Under back_unsafe the log is only read, for what an earlier life has left in it.
        self._logs = write_log is not None and config.write_policy != "back_unsafe"
        self._through = config.write_policy == "through"
        self._immediate = self._through or (self._logs and config.fsync == "always")
        self._flush_s = config.flush_ms / 1000
        self._pending: dict[str, Record] = {
            line.key: line.record for line in logged if line.record is not None
        }
        self._recent = Recent(RECENT_BYTES if isinstance(store, SqliteStore) else 0)
        self._new_retries: list[RetryRow] = [row for line in logged if (row := _retry(line))]
        self._lease_ms = config.lease_ms
        self._started, self._started_path = started, config.data_dir / "started.json"
        stored = store.restored()
        self.restored = Restored(
            [
                *stored.applied,
                *((line.source, line.floor, line.operation_id, line.outcome)
                  for line in logged if line.source),
            ],
            [*stored.retries, *self._new_retries],
        )  # fmt: skip
        self._appended = 0  # calls of append so far
        self.settled = 0  # of these, how many may be told about
        self._synced = 0  # of these, how many a power cut cannot take back
        self._wanted: list[str] = []
        self._loads: set[asyncio.Task[None]] = set()
        self._load_slots = asyncio.Semaphore(LOADS_AT_ONCE)
        self._writer = writer
        self._reader = reader
        self._wake = asyncio.Event()
        self._loading = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: Callable[[BaseException], None] = _ignore
        self._on_settled: Callable[[], None] = lambda: None
        self._on_loaded: Callable[[Sequence[tuple[str, Loaded]]], None] = _ignore
        self._applied_rows: Callable[[], list[AppliedRow]] = list

    @classmethod
    def open(cls, config: Config) -> MainMemory:
        """Recover from the data directory, which is locked and this node's own.

        Raises ConfigError (damaged files, a store of somebody else).
        """
        directory = config.data_dir
        before = _read_started(directory / "started.json")
        longest_ms = max(config.lease_ms, before.longest_lease_ms if before else 0)
        started = Started(before.epoch + 1 if before else 1, longest_ms)
        reader = ThreadPoolExecutor(1, "store-reader")
        writer = ThreadPoolExecutor(1, "store-writer")
        write_log, logged = None, list[Logged]()
        try:
            store = _open_store(config, reader, writer)
            if config.store != "memory":
                write_log, logged = WriteLog.recover(directory, strict=config.fsync == "always")
            # Before the first grant. A lease longer than ours may still be out: see forget_lease.
            write_durably(directory / "started.json", msgspec.json.encode(started))
        except OSError as e:
            raise ConfigError(f"{directory}: {e.strerror or e}") from e
        wait_ms = before.longest_lease_ms if before else 0
        return cls(config, store, write_log, logged, started, wait_ms, reader, writer)

    async def forget_lease(self) -> None:
        """Leases of earlier lives are over: the next start has to wait only for those of this."""
        if self._started.longest_lease_ms > self._lease_ms:
            started = Started(self.epoch, self._lease_ms)
            content = msgspec.json.encode(started)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._writer, write_durably, self._started_path, content)
            self._started = started

    def start(
        self,
        *,
        on_settled: Callable[[], None],
        on_loaded: Callable[[Sequence[tuple[str, Loaded]]], None],
        applied_rows: Callable[[], list[AppliedRow]],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Begin the background work. `on_settled` is called when `settled` has grown, `failed` when
        a write or sync went wrong: the node must stop, what it told may not be there."""
        self._on_settled, self._on_loaded = on_settled, on_loaded
        self._applied_rows, self._failed = applied_rows, failed
        self._tasks = [
            asyncio.create_task(self._guarded(self._keep_syncing), name="log sync"),
            asyncio.create_task(self._guarded(self._keep_loading), name="store reads"),
        ]

    # --- writing ------------------------------------------------------------------------------

    def append(self, lines: Sequence[Logged]) -> int:
        """Log `lines`. Returns a position: once `settled` has reached it, they may be told about.
        Raises OSError; then nothing may be told any more."""
        if self._log is not None and self._logs:
            self._log.append(lines)
        for line in lines:
            if line.record is not None:
                self._pending[line.key] = line.record
            if line.once is not None and (row := _retry(line)):
                self._new_retries.append(row)
        self._appended += 1
        if self._immediate and self._log is not None:
            self._wake.set()
        else:
            self.settled = self._appended
        return self._appended

    async def _keep_syncing(self) -> None:
        loop = asyncio.get_running_loop()
        checkpoint_at = loop.time() + CHECKPOINT_S
        while True:
            try:
                async with asyncio.timeout(self._flush_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._through and self._appended > self._synced:
                await self._save()
            elif self._appended > self._synced and self._log is not None and self._logs:
                # Group commit: what gathers meanwhile shares the next sync.
                position = self._appended
                await loop.run_in_executor(self._writer, self._log.sync)
                self._reached(position)
            full = self._log is not None and self._log.size > CHECKPOINT_BYTES
            due = loop.time() >= checkpoint_at
            if self._unsaved and (due or (full and not self.trouble)):
                await self._checkpoint()
                checkpoint_at = loop.time() + CHECKPOINT_S

    async def _checkpoint(self) -> None:
        """Everything logged so far goes to the store, durably; then its log segments go."""
        write_log = self._log
        if write_log is None or self.trouble:  # no new segment while the old ones cannot go
            await self._save()
            return
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, write_log.prepare)
        upto = write_log.rotate()
        if await self._save():
            await loop.run_in_executor(self._writer, write_log.drop, upto)

    async def _save(self) -> bool:
        """Write back; False if the store does not take it now."""
        position, records = self._appended, list(self._pending.items())
        retries = list(self._new_retries)
        try:
            await self._store.save(
                Saving(records, self._applied_rows(), retries, time.time() * 1000)
            )
        except StoreUnavailable as e:
            self._note_trouble(str(e))
            return False
        self._note_trouble("")
        for key, record in records:
            self._recent.put(key, record)  # what is newer than that stands in _pending
            if self._pending.get(key) is record:
                del self._pending[key]
        del self._new_retries[: len(retries)]
        self._reached(position)
        return True

    def _note_trouble(self, trouble: str) -> None:
        if trouble and not self.trouble:
            log.warning("the store does not answer, what is written waits in the log: %s", trouble)
        elif self.trouble and not trouble:
            log.info("the store answers again")
        self.trouble = trouble

    @property
    def overfull(self) -> bool:
        """The store has been away for so long that no more changes can be kept for it."""
        return bool(self.trouble) and self._unsaved >= MOST_PENDING

    @property
    def _unsaved(self) -> int:
        """How much there is that the store has not got yet."""
        return len(self._pending) + len(self._new_retries)

    def _reached(self, position: int) -> None:
        self._synced = max(self._synced, position)
        if self._immediate and position > self.settled:
            self.settled = position
            self._on_settled()
            if self._appended > position:
                self._wake.set()

    # --- reading ------------------------------------------------------------------------------

    def load(self, keys: Sequence[str]) -> list[tuple[str, Loaded]]:
        """What can be said at once; the other keys come through `on_loaded`."""
        known: list[tuple[str, Loaded]] = []
        for key in keys:
            record = self._pending.get(key) or self._recent.get(key)
            if record is not None:
                known.append((key, record))
            elif isinstance(self._store, MemoryStore):
                known.append((key, self._store.now(key)))
            else:
                self._wanted.append(key)
                self._loading.set()
        return known

    async def peek(self, key: str) -> Loaded:
        """The record of `key`, for people."""
        return self._pending.get(key) or (await self._store.load((key,)))[0]

    async def _keep_loading(self) -> None:
        while True:
            await self._loading.wait()
            self._loading.clear()
            keys, self._wanted = self._wanted, []
            for start in range(0, len(keys), LOAD_CHUNK):
                # A store far away answers several at a time; a few are enough to keep it busy.
                await self._load_slots.acquire()
                part = keys[start : start + LOAD_CHUNK]
                task = asyncio.ensure_future(self._guarded(partial(self._load, part)))
                self._loads.add(task)
                task.add_done_callback(self._loads.discard)

    async def _load(self, keys: Sequence[str]) -> None:
        try:
            records = await self._store.load(keys)
        finally:
            self._load_slots.release()
        for key, record in zip(keys, records, strict=True):
            if isinstance(record, Record):  # a key is not changed while it is being loaded
                self._recent.put(key, record)
        # What was logged meanwhile is newer than what was read.
        self._on_loaded(
            [(key, self._pending.get(key) or r) for key, r in zip(keys, records, strict=True)]
        )

    # --- the end ------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Store what was logged, if the store takes it."""
        for task in (*self._tasks, *self._loads):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loads, return_exceptions=True)
        try:
            if self._unsaved:
                await self._checkpoint()
        finally:
            await self._store.stop()

    def close(self) -> None:
        """Wait for running work (it is short) and close the files."""
        self._writer.shutdown()
        self._reader.shutdown()
        self._store.close()
        if self._log is not None:
            self._log.close()

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except Exception as e:  # a disk that failed: whoever is told stops the node
            log.exception("main memory failed")
            self._failed(e)


def _read_started(path: Path) -> Started | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Started)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"{path} is not readable: {e}") from e


def _open_store(config: Config, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> Store:
    if config.store == "memory":
        return MemoryStore()
    path = config.data_dir / "memory.db"
    if config.store.startswith(("redis://", "rediss://")):
        origin: Origin = RedisOrigin(config.store, config.max_body_bytes)
    elif config.store.startswith(("http://", "https://")):
        origin = HttpOrigin(config.store, config.max_body_bytes)
    else:
        path = Path(config.store.removeprefix("sqlite:") or path)
        return SqliteStore(SqliteFile(path, config.url, "sqlite"), reader, writer)
    name = config.store.rpartition("@")[2]  # without a password
    return OriginStore(origin, SqliteFile(path, config.url, name), reader, writer)


def _retry(line: Logged) -> RetryRow | None:
    once, outcome = line.once, line.outcome
    if once is None or outcome is None:
        return None
    return once.name, once.print, line.once_until_ms, outcome


def _ignore(_: object) -> None:
    pass
