"""Main memory as a home needs it: load records, save what was logged.

A version must never mean two values, so a deleted key keeps its version for a while (a tombstone).
Tombstones are not kept for ever: when there are more than MOST_TOMBSTONES, some go, and what they
forbade is remembered in a *floor*, the highest version ever removed among the keys of one of 2^20
buckets. A key without a record begins above its bucket's floor.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

from mesi_cache.core.directory.retries import RetryRow
from mesi_cache.core.records import Outcome, Record

AppliedRow = tuple[str, int, int, Outcome | None]

BUCKETS = 1 << 20
MOST_TOMBSTONES = 10_000
SWEEP = 1_000  # rows that one save removes at most
OVERDUE_MS = 60_000  # a value whose time is up so long ago, and that nobody asked for, is removed
RESERVED = "\x00"  # first character of keys that no client can name


def bucket(key: str) -> int:
    return crc32(key.encode()) & (BUCKETS - 1)


class StoreUnavailable(Exception):
    """Main memory does not answer now; it is asked again later."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What one write-back carries. `wall_ms` is the time of it."""

    records: Sequence[tuple[str, Record]]
    applied: Sequence[AppliedRow]  # all of them
    retries: Sequence[RetryRow]  # new ones
    wall_ms: float


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restarted home remembers beside its keys."""

    applied: list[AppliedRow] = field(default_factory=list)
    retries: list[RetryRow] = field(default_factory=list)


Loaded = Record | None | StoreUnavailable


class Store(Protocol):
    """Main memory. Its methods are called on the event loop, one `save` at a time."""

    async def load(self, keys: Sequence[str]) -> Sequence[Loaded]:
        """The records of `keys`: None where there never was one."""

    async def save(self, saving: Saving) -> None:
        """Take all of it over, durably. Raises StoreUnavailable: then it must be called again."""

    async def stop(self) -> None:
        """Close connections."""

    def restored(self) -> Restored:
        """What the last `save` was given, for a new life."""

    def close(self) -> None:
        """Let go of files, after the event loop has stopped."""


class MemoryStore:
    """Main memory that ends with the process."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._floors: dict[int, int] = {}
        self._tombstones: dict[str, None] = {}
        self._deadlines: list[tuple[int, str]] = []

    def now(self, key: str) -> Record | None:
        """As `load`, at once."""
        record = self._records.get(key)
        if record is None and (floor := self._floors.get(bucket(key))):
            return Record(None, floor)
        return record

    async def load(self, keys: Sequence[str]) -> Sequence[Loaded]:
        return [self.now(key) for key in keys]

    async def save(self, saving: Saving) -> None:
        for key, record in saving.records:
            self._records[key] = record
            self._tombstones.pop(key, None)
            if record.value is None:
                self._tombstones[key] = None
            elif record.expires_ms:
                heapq.heappush(self._deadlines, (record.expires_ms, key))
        before_ms = saving.wall_ms - OVERDUE_MS
        while self._deadlines and self._deadlines[0][0] < before_ms:
            expires_ms, key = heapq.heappop(self._deadlines)
            found = self._records.get(key)
            if found is not None and found.expires_ms == expires_ms:
                self._remove(key)
        while len(self._tombstones) > MOST_TOMBSTONES:
            self._remove(next(iter(self._tombstones)))

    def _remove(self, key: str) -> None:
        version = self._records.pop(key).version
        self._tombstones.pop(key, None)
        self._floors[bucket(key)] = max(self._floors.get(bucket(key), 0), version)

    async def stop(self) -> None:
        pass

    def restored(self) -> Restored:
        return Restored()

    def close(self) -> None:
        pass
