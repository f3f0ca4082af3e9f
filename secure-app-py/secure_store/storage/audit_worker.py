"""The thread of one audit file, and what the event loop may write itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum

from secure_store.storage.audit_files import Sink

GATHER_S = 0.1
RETRY_S = 0.2
PATIENCE_S = 0.005  # a write that took the loop longer was the last for a while
THREAD_DOES = 100


class Haste(IntEnum):
    """How soon a line is wanted on the disk."""

    GATHERED = 0
    WRITTEN = 1
    SYNCED = 2


End = tuple[int, bytes]  # (seq, mac) of a line


class Worker:
    """The thread of one sink. `on_progress(worker)` is called on it after each step."""

    def __init__(self, sink: Sink, end: End, on_progress: Callable[[Worker], None]) -> None:
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
