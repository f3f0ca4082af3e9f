"""The few file-system calls that storage makes, each safe on Linux, macOS and Windows.

All of them block; the log runs them on its own threads (through aiofiles).
"""

from __future__ import annotations

import os
import shutil
import sys
from io import FileIO
from pathlib import Path
from zlib import crc32

if sys.platform == "darwin":
    import fcntl


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte of `data` (a disk that fills up writes a part and fails on the rest)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_data(descriptor: int) -> None:
    """Return once the file's data is on the medium. OSError: treat what was unsynced as lost."""
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's cache; only F_FULLFSYNC empties it.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    elif sys.platform == "win32":
        os.fsync(descriptor)
    else:
        os.fdatasync(descriptor)


def sync_directory(directory: Path) -> None:
    """Make created, renamed and deleted names durable. Windows does so by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut(path: Path, size: int) -> None:
    """Shorten a file to `size` bytes, durably."""
    with path.open("r+b") as file:
        file.truncate(size)
        sync_data(file.fileno())


READ_BYTES = 1 << 20
_GAP_BYTES = 16 << 10


def read_at(path: Path, spans: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, length), fewer where the file ends early. Spans that lie close to
    each other are read at once, so that a batch costs one call, not one for each."""
    found: dict[tuple[int, int], bytes] = {}
    with path.open("rb", buffering=0) as file:
        ordered = sorted(set(spans))
        at = 0
        while at < len(ordered):
            first, end = ordered[at][0], sum(ordered[at])
            until = at + 1
            while until < len(ordered):
                offset, length = ordered[until]
                if offset > end + _GAP_BYTES or offset + length > first + READ_BYTES:
                    break
                end = max(end, offset + length)
                until += 1
            file.seek(first)
            data = read_fully(file, end - first)
            for offset, length in ordered[at:until]:
                found[offset, length] = data[offset - first : offset - first + length]
            at = until
    return [found[span] for span in spans]


def read_fully(file: FileIO, length: int) -> bytes:
    """`length` bytes from where the file stands, fewer only at its end."""
    data = file.read(length)
    while len(data) < length and (more := file.read(length - len(data))):
        data += more
    return data


def checksum(path: Path, size: int) -> tuple[int, int]:
    """(bytes, CRC-32) of the first `size` bytes of a file, or of all if it has fewer. A large read
    and its CRC let other threads run."""
    crc = done = 0
    with path.open("rb", buffering=0) as file:
        while done < size:
            data = file.read(min(4 * READ_BYTES, size - done))
            if not data:
                break
            crc = crc32(data, crc)
            done += len(data)
    return done, crc


def reserve(path: Path, size: int) -> None:
    """Make `path` own about `size` bytes of disk. OSError, and no file, when there is no room."""
    if path.exists() and path.stat().st_size >= size // 2:
        return
    try:
        with path.open("wb") as file:
            # Written, not only allocated: tmpfs and copy-on-write systems may promise too much.
            for start in range(0, size, 1 << 20):
                write_all(file.fileno(), bytes(min(1 << 20, size - start)))
            sync_data(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def free_bytes(directory: Path) -> int:
    """What the file system still has for this user."""
    return shutil.disk_usage(directory).free
