"""The home's write log: what it has acknowledged and not yet put into the store.

Segments of frames `length (4) | crc32 (4) | msgpack`, appended by a plain write: that survives the
death of every process on the machine. What survives the death of the machine is what `sync` has
covered. A segment goes once the store has everything that it says.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import msgspec

from mesi_cache.config import ConfigError
from mesi_cache.core.step import Logged
from mesi_cache.storage.data_dir import sync_directory

log = logging.getLogger(__name__)

_HEADER = 8
_decoder = msgspec.msgpack.Decoder(Logged)
_encoder = msgspec.msgpack.Encoder()


class WriteLog:
    """Append-only; `append` and `rotate` on the event loop, the rest on one other thread."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number
        self._file = self._create(number)
        self._next: FileIO | None = None
        self.size = 0  # of the segment that is appended to

    @classmethod
    def recover(cls, directory: Path, *, strict: bool) -> tuple[WriteLog, list[Logged]]:
        """Read every segment, oldest first, and begin a new one.

        A torn end is what a crash leaves, and is cut off. With `strict` (every acknowledged frame
        was synced) a bad frame that good ones follow is damage, and raises ConfigError.
        """
        segments = sorted(directory.glob("log-*.bin"))
        lines: list[Logged] = []
        for path in segments:
            lines.extend(_read(path, strict=strict))
        last = int(segments[-1].stem.removeprefix("log-")) if segments else 0
        write_log = cls(directory, last + 1)
        if not lines:
            write_log.drop(last)
        return write_log, lines

    def append(self, lines: Iterable[Logged]) -> None:
        """Hand `lines` to the operating system; raises OSError (disk full …)."""
        frames = bytearray()
        for line in lines:
            payload = _encoder.encode(line)
            frames += len(payload).to_bytes(4, "little")
            frames += zlib.crc32(payload).to_bytes(4, "little")
            frames += payload
        view = memoryview(frames)
        while view:
            view = view[self._file.write(view) :]
        self.size += len(frames)

    def sync(self) -> None:
        """Make what was appended so far survive a power cut."""
        os.fsync(self._file.fileno())

    def prepare(self) -> None:
        """Make the next segment, so that `rotate` need not wait for the disk."""
        if self._next is None:
            self._next = self._create(self._number + 1)

    def rotate(self) -> int:
        """Append to the prepared segment from now on. Returns the number of the last one before it,
        for `drop` once the store has what it says."""
        if self._next is None:
            raise ValueError("prepare() comes first")
        self._file.close()
        self._file, self._next = self._next, None
        self._number += 1
        self.size = 0
        return self._number - 1

    def drop(self, upto: int) -> None:
        """Remove segments up to and including `upto`, the oldest first: what a crash leaves of them
        must be the newest, or old records would come back."""
        for path in sorted(self._directory.glob("log-*.bin")):
            if int(path.stem.removeprefix("log-")) <= upto:
                path.unlink()

    def close(self) -> None:
        self._file.close()
        if self._next is not None:
            self._next.close()

    def _create(self, number: int) -> FileIO:
        file = (self._directory / f"log-{number:010d}.bin").open("xb", buffering=0)
        sync_directory(self._directory)
        return file


def _read(path: Path, *, strict: bool) -> list[Logged]:
    data = path.read_bytes()
    lines: list[Logged] = []
    end = 0
    for line, end in _frames(data, 0):  # noqa: B007 - `end` is used below
        lines.append(line)
    if end < len(data):
        rest = len(data) - end
        if strict and any(True for at in range(end + 1, len(data)) for _ in _frames(data, at)):
            raise ConfigError(f"{path} is damaged at byte {end}: good records follow a bad one")
        log.warning("%s: cut off %d bytes of an unfinished record", path.name, rest)
    return lines


def _frames(data: bytes, at: int) -> Iterator[tuple[Logged, int]]:
    """Good frames from `at` on, each with the offset after it; ends at the first bad one."""
    while at + _HEADER <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        end = at + _HEADER + length
        payload = data[at + _HEADER : end]
        if not length or end > len(data):
            return
        if zlib.crc32(payload) != int.from_bytes(data[at + 4 : at + 8], "little"):
            return
        try:
            line = _decoder.decode(payload)
        except msgspec.MsgspecError:
            return
        yield line, end
        at = end
