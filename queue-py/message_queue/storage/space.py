"""Room on the disk: a file kept in reserve, so that acks (which free space) still fit on a disk
that is full, and what follows when it is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Executor
from enum import StrEnum
from pathlib import Path

from aiofiles.os import wrap

from message_queue.storage import files

RESERVE_BYTES = 8 * 1024 * 1024


class Trouble(StrEnum):
    """Why the node takes no new messages."""

    FULL = "Disk full"
    FAILING = "Disk failing"


class Space:
    """Of one log. `on_trouble` is told when `trouble` changes."""

    def __init__(
        self,
        directory: Path,
        reserve_bytes: int,
        write_thread: Executor,
        read_thread: Executor,
        on_trouble: Callable[[Trouble | None], None],
    ) -> None:
        self.trouble: Trouble | None = None
        self._directory = directory
        self._reserve = directory / "reserve"
        self._reserve_bytes = reserve_bytes
        self._write_thread = write_thread
        self._read_thread = read_thread
        self._on_trouble = on_trouble

    async def start(self) -> None:
        """Own the reserve; on a small disk it is a small part of it."""
        free = await wrap(files.free_bytes)(self._directory)
        self._reserve_bytes = max(64 * 1024, min(self._reserve_bytes, free // 16))
        await self._make_reserve()

    async def has_room(self, size: int) -> bool:
        """Whether `size` more bytes leave the disk with room to spare."""
        free = await wrap(files.free_bytes)(self._directory, executor=self._read_thread)
        return free > 2 * size + self._reserve_bytes

    async def mind(self, *, more: bool) -> None:
        """Look how much is free, and win the reserve back, unless `more` waits to be written."""
        free_bytes = wrap(files.free_bytes)
        free = await free_bytes(self._directory, executor=self._read_thread)
        if self.trouble is None:
            if free < self._reserve_bytes:
                self._set(Trouble.FULL)
        elif not more and free >= 2 * self._reserve_bytes and await self._make_reserve():
            self._set(None)

    async def write_failed(self, failure: OSError) -> None:
        """A full disk gets the reserve."""
        full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
        # EFBIG is a limit on one file (RLIMIT_FSIZE, FAT): the next segment is another file.
        if failure.errno != errno.EFBIG:
            self._set(Trouble.FULL if full else Trouble.FAILING)
        if full:
            unlink = wrap(Path.unlink)
            await unlink(self._reserve, missing_ok=True, executor=self._write_thread)

    async def _make_reserve(self) -> bool:
        """False when the disk has no room for it."""
        reserve = wrap(files.reserve)
        try:
            await reserve(self._reserve, self._reserve_bytes, executor=self._read_thread)
        except OSError:
            self._set(Trouble.FULL)
            return False
        return True

    def _set(self, trouble: Trouble | None) -> None:
        if trouble is not self.trouble:
            self.trouble = trouble
            self._on_trouble(trouble)
