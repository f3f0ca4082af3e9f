"""The audit log's files: sinks that are written together, rotated by size, and read back whole.

A sink is `audit.log` and its older segments `audit.log.000001 …`. A sink that fails keeps what it
lacks in memory and is mended (cut back to its last good byte, rewritten) as soon as it can be
written again, so that every sink has the same lines and no gap. One good sink is enough to go on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from secure_store.core.audit import FIRST_MAC, Line, mac_of, read_line
from secure_store.files import sync_directory

SEGMENT_BYTES = 64 << 20
MAX_BACKLOG_BYTES = 16 << 20
_TAIL_BYTES = 64 << 10


class Sink:
    """One audit file with its older segments. Used by one thread."""

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path
        self._segment_bytes = segment_bytes
        self._fd = -1
        self._good = 0  # bytes of the present segment that are known to be whole
        self._dirty = False
        self._backlog = bytearray()
        self.failure: str | None = None

    def open(self) -> None:
        """Open for appending; raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(
            self.path,
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0),
            0o600,
        )
        os.fsync(self._fd)  # what a killed predecessor left in the page cache
        self._good = os.fstat(self._fd).st_size
        sync_directory(self.path.parent)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, data: bytes) -> bool:
        """Append and fsync `data` (with whatever earlier failures left); False if it cannot be
        done."""
        self._backlog += data
        try:
            if self._fd < 0:
                self.open()
            if self._dirty:
                os.ftruncate(self._fd, self._good)
                self._dirty = False
            if self._good and self._good + len(self._backlog) > self._segment_bytes:
                self._rotate()
            self._dirty = True
            view = memoryview(self._backlog)
            try:
                while len(view):
                    view = view[os.write(self._fd, view) :]
            finally:
                view.release()
            os.fsync(self._fd)
        except OSError as e:
            self.failure = f"{self.path}: {e.strerror or e}"
            return False
        self._dirty = False
        self._good += len(self._backlog)
        self._backlog.clear()
        self.failure = None
        return True

    @property
    def hopeless(self) -> bool:
        """So far behind that it is given up until the next start."""
        return len(self._backlog) > MAX_BACKLOG_BYTES

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
            lines = f.read().splitlines(keepends=True)
        if segment == path and lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
        whole = lines + whole
        if len(whole) >= 2:
            break
    if not whole:
        return End(None, torn, fits=True)
    last = read_line(whole[-1])
    before = read_line(whole[-2]) if len(whole) > 1 else None
    if last is None:
        return End(None, torn, fits=False)
    previous = bytes.fromhex(before[0].mac) if before is not None else FIRST_MAC
    fits = mac_of(key, previous, last[1]).hex() == last[0].mac
    return End(last[0], torn, fits=fits)


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


def read_entries(path: Path, after_seq: int, limit: int) -> list[bytes]:
    """Up to `limit` lines after entry `after_seq`, newlines stripped.

    Segments before the one that holds the entry are passed over by their first line.
    """
    files = segments(path)
    start = 0
    for index, segment in enumerate(files):
        with segment.open("rb") as f:
            parsed = read_line(f.readline())
        if parsed is not None and parsed[0].seq <= after_seq + 1:
            start = index
    found: list[bytes] = []
    for segment in files[start:]:
        with segment.open("rb") as f:
            for raw in f:
                parsed = read_line(raw)
                if parsed is None or parsed[0].seq <= after_seq:
                    continue
                found.append(raw[:-1])
                if len(found) == limit:
                    return found
    return found
