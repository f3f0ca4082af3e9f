"""Snapshots of the machine on the event loop: written while the machine goes on, and read, in small
steps, so that requests and peers do not wait for a million locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.snapshot import SnapshotReader, SnapshotWriter, scrap

PAUSE_S = 0.002  # between steps: requests go first


class Snapshots:
    """At most one is being written, and at most one read, each superseding the one before.

    `taken(index, data)` is called with each that was written.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, taken: Callable[[int, bytes], None]
    ) -> None:
        self._loop = loop
        self._taken = taken
        self._writer: SnapshotWriter | None = None
        self._reader: SnapshotReader | None = None
        self._index = 0  # of the one that is being read

    @property
    def writing(self) -> bool:
        return self._writer is not None

    @property
    def reading(self) -> bool:
        return self._reader is not None

    def write(self, machine: LockMachine) -> None:
        """Begin to write one of the machine as it is now."""
        self.stop_writing()
        self._writer = SnapshotWriter(machine)
        self._loop.call_soon(self._write_some, self._writer)

    def stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_some(self, writer: SnapshotWriter) -> None:
        if self._writer is not writer:
            return
        if writer.step():
            self._loop.call_later(PAUSE_S, self._write_some, writer)
            return
        # To put the pieces together takes long, but join does it without the interpreter's lock.
        joined = self._loop.run_in_executor(None, b"".join, writer.parts())
        joined.add_done_callback(lambda done: self._written(writer, done.result()))

    def _written(self, writer: SnapshotWriter, data: bytes) -> None:
        if self._writer is writer:
            self._writer = None
            self._taken(writer.index, data)

    def read(self, index: int, data: bytes) -> None:
        """Begin to read one: `data` as of the log's entry `index`. What is being written is of a
        machine that will be no more."""
        self.stop_writing()
        self._index, self._reader = index, SnapshotReader(data)

    def read_some(self) -> tuple[int, LockMachine] | None:
        """A step; with the last one the index and the machine. Raises SnapshotError for what this
        version cannot read."""
        reader = self._reader
        if reader is None or reader.step():
            return None
        self._reader = None
        return self._index, reader.machine

    def scrap(self, machine: LockMachine) -> None:
        """Free a machine that nobody needs any more, a little at a time."""
        self._scrap_some(scrap(machine))

    def _scrap_some(self, steps: Iterator[None]) -> None:
        for _ in steps:
            self._loop.call_later(PAUSE_S, self._scrap_some, steps)
            return
