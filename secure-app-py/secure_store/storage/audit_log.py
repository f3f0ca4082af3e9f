"""The audit log at work: lines are chained on the event loop, and each sink's thread writes them.

A line is chained when its request is answered, so its number is known at once. Each sink has a
thread of its own: one that hangs or fails holds up none of the others, and a line counts as soon as
*one* sink has it (vault #18943: one device that hung stopped everything). Three kinds of haste:

* lines are gathered for 0.1 s, written and fsynced together;
* a *record's* line (a write: its content is durable already, in the log of both nodes, see
  changes.Audited) is handed to the operating system before its answer, and fsynced with the others
  soon after. The loop does that itself (`write_out`), a few microseconds for all that were decided
  together; only if the file is not ready for it (it failed, is full, was slow) is its thread woken;
* an *urgent* line (a denial, a failure) is fsynced at once, with whatever waits.

If no sink can be written, or all hang, `unavailable()` says so and requests are refused; what was
chained before waits in memory for the disk, what is refused meanwhile is counted and told in one
line.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import IntEnum
from itertools import islice
from pathlib import Path

import msgspec

from secure_store.config import ConfigError
from secure_store.core.audit import Chainer, Entry, Head
from secure_store.storage.audit_files import (
    Sink,
    entries_after,
    raw_lines,
    read_end,
    set_torn_aside,
)
from secure_store.storage.keyring import Keyring

GATHER_S = 0.1
RETRY_S = 0.2
WATCH_S = 0.1
MAX_WAITING = 50_000
MAX_BACKLOG_BYTES = 16 << 20
HUNG_AFTER = 7  # looks without any progress
COPY_LINES = 10_000
PATIENCE_S = 0.005  # a write that took the loop longer was the last for a while
THREAD_DOES = 100


class AuditUnavailable(Exception):
    """No sink can be written: the request must be refused."""


class Haste(IntEnum):
    """How soon a line is wanted on the disk."""

    GATHERED = 0
    WRITTEN = 1
    SYNCED = 2


End = tuple[int, bytes]  # (seq, mac) of a line


class _Worker:
    """The thread of one sink. `on_progress(worker)` is called on it after each step."""

    def __init__(self, sink: Sink, end: End, on_progress: Callable[[_Worker], None]) -> None:
        self.sink = sink
        self.written: End = end  # one object, one store: read by the loop as it is
        self.durable: End = end
        self.failure: str | None = None
        self.given_up = False
        self.fsyncs = 0
        self._on_progress = on_progress
        self._lock = threading.Condition()
        self._lines: list[bytes] = []
        self._bytes = 0
        self._last = end
        self._haste = Haste.GATHERED
        self._due: float | None = None  # monotonic: by then what was put is to be durable
        self._stopping = False
        self._slow_for = 0  # writes that the thread shall do
        self.thread = threading.Thread(target=self._run, name="audit", daemon=True)

    def put(self, line: bytes, end: End, haste: Haste) -> None:
        """(Event loop.) Queue one line."""
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
            self._last = end
            if self._due is None:
                self._due = time.monotonic() + GATHER_S
                self._lock.notify()
            if haste > self._haste:
                self._haste = haste
                self._lock.notify()

    def write_now(self) -> bool:
        """(Event loop.) Hand everything that was put to the operating system; False if that is the
        thread's to do."""
        if self.given_up or self._slow_for or not self.sink.mutex.acquire(blocking=False):
            self._slow_for = max(0, self._slow_for - 1)
            return False
        try:
            if not self.sink.takes_now(self._bytes):
                return False
            data, last = self._all()
            began = time.monotonic()
            if not self.sink.append(data):
                return False  # the thread tries again, and reports
            self.written = last
            if time.monotonic() - began > PATIENCE_S:
                self._slow_for = THREAD_DOES
        finally:
            self.sink.mutex.release()
        return True

    def hurry(self, haste: Haste) -> None:
        """(Event loop.) What was put is wanted so soon."""
        with self._lock:
            if haste > self._haste:
                self._haste = haste
                self._lock.notify()

    def _all(self) -> tuple[bytes, End]:
        with self._lock:
            lines, self._lines, self._bytes = self._lines, [], 0
            return b"".join(lines), self._last

    @property
    def backlog_bytes(self) -> int:
        return self._bytes + self.sink.backlog_bytes

    def give_up(self) -> None:
        """(Event loop.) Too far behind: this sink is made whole at the next start."""
        with self._lock:
            self.given_up = True
            self._lines.clear()
            self._lock.notify()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify()

    def _run(self) -> None:
        while (sync := self._next()) is not None:
            with self.sink.mutex:  # nobody comes between taking lines and writing them
                data, last = self._all()
                done = self.sink.append(data)
                if done:
                    self.written = last
            if done:
                if not sync:
                    self._report(None)
                    continue
                done = self.sink.sync()
                self.fsyncs += 1
            if done:
                self.durable = last
                self._settled()
                self._report(None)
                continue
            self._report(self.sink.failure)
            if self._stopping:
                return
            time.sleep(RETRY_S)
            with self._lock:
                self._haste = Haste.SYNCED  # try again, with what has come meanwhile

    def _next(self) -> bool | None:
        """Wait for work: whether to fsync. None: the end."""
        with self._lock:
            while not (self._stopping or self.given_up or self._haste):
                left_s = None if self._due is None else self._due - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self._lock.wait(left_s)
            if self.given_up or (self._stopping and self._due is None):
                return None
            overdue = self._due is not None and self._due <= time.monotonic()
            sync = self._haste is Haste.SYNCED or overdue or self._stopping
            self._haste = Haste.GATHERED
            return sync

    def _settled(self) -> None:
        with self._lock:
            behind = self._last != self.durable
            self._due = time.monotonic() + GATHER_S if behind else None

    def _report(self, failure: str | None) -> None:
        self.failure = failure
        self._on_progress(self)


