"""The store: SQLite in WAL mode, synchronous=FULL, one writer at a time, group commit.

The event loop submits writes and goes on; everything that waits goes into one transaction, and the
one fsync of its commit answers for all of it. There is no timer: while one fsync runs, the next
batch gathers.

Who commits? A thread, for whatever may take long: snapshots, checkpoints, and everything while the
disk is slow. A small write to a quick disk takes the loop 0.2 ms, less than to wake a thread and to
be woken by it costs (DESIGN.md, Speed), so the loop commits it itself, a turn after its submission:
the frames that this turn sent to the followers have left by then, and their disks work meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
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
# The loop commits no more than this by itself,
OWN_COMMIT_BYTES = 256 << 10
# and nothing while a commit takes longer than this on average: a leader does not need its own disk
# if two followers were quicker, and has requests to take in meanwhile; a follower has nothing else
# to do. Then the thread does the next so many, before the loop tries again.
PATIENCE_LEADING_S = 0.0007
PATIENCE_FOLLOWING_S = 0.005
THREAD_DOES = 100
_WEIGHT = 1 / 16  # of the last commit in the average


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
        self._patience_s = PATIENCE_FOLLOWING_S
        self._mean_s = 0.0  # of the loop's own commits
        self._slow_for = 0  # commits that the thread shall do because the disk was slow
        self._own: list[Persist] = []  # what the loop commits next
        self._under_way = 0  # writes that the thread has and did not report
        self._thread_is_saving = False  # a snapshot, in steps: it has more to do
        self._failed = False
        self._loop: asyncio.AbstractEventLoop
        self._done: Callable[[int], None]
        self._on_failure: Callable[[StoreFailed], None]
        self._waiting: deque[Persist | PeerIdentity | _Checkpoint] = deque()
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
        self._loop, self._done, self._on_failure = asyncio.get_running_loop(), done, failed
        self._thread = threading.Thread(target=self._write, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Persist, *, leading: bool = False) -> None:
        """Queues a write; never blocks. `leading`: other nodes' disks may answer for it before
        this one's."""
        self.backlog_bytes += _size(write)
        self._patience_s = PATIENCE_LEADING_S if leading else PATIENCE_FOLLOWING_S
        if not self._is_quick(write):
            self._put(write)
            return
        self._own.append(write)
        if len(self._own) == 1:
            self._loop.call_soon(self._commit_own)

    def bind_peer(self, peer: PeerIdentity) -> None:
        """Remembers who answers at a position. Durable before anything that is submitted later."""
        self.peers[peer.position] = peer
        self._put(peer)

    def _is_quick(self, write: Persist) -> bool:
        """Whether the loop may commit it, behind all that was submitted before."""
        return (
            self._thread is not None
            and not (self._under_way or self._thread_is_saving or self._slow_for)
            and write.snapshot is None
            and write.compact_to is None
            and self.backlog_bytes <= OWN_COMMIT_BYTES
        )

    def _put(self, item: Persist | PeerIdentity | _Checkpoint) -> None:
        """Give it to the thread, behind what the loop was about to commit."""
        if self._failed:
            return  # the thread never saw the commit of the loop that failed, and would go on
        items = [*self._own, item]
        self._own.clear()
        self._under_way += len(items)
        with self._wake:
            self._waiting.extend(items)
            self._wake.notify()

    def _commit_own(self) -> None:
        batch = self._own
        if not batch or self._failed:
            return  # the thread has it, or nobody any more
        self._own = []
        began_s = perf_counter()
        try:
            seq = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever failed, the node must not go on
            self._fail(error)
            return
        self._note_speed(perf_counter() - began_s)
        self._use_wal(batch)
        if self._wal_room < 0:
            self._put(_Checkpoint())
        self._report(seq, batch)

    def _note_speed(self, commit_s: float) -> None:
        self._mean_s += (commit_s - self._mean_s) * _WEIGHT
        if self._mean_s > self._patience_s:
            self._slow_for, self._mean_s = THREAD_DOES, self._patience_s / 2

    def _report(self, seq: int, batch: Sequence[object]) -> None:
        self.backlog_bytes -= sum(_size(item) for item in batch if isinstance(item, Persist))
        if seq:
            self._done(seq)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            self._on_failure(StoreFailed(f"{self._data_dir.path / FILE_NAME}: {error}"))

    async def close(self) -> None:
        """Finishes what was submitted, then closes. After a failure it closes nothing: closing
        would make SQLite write again."""
        thread = self._thread
        if thread is not None:
            self._commit_own()
            with self._wake:
                self._stopping = True
                self._wake.notify()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        else:
            self._connection.close()
            self._high_water.close()
        self._data_dir.close()

    # ------------------------------------------------------------------------- the writer's thread

    def _write(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._stopping or self._saving):
                    self._wake.wait()
                batch = list(self._waiting)
                self._waiting.clear()
            if not batch and self._saving is None:
                if not self._failed:
                    self._connection.close()
                self._high_water.close()
                return
            try:
                writes = [item for item in batch if not isinstance(item, _Checkpoint)]
                seq = self._commit(writes) if writes or self._saving else 0
                self._use_wal(writes)
                saving = self._saving is not None
                checkpoint = self._wal_room < 0
                # Whoever waits for the commit need not wait for the checkpoint behind it.
                still = 1 if checkpoint else 0
                _tell(self._loop, self._thread_did, seq, batch, saving, len(batch) - still)
                if checkpoint:
                    self._checkpoint()
                    _tell(self._loop, self._thread_did, 0, [], saving, still)
            except Exception as error:  # noqa: BLE001 - whatever failed, the node must not go on
                _tell(self._loop, self._fail, error)
                self._high_water.close()
                return

    def _thread_did(self, seq: int, batch: Sequence[object], saving: bool, finished: int) -> None:
        """On the loop: a commit, or the checkpoint behind it, of the thread."""
        self._under_way -= finished
        self._thread_is_saving = saving
        self._slow_for = max(0, self._slow_for - 1)
        self._report(seq, batch)

    # -------------------------------------------------------------------- whoever's turn it is

    def _commit(self, batch: Sequence[Persist | PeerIdentity]) -> int:
        """One transaction, one fsync. Returns the last write's seq, 0 if there is none."""
        seq = 0
        connection = self._connection
        write = batch[0] if len(batch) == 1 else None
        if isinstance(write, Persist) and _only_appends_one(write) and self._saving is None:
            tables.append(connection, self._extent, write.entries[0])
            self._high_water.reached(self._extent.commits)
            return write.seq
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

    def _use_wal(self, batch: Sequence[Persist | PeerIdentity]) -> None:
        # At least a page of the log and the row of hard state are written anew each time.
        self._wal_room -= 3 * PAGE_BYTES
        self._wal_room -= sum(
            len(entry.payload)
            for item in batch
            if isinstance(item, Persist)
            for entry in item.entries
        )

    def _checkpoint(self) -> None:
        """Moves the WAL into the database; nobody waits for this but the next write. All nodes log
        the same, so chance keeps them from doing it together."""
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._wal_room = CHECKPOINT_AFTER_BYTES // 2
        self._wal_room += secrets.randbelow(CHECKPOINT_AFTER_BYTES // 2)


_DONE = object()


class _Checkpoint:
    """Asks the thread for one."""


class _Saving(NamedTuple):
    """A snapshot on its way to the disk, and what of the log goes when it is there."""

    steps: Iterator[None]
    compact_to: int | None


def _only_appends_one(write: Persist) -> bool:
    other = (write.hard_state, write.snapshot, write.truncate_from, write.compact_to)
    return len(write.entries) == 1 and other == (None, None, None, None)


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
