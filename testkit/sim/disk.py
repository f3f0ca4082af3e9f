"""A disk that loses what was not synced.

Three levels, as on a real machine: *buffered* (put, append … were called), *flushed* (`flush()`:
the write call returned; it survives the death of the process) and *synced* (`sync(token)` has
completed; it survives a power cut). A crash keeps a random prefix of what its level does not
protect, and may tear the next append. Operations are applied in order: a prefix is a possible disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from testkit.sim.clock import Clock


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """`atomic`: what lies between two syncs is one transaction (SQLite), kept whole or not at all.

    `torn` is the chance that the first append that was lost left half of itself behind.
    """

    sync_ms: tuple[float, float] = (0.1, 1.0)
    slow: float = 0.01
    slow_ms: float = 30.0
    atomic: bool = False
    torn: float = 0.3


@dataclass(frozen=True, slots=True)
class Damaged:
    """What recovery finds in place of a record that is torn or corrupt (a checksum would tell).

    A torn record of `bytes` is simply shorter; any other type becomes this.
    """

    why: str


class _Image:
    __slots__ = ("logs", "values")

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.logs: dict[str, list[Any]] = {}

    def copy(self) -> _Image:
        other = _Image()
        other.values = dict(self.values)
        other.logs = {name: list(records) for name, records in self.logs.items()}
        return other

    def apply(self, operation: tuple[Any, ...]) -> None:
        match operation:
            case ("put", key, value):
                self.values[key] = value
            case ("delete", key):
                self.values.pop(key, None)
            case ("append", name, record):
                self.logs.setdefault(name, []).append(record)
            case ("truncate", name, keep):
                del self.logs.setdefault(name, [])[keep:]
            case ("drop_prefix", name, count):
                del self.logs.setdefault(name, [])[:count]
            case ("remove_log", name):
                self.logs.pop(name, None)
            case _:
                raise AssertionError(f"unknown disk operation {operation!r}")


class Disk:
    """One node's disk. Values and records must be immutable: they are kept by reference.

    Reads see everything written, synced or not, as a process sees its own page cache.
    """

    def __init__(
        self,
        clock: Clock,
        rng: Random,
        on_sync: Callable[[Any, bool], None],
        settings: DiskSettings | None = None,
    ) -> None:
        self.settings = settings or DiskSettings()
        self.syncs = 0
        self._clock = clock
        self._rng = rng
        self._on_sync = on_sync
        self._durable = _Image()
        self._visible = _Image()
        self._pending: list[tuple[Any, ...]] = []
        self._flushed = 0  # so many of _pending survive the death of the process
        self._boundaries: list[int] = []  # where syncs cut _pending into transactions
        self._free_at_us = 0
        self._life = 0
        self._fail_next = False

    # -- what a node calls -----------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        return self._visible.values.get(key, default)

    def items(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """(key, value) pairs in order of key."""
        for key in sorted(self._visible.values):
            if key.startswith(prefix):
                yield key, self._visible.values[key]

    def log(self, name: str = "log") -> list[Any]:
        """A copy of the records of one append-only log."""
        return list(self._visible.logs.get(name, ()))

    def logs(self) -> list[str]:
        """The names of the logs, in order."""
        return sorted(self._visible.logs)

    def put(self, key: str, value: Any) -> None:
        """Write a value (buffered)."""
        self._write(("put", key, value))

    def delete(self, key: str) -> None:
        """Remove a value (buffered)."""
        self._write(("delete", key))

    def append(self, record: Any, name: str = "log") -> None:
        """Add a record at the end of a log (buffered)."""
        self._write(("append", name, record))

    def truncate(self, keep: int, name: str = "log") -> None:
        """Keep only the first `keep` records."""
        self._write(("truncate", name, keep))

    def drop_prefix(self, count: int, name: str = "log") -> None:
        """Forget the first `count` records (compaction)."""
        self._write(("drop_prefix", name, count))

    def remove_log(self, name: str) -> None:
        """Delete a whole log (a segment)."""
        self._write(("remove_log", name))

    def flush(self) -> None:
        """All that was written so far survives the death of the process (not a power cut)."""
        self._flushed = len(self._pending)

    def sync(self, token: Any = None) -> None:
        """Make all that was written so far durable; the node hears `on_sync_done(token)` later.

        A sync that is under way protects nothing: the process may die before its write call.
        Syncs complete in order. A failed one is told by `on_sync_failed(token)`; what it covered
        is lost from the cache as on Linux (a second fsync would lie), so the node must halt.
        """
        self.syncs += 1
        position = len(self._pending)
        self._boundaries.append(position)
        low, high = self.settings.sync_ms
        if self.settings.slow and self._rng.random() < self.settings.slow:
            high = self.settings.slow_ms
        taken_us = int((low + (high - low) * self._rng.random()) * 1000)
        self._free_at_us = max(self._free_at_us, self._clock.now_us) + taken_us
        self._clock.call_at(self._free_at_us, self._synced, self._life, token)

    @property
    def unsynced(self) -> int:
        """How many operations a power cut could lose now."""
        return len(self._pending)

    # -- faults ----------------------------------------------------------------------------------

    def fail_next_sync(self) -> None:
        """The next sync to complete reports an error instead."""
        self._fail_next = True

    def heal(self) -> None:
        """Take back `fail_next_sync`."""
        self._fail_next = False

    def crash(self, *, power: bool = False) -> None:
        """The process dies (`power`: the machine does). The surviving prefix becomes the disk."""
        safe = 0 if power else self._flushed
        if self.settings.atomic:
            ends = [0, *self._boundaries, safe]
            kept = self._rng.choice([end for end in ends if end >= safe])
        else:
            kept = self._rng.randint(safe, len(self._pending))
        for operation in self._pending[:kept]:
            self._durable.apply(operation)
        if not self.settings.atomic and safe <= kept < len(self._pending):
            self._tear(self._pending[kept])
        self._restart_from_durable()

    def wipe(self) -> None:
        """Everything is gone: a new disk."""
        self._durable = _Image()
        self._restart_from_durable()

    def corrupt(self, index: int, name: str = "log") -> None:
        """Bit rot: the record at `index` is found damaged from now on."""
        for image in (self._durable, self._visible):
            records = image.logs.get(name, [])
            if -len(records) <= index < len(records):
                records[index] = Damaged("corrupt")

    # -- inside ----------------------------------------------------------------------------------

    def _write(self, operation: tuple[Any, ...]) -> None:
        self._visible.apply(operation)
        self._pending.append(operation)

    def _synced(self, life: int, token: Any) -> None:
        if life != self._life:
            return
        position = self._boundaries.pop(0)
        covered = self._pending[:position]
        del self._pending[:position]
        self._flushed = max(0, self._flushed - position)
        self._boundaries = [boundary - position for boundary in self._boundaries]
        if self._fail_next:
            # fsyncgate: the pages are marked clean though they never reached the platter, so each
            # of the covered operations may be there or not; a prefix stands for that here.
            self._fail_next = False
            kept = 0 if self.settings.atomic else self._rng.randint(0, len(covered))
            for operation in covered[:kept]:
                self._durable.apply(operation)
            self._on_sync(token, False)
            return
        for operation in covered:
            self._durable.apply(operation)
        self._on_sync(token, True)

    def _tear(self, operation: tuple[Any, ...]) -> None:
        if operation[0] != "append" or self._rng.random() >= self.settings.torn:
            return
        record = operation[2]
        if isinstance(record, bytes):
            record = record[: self._rng.randrange(len(record))] if record else record
        else:
            record = Damaged("torn")
        self._durable.apply(("append", operation[1], record))

    def _restart_from_durable(self) -> None:
        self._visible = self._durable.copy()
        self._pending.clear()
        self._boundaries.clear()
        self._flushed = 0
        self._free_at_us = self._clock.now_us
        self._life += 1
        self._fail_next = False
