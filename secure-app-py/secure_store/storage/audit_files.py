"""The audit log's files: sinks that are written together, rotated by size, and read back whole.

A sink is `audit.log` and its older segments `audit.log.000001 …`. A sink that cannot be written
keeps what it lacks in memory and is mended (cut back to its last good byte, rewritten) as soon as
it can be written again, so that every sink has the same lines and no gap. One good sink is enough.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from secure_store.core.audit import FIRST_MAC, Line, mac_of, read_line
from secure_store.files import sync_directory

SEGMENT_BYTES = 64 << 20
_TAIL_BYTES = 64 << 10


class Sink:
    """One audit file with its older segments. One thread opens, rotates, mends and syncs it; the
    event loop may append as well (if `takes_now`). Whoever appends holds `mutex`, and so does
    `sync`, but not while it waits for the disk.

    What is not known to be durable stays in memory: after a failed write or fsync nobody knows what
    the disk holds beyond the last good one, so the file is cut back there and written anew.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path
        self.mutex = threading.Lock()
        self._segment_bytes = segment_bytes
        self._fd = -1
        self._good = 0  # bytes of the present segment that are known to be durable
        self._unsynced = bytearray()  # what follows them
        self._written = 0  # how much of that the operating system has
        self._dirty = False  # the file may hold something else after its good bytes
        self.failure: str | None = None

    def open(self) -> None:
        """Open for appending; raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._fd = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
        os.fsync(self._fd)  # what a killed predecessor left in the page cache
        self._good = os.fstat(self._fd).st_size
        sync_directory(self.path.parent)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, data: bytes) -> bool:
        """Hand `data` (and whatever earlier failures left) to the operating system, which keeps it
        though this process die; False if it cannot be done now."""
        self._unsynced += data
        try:
            if self._fd < 0:
                self.open()
            if self._dirty:
                os.ftruncate(self._fd, self._good)
                self._dirty = False
            if self._is_full(0):
                os.fsync(self._fd)
                self._settle(self._written)
                self._rotate()
            with memoryview(self._unsynced) as view:
                while self._written < len(view):
                    self._written += os.write(self._fd, view[self._written :])
        except OSError as e:
            self._failed(e)
            return False
        self.failure = None
        return True

    def takes_now(self, size: int) -> bool:
        """Whether so many bytes can be appended by a plain write."""
        sound = self._fd >= 0 and self.failure is None and not self._dirty
        return sound and self._written == len(self._unsynced) and not self._is_full(size)

    def _is_full(self, more: int) -> bool:
        size = self._good + len(self._unsynced) + more
        return self._good > 0 and size > self._segment_bytes

    def sync(self) -> bool:
        """Make what was appended durable; False if it cannot be done now. What is appended
        meanwhile is for the next time."""
        with self.mutex:
            fd, written = self._fd, self._written
        try:
            if written:
                os.fsync(fd)
        except OSError as e:
            with self.mutex:
                self._failed(e)
            return False
        with self.mutex:
            self._settle(written)
        return True

    def _settle(self, written: int) -> None:
        """So many bytes after the good ones are durable."""
        self._good += written
        del self._unsynced[:written]
        self._written -= written

    def _failed(self, e: OSError) -> None:
        self.failure = f"{self.path}: {e.strerror or e}"
        self._dirty = True
        self._written = 0

    @property
    def backlog_bytes(self) -> int:
        """How much is not durable yet."""
        return len(self._unsynced)

    def _rotate(self) -> None:
        number = max(older_numbers(self.path), default=0) + 1
        os.close(self._fd)
        self._fd = -1
        self.path.rename(self.path.with_name(f"{self.path.name}.{number:06d}"))
        self.open()


def older_numbers(path: Path) -> list[int]:
    """Numbers of a sink's older segments, oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d{6,})")
    found = (pattern.fullmatch(p.name) for p in path.parent.glob(path.name + ".*"))
    return sorted(int(m[1]) for m in found if m)


def segments(path: Path) -> list[Path]:
    """A sink's files, oldest first."""
    older = [path.with_name(f"{path.name}.{n:06d}") for n in older_numbers(path)]
    return [*older, path] if path.exists() else older


