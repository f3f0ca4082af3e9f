"""The one writer: a thread that makes everything durable, many requests to one fsync.

No timer: what gathered while the last transaction was being committed goes into the next. Applying
decided records to the tables needs no fsync of its own (the log already has them), so it rides
along with the next append, or goes alone when nothing was written for a moment.

A commit that fails ends the node: after a failed fsync nobody knows what the disk holds, and going
on would be a guess (fsyncgate, 2018).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from secure_store.core.audit import Told
from secure_store.core.effects import (
    AppendLog,
    InstallSnapshot,
    PersistOp,
    SaveState,
    StageRows,
)
from secure_store.core.kv import Damaged
from secure_store.core.messages import SnapshotBegin
from secure_store.core.records import Record
from secure_store.storage.database import Database

LAZY_APPLY_S = 0.05
APPLY_RECORDS = 256
JOB_PAUSE_S = 0.02
LOG_RECORDS = 20_000
LOG_BYTES = 64 << 20


@dataclass(slots=True)
class _Work:
    persist: list[PersistOp] = field(default_factory=list)
    apply: list[Record] = field(default_factory=list)


class Writer:
    """`on_durable(persisted number, applied seq)` is called on this thread after each commit.

    `on_failed(reason)` is called once, when the disk failed; nothing is written after it.
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
        self._lock = threading.Condition()
        self._work = _Work()
        self._urgent = False
        self._stopping = False
        self._apply_since_s: float | None = None  # when the oldest record to apply was decided
        self._applied_seq = database.applied().seq
        self._tokens = database.load_tokens()
        self._log_first, self._log_count, self._log_bytes = database.log_size()
        self._told = self._told_wished = database.load_told()
        self._installs = 0
        self.commits = 0
        self._job: Callable[[Database], bool] | None = None
        self._job_done: Callable[[], None] | None = None
        self._job_at_s = 0.0
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def persist(self, ops: list[PersistOp]) -> None:
        """Queue operations; they are committed in order."""
        with self._lock:
            self._work.persist.extend(ops)
            self._urgent = True
            self._lock.notify()

    def apply(self, records: list[Record]) -> None:
        """Queue decided records for the tables; no hurry."""
        with self._lock:
            self._work.apply.extend(records)
            if self._apply_since_s is None:
                self._apply_since_s = time.monotonic()
            self._lock.notify()

    def note_told(self, told: Told, installs: int) -> None:
        """Save this with the next commit; it is void once a snapshot has been installed that it
        does not know of (`installs`: how many it does)."""
        with self._lock:
            if installs == self._installs:
                self._told_wished = told

    def background(
        self, job: Callable[[Database], bool], on_done: Callable[[], None] | None = None
    ) -> None:
        """Do `job` between commits, each step in a transaction of its own, until it returns True;
        then call `on_done` (on this thread). It replaces a job that is under way."""
        with self._lock:
            self._job, self._job_done, self._job_at_s = job, on_done, 0.0
            self._lock.notify()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (work := self._take()) is not None:
                if work.persist or work.apply:
                    number = self._write(work)
                    self._on_durable(number, self._applied_seq)
                if self._job is not None and time.monotonic() >= self._job_at_s:
                    self._step(self._job)
        except (sqlite3.Error, Damaged, OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
            self._on_failed(f"the database cannot be written: {e}")

    def _take(self) -> _Work | None:
        with self._lock:
            while not (self._urgent or self._stopping):
                wait_s = LAZY_APPLY_S if self._work.apply else None
                if self._job is not None:
                    job_s = self._job_at_s - time.monotonic()
                    if job_s <= 0:
                        break
                    wait_s = min(job_s, wait_s or job_s)
                waited_in_vain = not self._lock.wait(wait_s)
                if waited_in_vain and self._work.apply:
                    break
            work, self._work = self._work, _Work()
            self._urgent = False
            if work.persist and not self._stopping and not self._must_apply(work):
                self._work.apply, work.apply = work.apply, []
            else:
                self._apply_since_s = None
            ended = self._stopping and not (work.persist or work.apply)
            return None if ended else work

    def _must_apply(self, work: _Work) -> bool:
        """Whether decided records go along with this commit. Soon enough they do; earlier they
        would only make its transaction longer, and a client waits for that."""
        if len(work.apply) >= APPLY_RECORDS or any(
            isinstance(op, InstallSnapshot) for op in work.persist
        ):
            return True
        since_s = self._apply_since_s
        return since_s is not None and time.monotonic() - since_s >= LAZY_APPLY_S

    def _step(self, job: Callable[[Database], bool]) -> None:
        """One step of the background job."""
        self._database.begin()
        try:
            through = job(self._database)
            self._database.commit()
        except BaseException:
            self._database.rollback()
            raise
        done = None
        with self._lock:
            self._job_at_s = time.monotonic() + JOB_PAUSE_S
            if through and self._job is job:
                done, self._job, self._job_done = self._job_done, None, None
        if done is not None:
            done()

    def _write(self, work: _Work) -> int:
        """One transaction; returns the number of its last persist operation (0: none)."""
        database = self._database
        for op in work.persist:
            if isinstance(op, InstallSnapshot):
                self._set_aside(op.begin)
        database.begin()
        try:
            number = 0
            # Decided records first: they are older than anything that is being appended,
            # and a snapshot that is being installed replaces them.
            records = tuple(r for r in work.apply if r.seq > self._applied_seq)
            if records:
                database.apply(records, self._tokens, self._now_ms())
                self._applied_seq = records[-1].seq
            told = self._told_wished
            if told != self._told:
                database.save_told(told)
                self._told = told
            for op in work.persist:
                self._persist(op)
                number = op.number
            self._trim()
            database.commit()
        except BaseException:
            database.rollback()
            raise
        self.commits += 1
        return number

    def _set_aside(self, begin: SnapshotBegin) -> None:
        """Keep what belongs to another history before a snapshot replaces it."""
        last = self._database.last()
        if not begin.set_aside or last.seq == 0:
            return
        path = self._quarantine_dir / f"quarantine-epoch{last.epoch}-seq{last.seq}.db"
        self._database.copy_to(path)
        self._on_quarantine(path)

    def _persist(self, op: PersistOp) -> None:
        match op:
            case AppendLog(_, records):
                self._log_bytes += self._database.append(records)
                self._log_count += len(records)
            case SaveState(_, state):
                self._database.save_state(state)
            case StageRows(_, rows, first):
                self._database.stage(rows, first=first)
            case InstallSnapshot(_, begin, state):
                self._database.install(begin.position, state)
                self._applied_seq = begin.position.seq
                with self._lock:
                    self._installs += 1
                    self._told = self._told_wished = self._database.load_told()
                self._tokens = self._database.load_tokens()
                self._log_first, self._log_count, self._log_bytes = 0, 0, 0

    def _trim(self) -> None:
        """Keep the log short: half of it goes when it is too long, never what is not applied or
        has no audit line yet."""
        if self._log_count <= LOG_RECORDS and self._log_bytes <= LOG_BYTES:
            return
        first, count, _ = self._database.log_size()
        below = min(first + count // 2, self._applied_seq, self._told.record + 1)
        if below > first:
            self._database.trim_log(below)
        self._log_first, self._log_count, self._log_bytes = self._database.log_size()
