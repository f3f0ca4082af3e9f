"""How many commits the store acknowledged, kept beside it.

SQLite cannot tell a WAL that lost its tail (a cut file, a flipped bit in a frame) from one whose
last commits never were: it starts as if they had not happened, and the node would forget votes and
entries that it acknowledged. So after each commit its number is written here, in place and without
an fsync. A process that is killed leaves it exact; a power cut may leave an older number, which is
never too high: the file only ever says "at least so many".
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from lock_manager.storage.errors import CorruptStore

FILE_NAME = "commits"
_RECORD = struct.Struct(">QI")  # the number, CRC-32 of its eight bytes


class HighWater:
    """The file, open for writing. Belongs to the writer thread once that runs."""

    def __init__(self, path: Path) -> None:
        """Opens the file in directory `path`; CorruptStore if it is missing or not readable."""
        file = path / FILE_NAME
        try:
            self._file = file.open("r+b", buffering=0)
        except FileNotFoundError:
            raise CorruptStore(f"the file {FILE_NAME} beside it is missing") from None
        raw = self._file.read(_RECORD.size + 1)
        if len(raw) != _RECORD.size or _RECORD.unpack(raw)[1] != zlib.crc32(raw[:8]):
            self._file.close()
            raise CorruptStore(f"the file {FILE_NAME} beside it is damaged")
        self.commits: int = _RECORD.unpack(raw)[0]

    @staticmethod
    def create(path: Path) -> None:
        """Makes the file for a store without commits, durably."""
        with (path / FILE_NAME).open("wb") as file:
            file.write(_record(0))
            file.flush()
            os.fsync(file.fileno())

    def reached(self, commits: int) -> None:
        """The commit of this number is synced. Raises OSError."""
        self._file.seek(0)
        self._file.write(_record(commits))

    def close(self) -> None:
        self._file.close()


def _record(commits: int) -> bytes:
    number = commits.to_bytes(8, "big")
    return _RECORD.pack(commits, zlib.crc32(number))