def raw_lines(path: Path) -> Iterator[bytes]:
    """Every line of a sink, newlines included; only a torn last one lacks it."""
    for segment in segments(path):
        with segment.open("rb") as f:
            yield from f


class End:
    """Where a sink ends: the last whole line, and what hangs torn after it."""

    def __init__(self, line: Line | None, torn: bytes, *, fits: bool) -> None:
        self.seq = line.seq if line is not None else 0
        self.mac = bytes.fromhex(line.mac) if line is not None else FIRST_MAC
        self.torn = torn
        self.fits = fits  # the last line's MAC follows from the one before it


def read_end(path: Path, key: bytes) -> End:
    """Look at a sink's last lines (not at all of it: that is what `audit verify` is for)."""
    torn = b""
    whole: list[bytes] = []
    for segment in reversed(segments(path)):
        with segment.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - _TAIL_BYTES))
            *lines, rest = f.read().split(b"\n")
        if segment == path:
            torn = rest
        whole = [line + b"\n" for line in lines] + whole
        if len(whole) >= 2:
            break
    fits = True
    while whole:
        last = read_line(whole.pop())
        if last is None:  # somebody was here; go on after the last line that can be read
            fits = False
            continue
        before = read_line(whole[-1]) if whole else None
        previous = bytes.fromhex(before[0].mac) if before is not None else FIRST_MAC
        fits = fits and mac_of(key, previous, last[1]).hex() == last[0].mac
        return End(last[0], torn, fits=fits)
    return End(None, torn, fits=fits)


def set_torn_aside(path: Path, torn: bytes) -> None:
    """Cut a torn last line off, keeping its bytes in a file beside it."""
    keep = path.stat().st_size - len(torn)
    aside = path.with_name(f"{path.name}.torn-{keep}")
    with aside.open("wb") as f:
        f.write(torn)
        f.flush()
        os.fsync(f.fileno())
    with path.open("r+b") as f:
        f.truncate(keep)
        os.fsync(f.fileno())
    sync_directory(path.parent)


def entries_after(path: Path, after_seq: int) -> Iterator[tuple[Line, bytes]]:
    """The lines after entry `after_seq` that can be read, each as its fields and as it stands.

    Found by halving (numbers grow along the files), so that a page costs the same in a long log.
    """
    files = segments(path)
    start = 0
    for index, segment in enumerate(files):
        with segment.open("rb") as f:
            parsed = read_line(f.readline())
        if parsed is not None and parsed[0].seq <= after_seq + 1:
            start = index
    for segment in files[start:]:
        with segment.open("rb") as f:
            f.seek(_offset_before(f, after_seq))
            for raw in f:
                parsed = read_line(raw)
                if parsed is not None and parsed[0].seq > after_seq:
                    yield parsed[0], raw


def newest_record(path: Path, key: bytes, after_seq: int) -> tuple[int, int, int]:
    """(epoch, record, entry) of the newest record that a line after entry `after_seq` tells of;
    zeros if there is none. A line counts only if its MAC is this log's."""
    newest = (0, 0, 0)
    previous = FIRST_MAC
    for line, raw in entries_after(path, max(0, after_seq - 1)):
        if line.seq > after_seq and (line.epoch, line.record) > newest[:2]:
            parsed = read_line(raw)
            if parsed is not None and mac_of(key, previous, parsed[1]).hex() == line.mac:
                newest = (line.epoch, line.record, line.seq)
        previous = bytes.fromhex(line.mac)
    return newest


def _offset_before(f: BinaryIO, after_seq: int) -> int:
    """Where a line begins that is at or before entry `after_seq` (or the file), and near it."""
    low, high = 0, f.seek(0, os.SEEK_END)
    while high - low > _TAIL_BYTES:
        middle = (low + high) // 2
        f.seek(middle)
        f.readline()  # the rest of the line that we fell into
        begin = f.tell()
        parsed = read_line(f.readline())
        if parsed is not None and parsed[0].seq <= after_seq and begin < high:
            low = begin
        else:
            high = middle
    return low


def read_entries(path: Path, after_seq: int, limit: int) -> list[bytes]:
    """Up to `limit` lines after entry `after_seq`, newlines stripped."""
    return [raw[:-1] for _, raw in islice(entries_after(path, after_seq), limit)]
