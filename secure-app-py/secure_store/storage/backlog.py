"""Decided records on their way to the tables."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from secure_store.core.changes import PutValue
from secure_store.storage.database import Database
from secure_store.storage.fold import Decided

FOLD_AFTER_S = 0.5  # the oldest waits no longer than this,
FOLD_RECORDS = 1_024  # nor do more than this many wait,
FOLD_BYTES = 8 << 20  # or more than this much of values
SLICE_RECORDS = 128
SLICE_BYTES = 512 << 10
_ENTRY_BYTES = 300  # of the write-ahead log, a changed row


class Backlog:
    """Filled by the event loop; emptied by whoever has the database."""

    def __init__(self, database: Database, now_ms: Callable[[], int]) -> None:
        self._database = database
        self._now_ms = now_ms
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Decided, int]] = deque()  # with its size
        self._bytes = 0
        self._since_s = 0.0  # when the oldest came
        self._due = 0  # records that were due at some look, and are not folded yet
        self._tokens = database.load_tokens()
        self.applied_seq = database.applied().seq

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, decided: Sequence[Decided]) -> None:
        with self._lock:
            if not self._waiting:
                self._since_s = time.monotonic()
            for each in decided:
                size = sum(len(c.value) for c in each.changes if isinstance(c, PutValue))
                self._waiting.append((each, size))
                self._bytes += size

    def due_in_s(self) -> float | None:
        """When to fold the next slice: 0: now; None: nothing waits. Once begun, it goes on with
        what was there at the beginning; what has come since waits its time."""
        with self._lock:
            if not self._waiting:
                return None
            left_s = self._since_s + FOLD_AFTER_S - time.monotonic()
            is_full = len(self._waiting) >= FOLD_RECORDS or self._bytes >= FOLD_BYTES
            if self._due == 0 and (left_s <= 0 or is_full):
                self._due = len(self._waiting)
            return 0.0 if self._due else left_s

    def fold(self) -> int:
        """The next slice, in the caller's transaction; gives about how many bytes that writes."""
        with self._lock:
            taken: list[Decided] = []
            size = 0
            while self._waiting and len(taken) < SLICE_RECORDS and size < SLICE_BYTES:
                each, bytes_ = self._waiting.popleft()
                taken.append(each)
                size += bytes_
            self._bytes -= size
            self._due = max(0, self._due - len(taken))
            self._since_s = time.monotonic()
        taken = [each for each in taken if each.position.seq > self.applied_seq]
        if not taken:
            return 0
        self._database.fold(taken, self._tokens, self._now_ms())
        self.applied_seq = taken[-1].position.seq
        return 2 * size + len(taken) * _ENTRY_BYTES

    def replaced(self, seq: int) -> None:
        """A snapshot that ends at record `seq` has replaced the tables, and what waited for
        them."""
        with self._lock:
            self._waiting.clear()
            self._bytes = self._due = 0
        self.applied_seq = seq
        self._tokens = self._database.load_tokens()