class AuditLog:
    """Used on the event loop; the threads are its own."""

    def __init__(
        self,
        node_id: str,
        log_id: str,
        keyring: Keyring,
        paths: tuple[Path, ...],
        *,
        on_state: Callable[[str | None], None],
    ) -> None:
        self._node_id = node_id
        self._log_id = log_id
        self._key = keyring.audit_mac_key
        self._chainer = Chainer(self._key)
        self._signer = keyring.signer
        self._path = paths[0]
        self._on_state = on_state  # (failure or None) on the loop, when it changes
        self.torn = 0
        self.misfit = False
        sinks = [Sink(path) for path in paths]
        self._last = self._end = self._recover(sinks)
        self._written_seq = self._end[0]
        self._workers = [_Worker(sink, self._end, self._on_progress) for sink in sinks]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._for_disk: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._for_file: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._stalled = 0  # looks, WATCH_S apart, at lines that wait and do not move
        self._failure: str | None = None
        self._refused = 0
        self._watching: asyncio.TimerHandle | None = None
        self._signed = Head(log_id, "", node_id, -1)
        self._second: tuple[int, str] = (-1, "")

    def _recover(self, sinks: list[Sink]) -> End:
        """Continue the chain where the longest sink ends; mend torn ends and shorter sinks."""
        for sink in sinks:
            if sink.path.exists() and not sink.path.is_file():  # a pipe keeps nothing, and hangs
                raise ConfigError(f"audit file {sink.path}: not a regular file")
        try:
            ends = [read_end(sink.path, self._key) for sink in sinks]
            for sink, end in zip(sinks, ends, strict=True):
                if end.torn:
                    set_torn_aside(sink.path, end.torn)
                    self.torn += len(end.torn)
                self.misfit = self.misfit or not end.fits
            best = max(range(len(ends)), key=lambda i: ends[i].seq)
            for sink, end in zip(sinks, ends, strict=True):
                sink.open()
                if end.seq < ends[best].seq:
                    _copy(islice(raw_lines(sinks[best].path), end.seq, None), sink)
        except OSError as e:
            raise ConfigError(f"audit file {e.filename}: {e.strerror or e}") from None
        return ends[best].seq, ends[best].mac

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.thread.start()

    @property
    def seq(self) -> int:
        """The last durable entry."""
        return self._end[0]

    @property
    def noted_seq(self) -> int:
        """The last entry, durable or not."""
        return self._last[0]

    @property
    def fsyncs(self) -> int:
        return sum(worker.fsyncs for worker in self._workers)

    def stop(self) -> None:
        """Write what is waiting, then end the threads. (Not on the event loop: it waits.)"""
        for worker in self._workers:
            worker.stop()
        until = time.monotonic() + 2.0
        for worker in self._workers:
            worker.thread.join(max(0.0, until - time.monotonic()))

    def records_since(self, seq: int) -> set[tuple[int, str, str]]:
        """(record, request id, time) of the lines after entry `seq` that tell of a record."""
        found = (line for line, _ in entries_after(self._path, seq))
        return {(line.record, line.request_id, line.ts) for line in found if line.record}

    # --- noting -------------------------------------------------------------------------------

    def unavailable(self) -> str | None:
        """Why no request may be served now, or None. A disk that hangs counts after 0.7 s (of this
        loop's time: a process that was stopped for a while has not waited)."""
        if self._failure is not None:
            return self._failure
        waiting = self._last[0] - self._written_seq
        return "too many lines are waiting" if waiting > MAX_WAITING else None

    def note(
        self,
        action: str,
        *,
        addr: str,
        outcome: str,
        request_id: str,
        status: int,
        who: str,
        key: str = "",
        detail: str = "",
        record: int = 0,
        at_ms: int | None = None,
        urgent: bool = False,
    ) -> asyncio.Future[None] | None:
        """Add one line; an urgent one gives a future that is done when it is durable. (Behind those
        of records comes `write_out`.)"""
        seq = self._last[0] + 1
        entry = Entry(
            action=action,
            addr=addr,
            detail=detail,
            key=key,
            node=self._node_id,
            outcome=outcome,
            record=record,
            request_id=request_id,
            seq=seq,
            status=status,
            ts=self.stamp(at_ms),
            who=who,
        )
        line, mac = self._chainer.line(self._last[1], entry)
        self._last = end = (seq, mac)
        if self._watching is None and self._loop is not None:
            self._watching = self._loop.call_later(WATCH_S, self._watch)
        haste = Haste.SYNCED if urgent else Haste.GATHERED
        for worker in self._workers:
            worker.put(line, end, haste)
        return self._wait(self._for_disk, seq) if urgent else None

    def written(self, seq: int) -> asyncio.Future[None] | None:
        """When entry `seq` is in a file (of this machine's memory at least); None: it is."""
        return None if seq <= self._written_seq else self._wait(self._for_file, seq)

    def write_out(self) -> None:
        """Hand every line to the operating system: to one file at least (see `written`)."""
        if self._loop is None:
            return
        for worker in self._workers:
            if worker.write_now():
                self._written_seq = max(self._written_seq, worker.written[0])
                return
        for worker in self._workers:
            worker.hurry(Haste.WRITTEN)

    def refuse(self) -> None:
        """A request is refused because its line could not be written: it is only counted, so that
        nothing grows while the disk is away."""
        self._refused += 1

    def _wait(
        self, queue: deque[tuple[int, asyncio.Future[None]]], seq: int
    ) -> asyncio.Future[None] | None:
        if self._loop is None:
            return None
        future: asyncio.Future[None] = self._loop.create_future()
        queue.append((seq, future))
        return future

    def stamp(self, at_ms: int | None) -> str:
        """A time (UTC ms; None: now) as it stands in a line."""
        ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
        second = ms // 1000
        if self._second[0] != second:
            text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self._second = (second, text)
        return f"{self._second[1]}.{ms % 1000:03d}Z"

    def signed_head(self) -> Head:
        """The end of the durable chain, signed; the same object while it has not moved."""
        seq, mac = self._end
        if self._signed.seq != seq:
            head = Head(self._log_id, mac.hex(), self._node_id, seq)
            signature = self._signer.sign(head.signed_text()).hex()
            self._signed = msgspec.structs.replace(head, signature=signature)
        return self._signed

    # --- what the threads tell ----------------------------------------------------------------

    def _on_progress(self, worker: _Worker) -> None:
        """(A sink's thread.)"""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._progress)

    def _progress(self) -> None:
        """Take over how far the sinks are; whoever waits for that goes on."""
        live = [w for w in self._workers if not w.given_up]
        durable = max((w.durable for w in self._workers), key=lambda end: end[0])
        written_seq = max(w.written[0] for w in self._workers)
        if durable[0] > self._end[0] or written_seq > self._written_seq:
            self._stalled = 0
        self._end = durable
        self._written_seq = max(written_seq, durable[0])
        _done(self._for_disk, durable[0])
        _done(self._for_file, self._written_seq)
        failures = [w.failure for w in live if w.failure is not None]
        if len(failures) == len(live):
            self._fail("; ".join(failures))
        elif self._failure is not None and self.seq == self._last[0]:
            self._failure = None
            self._on_state(None)
            self._tell_refused()
        ahead = [w for w in live if w.durable[0] == durable[0] and w.failure is None]
        for behind in live:
            if behind not in ahead and ahead and behind.backlog_bytes > MAX_BACKLOG_BYTES:
                behind.give_up()

    def _fail(self, failure: str) -> None:
        if self._failure is None:
            self._failure = failure
            self._on_state(failure)
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        for queue in (self._for_disk, self._for_file):
            while queue:
                _, future = queue.popleft()
                if not future.done():
                    future.set_exception(AuditUnavailable("no audit sink can be written"))

    def _watch(self) -> None:
        """Nobody waits for a disk that hangs."""
        self._watching = None
        if self._end[0] == self._last[0] or self._loop is None:
            self._stalled = 0
            return
        self._stalled += 1
        if self._stalled >= HUNG_AFTER:
            self._fail("the audit disk hangs")
        self._watching = self._loop.call_later(WATCH_S, self._watch)

    def _tell_refused(self) -> None:
        if self._refused:
            refused, self._refused = self._refused, 0
            self.note(
                "audit.refused",
                addr="",
                outcome="system",
                request_id="",
                status=503,
                who=f"node:{self._node_id}",
                detail=f"{refused} requests were refused while no audit file could be written",
            )


def _done(queue: deque[tuple[int, asyncio.Future[None]]], seq: int) -> None:
    while queue and queue[0][0] <= seq:
        future = queue.popleft()[1]
        if not future.done():
            future.set_result(None)


def _copy(lines: Iterator[bytes], sink: Sink) -> None:
    """Write what a sink lacks; raises ConfigError if it cannot be written."""
    while page := list(islice(lines, COPY_LINES)):
        if not (sink.append(b"".join(page)) and sink.sync()):
            raise ConfigError(f"audit file {sink.failure}")
