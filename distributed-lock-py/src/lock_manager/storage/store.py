"""The store: SQLite in WAL mode, synchronous=FULL, one writer thread, group commit.

The event loop submits writes and goes on; the thread takes everything that waits into one
transaction, and the one fsync of its commit answers for all of it. There is no timer: while one
fsync runs, the next batch gathers.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

from lock_manager.core.peer_book import PeerIdentity
from lock_manager.core.raft import Persist
from lock_manager.storage import tables
from lock_manager.storage.data_dir import DataDir, Owner, sync_directory
from lock_manager.storage.errors import CorruptStore, StoreError, StoreFailed
from lock_manager.storage.high_water import HighWater

FILE_NAME = "raft.sqlite3"
# A checkpoint lets SQLite overwrite the WAL from its beginning. While the file still grows, each
# sync costs the file system a journal commit of its own (twice the time, see DESIGN.md), so this is
# small; a checkpoint costs two more syncs, so it is not smaller.
CHECKPOINT_AFTER_BYTES = 4 << 20
PAGE_BYTES = 4096


class Store:
    """One node's durable state. Made by `open`; all methods belong to the event loop's thread."""

    def __init__(
        self, data_dir: DataDir, connection: sqlite3.Connection, high_water: HighWater
    ) -> None:
        self.store_id = tables.load_store_id(connection)
        if data_dir.identity is None or data_dir.identity.store_id != self.store_id:
            raise CorruptStore("the file is not the one that identity.json was written for")
        self.restored, self._extent = tables.load(connection)
        if self._extent.commits < high_water.commits:
            raise CorruptStore(
                f"it lost its last {high_water.commits - self._extent.commits} commits"
            )
        self.peers = {peer.position: peer for peer in tables.load_peers(connection)}
        self.backlog_bytes = 0
        self._data_dir = data_dir
        self._connection = connection
        self._high_water = high_water
        self._wal_room = CHECKPOINT_AFTER_BYTES  # until the next checkpoint
        self._saving: _Saving | None = None  # belongs to the writer thread
        self._waiting: deque[Persist | PeerIdentity] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------- opening

    @classmethod
    def open(cls, path: Path, owner: Owner) -> Store:
        """Opens (or makes) the store in directory `path` for `owner` and checks every row.
        Blocking.

        Raises StoreError or a subclass: StoreInUse, ForeignStore (nothing is written then) and
        CorruptStore.
        """
        data_dir = DataDir.open(path, owner)
        try:
            return cls._open(data_dir, owner)
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
            data_dir.close()  # the last three: a value in a row is not of its column's type
            raise CorruptStore(f"{path / FILE_NAME} is corrupt: {error}") from error
        except OSError as error:
            data_dir.close()
            raise StoreError(f"{path / FILE_NAME}: {error.strerror or error}") from error
        except CorruptStore as error:
            data_dir.close()
            raise CorruptStore(f"{path / FILE_NAME} is corrupt: {error}") from error
        except StoreError:
            data_dir.close()
            raise

    @classmethod
    def _open(cls, data_dir: DataDir, owner: Owner) -> Store:
        file = data_dir.path / FILE_NAME
        if data_dir.identity is None:
            _make(file, owner, data_dir)
        elif not file.exists():
            raise CorruptStore("the file is missing, though this node ran before")
        with ExitStack() as undo:
            high_water = HighWater(data_dir.path)
            undo.callback(high_water.close)
            connection = _connect(file)
            undo.callback(connection.close)
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()
            if damage != ("ok",):
                raise CorruptStore(" ".join(str(damage[0]).split()))
            store = cls(data_dir, connection, high_water)
            undo.pop_all()
        return store

    # ------------------------------------------------------------------------------------- writing

    def start(self, done: Callable[[int], None], failed: Callable[[StoreFailed], None]) -> None:
        """Starts the writer. On the running loop, `done(seq)` is called when every write up to
        `seq` is synced, `failed(error)` at most once, after which nothing is written any more."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._write, args=(loop, done, failed), name="store-writer", daemon=True
        )
        self._thread.start()

    def submit(self, write: Persist) -> None:
        """Queues a write; never blocks."""
        self.backlog_bytes += _size(write)
        self._put(write)

    def bind_peer(self, peer: PeerIdentity) -> None:
        """Remembers who answers at a position. Durable before anything that is submitted later."""
        self.peers[peer.position] = peer
        self._put(peer)

    def _put(self, item: Persist | PeerIdentity) -> None:
        with self._wake:
            self._waiting.append(item)
            self._wake.notify()

    async def close(self) -> None:
        """Finishes what was submitted, then closes. After a failure it closes nothing: closing
        would make SQLite write again."""
        thread = self._thread
        if thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        else:
            self._connection.close()
            self._high_water.close()
        self._data_dir.close()

    # ------------------------------------------------------------------------- the writer's thread

    def _write(
        self,
        loop: asyncio.AbstractEventLoop,
        done: Callable[[int], None],
        failed: Callable[[StoreFailed], None],
    ) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._stopping or self._saving):
                    self._wake.wait()
                batch = list(self._waiting)
                self._waiting.clear()
            if not batch and self._saving is None:
                self._connection.close()
                self._high_water.close()
                return
            try:
                seq = self._commit(batch)
                _tell(loop, self._committed, done, seq, batch)
                self._checkpoint_if_due(batch)
            except Exception as error:  # noqa: BLE001 - whatever failed, the node must not go on
                _tell(loop, failed, StoreFailed(f"{self._data_dir.path / FILE_NAME}: {error}"))
                self._high_water.close()
                return

    def _commit(self, batch: list[Persist | PeerIdentity]) -> int:
        """One transaction, one fsync. Returns the last write's seq, 0 if there is none."""
        seq = 0
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        for item in batch:
            if isinstance(item, PeerIdentity):
                tables.bind_peer(connection, item)
            else:
                tables.apply(connection, self._extent, self._without_own_snapshot(item))
                seq = item.seq
        self._save_a_step()
        self._extent.save(connection)
        connection.execute("COMMIT")
        self._high_water.reached(self._extent.commits)
        return seq

    def _without_own_snapshot(self, write: Persist) -> Persist:
        """A snapshot whose log is on this disk may reach it a little later, in small steps, so that
        nobody waits for it. One that a leader sent in place of the log goes in at once."""
        if write.snapshot is None:
            return write
        self._saving = None  # an older one that is not complete yet is superseded
        if write.truncate_from is not None or write.snapshot.index > self._extent.last_index:
            return write
        steps = tables.snapshot_steps(self._connection, write.snapshot)
        self._saving = _Saving(steps, write.compact_to)
        return msgspec.structs.replace(write, snapshot=None, compact_to=None)

    def _save_a_step(self) -> None:
        """One step of the snapshot that is being saved; behind the last one its log is deleted."""
        if self._saving is None:
            return
        self._wal_room -= tables.SNAPSHOT_CHUNK_BYTES
        if next(self._saving.steps, _DONE) is _DONE:
            if self._saving.compact_to is not None:
                tables.compact(self._connection, self._extent, self._saving.compact_to)
            self._saving = None

    def _checkpoint_if_due(self, batch: list[Persist | PeerIdentity]) -> None:
        """Moves the WAL into the database once it is long; nobody waits for this but the next
        write. All nodes log the same, so chance keeps them from doing it together."""
        # At least a page of the log and the row of hard state are written anew each time.
        self._wal_room -= 3 * PAGE_BYTES
        self._wal_room -= sum(
            len(entry.payload)
            for item in batch
            if isinstance(item, Persist)
            for entry in item.entries
        )
        if self._wal_room < 0:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._wal_room = CHECKPOINT_AFTER_BYTES // 2
            self._wal_room += secrets.randbelow(CHECKPOINT_AFTER_BYTES // 2)

    def _committed(
        self, done: Callable[[int], None], seq: int, batch: list[Persist | PeerIdentity]
    ) -> None:
        self.backlog_bytes -= sum(_size(item) for item in batch if isinstance(item, Persist))
        if seq:
            done(seq)


_DONE = object()


class _Saving(NamedTuple):
    """A snapshot on its way to the disk, and what of the log goes when it is there."""

    steps: Iterator[None]
    compact_to: int | None


def _size(write: Persist) -> int:
    snapshot_bytes = len(write.snapshot.data) if write.snapshot is not None else 0
    return snapshot_bytes + sum(len(entry.payload) for entry in write.entries)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """Runs `call` on the loop. A loop that is closed has nobody left to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *arguments)


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the platter
        connection.execute("PRAGMA checkpoint_fullfsync = ON")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def _make(file: Path, owner: Owner, data_dir: DataDir) -> None:
    """Makes an empty store and, when all of it is on disk, writes identity.json. Leftovers of a
    start that was interrupted before that hold no promise and go."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    store_id = secrets.token_hex(16)
    connection = _connect(file)
    try:
        connection.execute("BEGIN IMMEDIATE")
        tables.create(connection, store_id)
        connection.execute("COMMIT")
    finally:
        connection.close()  # checkpoints, so that the main file is complete by itself
    HighWater.create(data_dir.path)
    sync_directory(data_dir.path)
    data_dir.claim(owner, store_id)
