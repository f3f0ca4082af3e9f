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
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
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
from secure_store.storage.audit_worker import End, Haste, Worker
from secure_store.storage.keyring import Keyring

WATCH_S = 0.1
MAX_WAITING = 50_000
MAX_BACKLOG_BYTES = 16 << 20
HUNG_AFTER = 7  # looks without any progress
COPY_LINES = 10_000


class AuditUnavailable(Exception):
    """No sink can be written: the request must be refused."""


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
        self._workers = [Worker(sink, self._end, self._on_progress) for sink in sinks]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reads: list[tuple[str, str, str, str, str, int]] = []  # came, not chained yet
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
        if self._reads:
            self._chain_reads()
        return self._last[0]

    @property
    def fsyncs(self) -> int:
        return sum(worker.fsyncs for worker in self._workers)

    def stop(self) -> None:
        """Write what is waiting, then end the threads. (Not on the event loop: it waits.)"""
        self._chain_reads()
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
        epoch: int = 0,
        at_ms: int | None = None,
        urgent: bool = False,
    ) -> asyncio.Future[None] | None:
        """Add one line; an urgent one gives a future that is done when it is durable. (Behind those
        of records comes `write_out`.)"""
        if self._reads:
            self._chain_reads()  # they came before
        seq = self._last[0] + 1
        entry = Entry(
            action=action,
            addr=addr,
            detail=detail,
            epoch=epoch,
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
        self._look_after()
        haste = Haste.SYNCED if urgent else Haste.GATHERED
        for worker in self._workers:
            worker.put(line, end, haste)
        return self._wait(self._for_disk, seq) if urgent else None

    def note_read(self, action: str, addr: str, request_id: str, who: str, key: str) -> None:
        """Add the line of a read that was allowed. Lines of one turn of the loop are chained
        together at its end, in the order in which they came, before any other line."""
        if not self._reads and self._loop is not None:
            self._loop.call_soon(self._chain_reads)
        self._reads.append((action, addr, request_id, who, key, time.time_ns() // 1_000_000))

    def _chain_reads(self) -> None:
        reads, self._reads = self._reads, []
        if not reads:
            return
        seq, mac = self._last
        chain, node = self._chainer.line, self._node_id
        lines: list[bytes] = []
        for action, addr, request_id, who, key, at_ms in reads:
            seq += 1
            entry = Entry(
                action=action, addr=addr, key=key, node=node, outcome="allowed",
                request_id=request_id, seq=seq, status=200, ts=self.stamp(at_ms), who=who,
            )  # fmt: skip
            line, mac = chain(mac, entry)
            lines.append(line)
        self._last = end = (seq, mac)
        self._look_after()
        for worker in self._workers:
            worker.put(b"".join(lines), end, Haste.GATHERED)

    def _look_after(self) -> None:
        if self._watching is None and self._loop is not None:
            self._watching = self._loop.call_later(WATCH_S, self._watch)

    def written(self, seq: int) -> asyncio.Future[None] | None:
        """When entry `seq` is in a file (of this machine's memory at least); None: it is."""
        return None if seq <= self._written_seq else self._wait(self._for_file, seq)

    def write_out(self) -> None:
        """Hand every line to the operating system: to one file at least (see `written`)."""
        if self._loop is None:
            return
        if self._reads:
            self._chain_reads()
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

    def _on_progress(self, worker: Worker) -> None:
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
