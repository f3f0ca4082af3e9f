"""What the home keeps, and when it may tell: log first, store later.

    append -> (durable as the flags say) -> the node may send and answer
    ... every now and then: checkpoint = everything logged goes to the store, old segments go

Reads look at what is not in the store yet, then at the store, in a thread. The event loop never
waits for a disk, except for the plain write of `append`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from mesi_cache.config import Config, ConfigError
from mesi_cache.core.records import Record
from mesi_cache.core.step import Logged
from mesi_cache.storage.data_dir import write_durably
from mesi_cache.storage.store import AppliedRow, MemoryStore, SqliteStore, Store
from mesi_cache.storage.write_log import WriteLog

log = logging.getLogger(__name__)

CHECKPOINT_S = 1.0
CHECKPOINT_BYTES = 8 << 20


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Durable before anything is granted: which life this is, and how long a lease may be out."""

    epoch: int
    longest_lease_ms: int


class MainMemory:
    """The home's durable state. Made before the event loop runs; used on it."""

    def __init__(
        self, config: Config, store: Store, write_log: WriteLog | None, logged: list[Logged],
        started: Started, lease_wait_ms: int,
    ) -> None:  # fmt: skip
        self.epoch = started.epoch
        self.lease_wait_ms = lease_wait_ms  # how long leases of an earlier life may still run
        self._store = store
        self._log = write_log
        self._through = config.write_policy == "through"
        self._immediate = self._through or config.fsync == "always"
        self._flush_s = config.flush_ms / 1000
        self._pending: dict[str, Record] = {line.key: line.record for line in logged}
        self._lease_ms = config.lease_ms
        self._started, self._started_path = started, config.data_dir / "started.json"
        self._restored: list[AppliedRow] = [
            *store.applied(),
            *((line.source, line.floor, line.operation_id, line.outcome)
              for line in logged if line.source),
        ]  # fmt: skip
        self._appended = 0  # calls of append so far
        self.settled = 0  # of these, how many may be told about
        self._synced = 0  # of these, how many a power cut cannot take back
        self._wanted: list[str] = []
        self._writer = ThreadPoolExecutor(1, "store-writer")
        self._reader = ThreadPoolExecutor(1, "store-reader")
        self._wake = asyncio.Event()
        self._loading = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: Callable[[BaseException], None] = _ignore
        self._on_settled: Callable[[], None] = lambda: None
        self._on_loaded: Callable[[Sequence[tuple[str, Record | None]]], None] = _ignore
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
        try:
            if config.store == "memory":
                store: Store = MemoryStore()
                write_log = None
                logged: list[Logged] = []
            else:
                path = config.store.removeprefix("sqlite:") or directory / "memory.db"
                store = SqliteStore(Path(path), config.url)
                write_log, logged = WriteLog.recover(directory, strict=config.fsync == "always")
            # Before the first grant. A lease longer than ours may still be out: see forget_lease.
            write_durably(directory / "started.json", msgspec.json.encode(started))
        except OSError as e:
            raise ConfigError(f"{directory}: {e.strerror or e}") from e
        wait_ms = before.longest_lease_ms if before else 0
        return cls(config, store, write_log, logged, started, wait_ms)

    async def forget_lease(self) -> None:
        """Leases of earlier lives are over: the next start has to wait only for those of this."""
        if self._started.longest_lease_ms > self._lease_ms:
            started = Started(self.epoch, self._lease_ms)
            content = msgspec.json.encode(started)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._writer, write_durably, self._started_path, content)
            self._started = started

    def restored(self) -> list[AppliedRow]:
        """Operations that have happened: for Machine(applied=…)."""
        rows, self._restored = self._restored, []
        return rows

    def start(
        self,
        *,
        on_settled: Callable[[], None],
        on_loaded: Callable[[Sequence[tuple[str, Record | None]]], None],
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
        if self._log is not None:
            self._log.append(lines)
        for line in lines:
            self._pending[line.key] = line.record
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
                await self._save(list(self._pending.items()), lambda: None)
            elif self._appended > self._synced and self._log is not None:
                # Group commit: what gathers meanwhile shares the next sync.
                position = self._appended
                await loop.run_in_executor(self._writer, self._log.sync)
                self._reached(position)
            full = self._log is not None and self._log.size > CHECKPOINT_BYTES
            if self._pending and (full or loop.time() >= checkpoint_at):
                await self._checkpoint()
                checkpoint_at = loop.time() + CHECKPOINT_S

    async def _checkpoint(self) -> None:
        """Everything logged so far goes to the store, durably; then its log segments go."""
        write_log = self._log
        if write_log is None:
            await self._save(list(self._pending.items()), lambda: None)
            return
        await asyncio.get_running_loop().run_in_executor(self._writer, write_log.prepare)
        upto = write_log.rotate()
        await self._save(list(self._pending.items()), lambda: write_log.drop(upto))

    async def _save(
        self, records: list[tuple[str, Record]], afterwards: Callable[[], None]
    ) -> None:
        position, applied = self._appended, self._applied_rows()

        def save() -> None:
            self._store.save(records, applied)
            afterwards()

        await asyncio.get_running_loop().run_in_executor(self._writer, save)
        for key, record in records:
            if self._pending.get(key) is record:
                del self._pending[key]
        self._reached(position)

    def _reached(self, position: int) -> None:
        self._synced = max(self._synced, position)
        if self._immediate and position > self.settled:
            self.settled = position
            self._on_settled()
            if self._appended > position:
                self._wake.set()

    # --- reading ------------------------------------------------------------------------------

    def load(self, keys: Sequence[str]) -> list[tuple[str, Record | None]]:
        """What can be said at once; the other keys come through `on_loaded`."""
        known: list[tuple[str, Record | None]] = []
        for key in keys:
            record = self._pending.get(key)
            if record is not None:
                known.append((key, record))
            elif self._log is None:
                known.append((key, self._store.load((key,))[0]))
            else:
                self._wanted.append(key)
                self._loading.set()
        return known

    async def _keep_loading(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._loading.wait()
            self._loading.clear()
            keys, self._wanted = self._wanted, []
            records = await loop.run_in_executor(self._reader, self._store.load, keys)
            self._on_loaded(list(zip(keys, records, strict=True)))

    # --- the end ------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Store what was logged."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pending:
            await self._checkpoint()

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


def _ignore(_: object) -> None:
    pass
