"""The few file-system calls that storage makes, each safe on Linux, macOS and Windows.

All of them block; the log runs them on its own threads (through aiofiles).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

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


def read_at(path: Path, spans: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, length), fewer where the file ends early."""
    with path.open("rb") as file:
        found = []
        for offset, length in spans:
            file.seek(offset)
            found.append(file.read(length))
        return found


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
