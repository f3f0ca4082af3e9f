"""The one writer: makes everything durable, many requests to one fsync.

No timer: what gathered while the last transaction was being committed goes into the next.

**Who commits?** The event loop, if the write is small and the disk quick; a thread for whatever may
take long (snapshots, checkpoints, a background job) and for everything while the disk is slow. A
commit takes a quick disk 0.2 ms, while a thread must be woken, wait for the interpreter's lock
around each SQLite call, and wake the loop: that costs more than the wait. The loop commits one turn
after the frames for the other node have left, so both disks work at the same time; requests that
come meanwhile are the next batch.

**Folding.** The log's records are durable, so bringing decided ones into the tables is in no hurry
and needs no fsync: it is done many at a time (a key that was written ten times is written once), in
transactions of their own that nobody waits for, synced by whatever is committed next. A power cut
takes such a transaction whole, and the next start folds the same records again.

A commit that fails ends the node: after a failed fsync nobody knows what the disk holds, and going
on would be a guess (fsyncgate, 2018).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from secure_store.core.audit import Told
from secure_store.core.effects import (
    AppendLog,
    InstallSnapshot,
    PersistOp,
    SaveState,
    StageRows,
)
from secure_store.core.messages import SnapshotBegin
from secure_store.storage.backlog import Backlog
from secure_store.storage.database import Database
from secure_store.storage.fold import Decided

# The loop commits no more than this by itself,
OWN_BYTES = 256 << 10
# and nothing while its commits take longer than this on average: a primary has requests to take in
# meanwhile, a replica little else to do. Then the thread does the next so many, before the loop
# tries again.
PATIENCE_PRIMARY_S = 0.0007
PATIENCE_REPLICA_S = 0.003
THREAD_DOES = 100
_WEIGHT = 1 / 16  # of the last commit in the average
JOB_PAUSE_S = 0.02
LOG_RECORDS = 20_000
LOG_BYTES = 64 << 20
TRIM_RECORDS = 512
PAGE_BYTES = 4096
CHECKPOINT_BYTES = 3 << 20  # of the log's full length, see connection.WAL_BYTES


class Writer:
    """Everything is called on the event loop, and calls back there, unless it says otherwise.

    `on_durable(persisted number, applied seq)` follows each commit; `on_failed(reason)` comes once,
    when the disk failed; nothing is written after it.
    """

    def __init__(
        self,
        database: Database,
        *,
        on_durable: Callable[[int, int], None],
        on_failed: Callable[[str], None],
        on_quarantine: Callable[[Path], None],
        quarantine_dir: Path,
        now_ms: Callable[[], int],
    ) -> None:
        self._database = database
        self._on_durable = on_durable
        self._on_failed = on_failed
        self._on_quarantine = on_quarantine
        self._quarantine_dir = quarantine_dir
        self._now_ms = now_ms
        self._loop: asyncio.AbstractEventLoop
        self._failed = False
        # What the loop commits next, and its size.
        self._own: list[PersistOp] = []
        self._own_bytes = 0
        self._patience_s = PATIENCE_PRIMARY_S
        self._mean_s = 0.0
        self._slow_for = 0  # commits that the thread shall do because the disk was slow
        self._given = 0  # pieces of work that the thread has and did not report
        # Between loop and thread; a piece is done by the thread in the order it was given.
        self._wake = threading.Condition()
        self._queue: list[PersistOp] = []
        self._chores: list[Callable[[], None]] = []
        self._pieces = 0
        self._stopping = False
        self._job: Callable[[Database], bool] | None = None
        self._job_done: Callable[[], None] | None = None
        self._job_at_s = 0.0
        # Belongs to whoever commits: the thread while it has something to do, else the loop.
        self._backlog = Backlog(database, now_ms)
        self._log_first, self._log_count, self._log_bytes = database.log_size()
        self._told = self._told_wished = database.load_told()
        self._installs = 0
        self._wal_room = CHECKPOINT_BYTES
        self.commits = 0
        self.own_commits = 0
        self._folding: asyncio.Handle | None = None
        self._folding_soon = False
        self._thread_folds = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    # --- what is asked for --------------------------------------------------------------------

    def persist(self, ops: Sequence[PersistOp], *, is_primary: bool = True) -> None:
        """Queue operations; they are committed in order."""
        if self._failed:
            return
        self._patience_s = PATIENCE_PRIMARY_S if is_primary else PATIENCE_REPLICA_S
        for op in ops:
            self._own_bytes += _size(op)
        is_first = not self._own
        self._own.extend(ops)
        if not self._may_commit(ops):
            self._give()
        elif is_first:
            self._loop.call_soon(self._commit_own)

    def apply(self, decided: Sequence[Decided]) -> None:
        """Queue decided records for the tables; no hurry."""
        self._backlog.put(decided)
        self._fold_later()

    def note_told(self, told: Told, installs: int) -> None:
        """Save this with what is folded next; it is void once a snapshot has been installed that it
        does not know of (`installs`: how many it does)."""
        with self._wake:
            if installs == self._installs:
                self._told_wished = told

    def background(
        self, job: Callable[[Database], bool], on_done: Callable[[], None] | None = None
    ) -> None:
        """Do `job` on the thread, between commits, each step in a transaction of its own, until it
        returns True; then call `on_done` (on the thread). It replaces a job that is under way."""
        with self._wake:
            self._job, self._job_done, self._job_at_s = job, on_done, 0.0
            self._wake.notify()
        self._give()  # from here on the thread has the database

    async def stop(self) -> None:
        """Write what is queued, then end the thread."""
        if self._folding is not None:
            self._folding.cancel()
        self._give()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await self._loop.run_in_executor(None, self._thread.join)

    # --- the loop's part ----------------------------------------------------------------------

    def _is_mine(self) -> bool:
        """Whether the thread has nothing to do, so that the database is the loop's."""
        return not (self._given or self._job is not None or self._stopping)

    def _may_commit(self, ops: Sequence[PersistOp]) -> bool:
        return (
            self._is_mine()
            and not self._slow_for
            and self._own_bytes <= OWN_BYTES
            and all(isinstance(op, AppendLog | SaveState) for op in ops)
        )

    def _give(self, *chores: Callable[[], None]) -> None:
        """Give what the loop was about to commit, and these chores, to the thread."""
        ops, self._own, self._own_bytes = self._own, [], 0
        if self._failed or not (ops or chores):
            return
        self._given += 1
        with self._wake:
            self._queue.extend(ops)
            self._chores.extend(chores)
            self._pieces += 1
            self._wake.notify()

    def _commit_own(self) -> None:
        if not self._own or self._failed:
            return  # the thread has it, or nobody any more
        ops, self._own, self._own_bytes = self._own, [], 0
        began_s = time.perf_counter()
        try:
            number = self._write(ops)
        except Exception as e:  # noqa: BLE001 - whatever failed, the node must not go on
            self._fail(e)
            return
        self.own_commits += 1
        self._mean_s += (time.perf_counter() - began_s - self._mean_s) * _WEIGHT
        if self._mean_s > self._patience_s:
            self._slow_for, self._mean_s = THREAD_DOES, self._patience_s / 2
        self._on_durable(number, self._backlog.applied_seq)
        self._check_room()

    def _fold_own(self) -> None:
        """A slice of the backlog goes to the tables; the next one follows behind what waits."""
        self._folding = None
        if self._own:
            self._commit_own()  # somebody waits for this, for the tables nobody
        if self._failed or self._backlog.due_in_s() != 0:
            self._fold_later()
            return
        if not self._is_mine() or self._slow_for:
            self._thread_folds = True
            self._give(self._fold_slice)
            return
        try:
            self._fold_slice()
        except Exception as e:  # noqa: BLE001 - as above
            self._fail(e)
            return
        self._on_durable(0, self._backlog.applied_seq)
        self._check_room()
        self._fold_later()

    def _fold_later(self) -> None:
        """See to it that the backlog is folded in time."""
        if self._failed or self._thread_folds or self._stopping:
            return
        after_s = self._backlog.due_in_s()
        if self._folding is not None:
            if after_s or self._folding_soon:
                return
            self._folding.cancel()
        self._folding_soon = after_s == 0
        if after_s is None:
            self._folding = None
        elif after_s:
            self._folding = self._loop.call_later(after_s, self._fold_own)
        else:
            self._folding = self._loop.call_soon(self._fold_own)

    def _check_room(self) -> None:
        if self._wal_room < 0:
            self._wal_room = CHECKPOINT_BYTES
            self._give(self._database.checkpoint)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            self._on_failed(f"the database cannot be written: {error}")

    def _thread_did(self, pieces: int, number: int, applied_seq: int) -> None:
        """The thread has done so many pieces of work, and committed up to operation `number`."""
        self._given -= pieces
        self._on_durable(number, applied_seq)
        if number:
            self._slow_for = max(0, self._slow_for - 1)
            self._check_room()
        if not self._given:
            self._thread_folds = False
            self._fold_later()

    # --- the thread's part --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (work := self._take()) is not None:
                ops, chores, pieces = work
                if ops:
                    number = self._write(ops)
                    self._tell(self._thread_did, 0, number, self._backlog.applied_seq)
                for chore in chores:
                    chore()
                if pieces:
                    self._tell(self._thread_did, pieces, 0, self._backlog.applied_seq)
                if self._job is not None and time.monotonic() >= self._job_at_s:
                    self._step(self._job)
            while not self._failed and (self._backlog or self._told != self._told_wished):
                self._fold_slice()
        except Exception as e:  # noqa: BLE001 - whatever failed, the node must not go on
            self._tell(self._fail, e)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _take(self) -> tuple[list[PersistOp], list[Callable[[], None]], int] | None:
        """What the loop gave; nothing at all when only the background job is to go on. None: the
        end."""
        with self._wake:
            while not (self._pieces or self._stopping):
                wait_s = None
                if self._job is not None:
                    wait_s = self._job_at_s - time.monotonic()
                    if wait_s <= 0:
                        break
                self._wake.wait(wait_s)
            if self._stopping and not self._pieces:
                return None
            work = self._queue, self._chores, self._pieces
            self._queue, self._chores, self._pieces = [], [], 0
            return work

    def _step(self, job: Callable[[Database], bool]) -> None:
        """One step of the background job."""
        with self._database.transaction():
            through = job(self._database)
        done = None
        with self._wake:
            self._job_at_s = time.monotonic() + JOB_PAUSE_S
            if through and self._job is job:
                done, self._job, self._job_done = self._job_done, None, None
        if done is not None:
            done()

    # --- whoever's turn it is -----------------------------------------------------------------

    def _write(self, ops: Sequence[PersistOp]) -> int:
        """One transaction, one fsync; returns the number of its last operation."""
        for op in ops:
            if isinstance(op, InstallSnapshot):
                self._set_aside(op.begin)
        with self._database.transaction():
            for op in ops:
                self._persist(op)
        self.commits += 1
        return ops[-1].number

    def _persist(self, op: PersistOp) -> None:
        self._wal_room -= 2 * PAGE_BYTES
        match op:
            case AppendLog(_, records):
                size = self._database.append(records)
                self._wal_room -= size
                self._log_bytes += size
                self._log_count += len(records)
                self._log_first = self._log_first or records[0].seq
            case SaveState(_, state):
                self._database.save_state(state)
            case StageRows(_, rows, first):
                self._database.stage(rows, first=first)
                self._wal_room -= sum(map(len, rows))
            case InstallSnapshot(_, begin, state):
                self._database.install(begin.position, state)
                self._backlog.replaced(begin.position.seq)
                with self._wake:
                    self._installs += 1
                    self._told = self._told_wished = self._database.load_told()
                self._log_first, self._log_count, self._log_bytes = 0, 0, 0
                self._wal_room = -1

    def _fold_slice(self) -> None:
        """Decided records go to the tables, without an fsync: they are in the log."""
        with self._database.transaction(is_synced=False):
            self._wal_room -= self._backlog.fold()
            told = self._told_wished
            if told != self._told:
                self._database.save_told(told)
                self._told = told
            self._trim()

    def _trim(self) -> None:
        """Keep the log short, a little at a time; never what is not applied or has no audit line
        yet."""
        if self._log_count <= LOG_RECORDS and self._log_bytes <= LOG_BYTES:
            return
        below = min(
            self._log_first + TRIM_RECORDS, self._backlog.applied_seq, self._told.record + 1
        )
        if below > self._log_first:
            count, size = self._database.trim_log(below)
            self._log_first = below
            self._log_count -= count
            self._log_bytes -= size

    def _set_aside(self, begin: SnapshotBegin) -> None:
        """Keep what belongs to another history before a snapshot replaces it."""
        last = self._database.last()
        if not begin.set_aside or last.seq == 0:
            return
        path = self._quarantine_dir / f"quarantine-epoch{last.epoch}-seq{last.seq}.db"
        self._database.copy_to(path)
        self._tell(self._on_quarantine, path)


def _size(op: PersistOp) -> int:
    return sum(len(r.payload) for r in op.records) if isinstance(op, AppendLog) else 0
