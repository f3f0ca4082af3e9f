"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically: after a crash either the old or the new is there."""
    scratch = path.with_name(path.name + ".new")
    with scratch.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    scratch.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename or a new file in `path` durable (Windows has no such call, and needs none)."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_private(path: Path, content: bytes) -> None:
    """Make a new file that only its owner may read, whole or not at all; durable.

    Raises FileExistsError.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    try:
        if sys.platform == "win32":
            scratch.rename(path)  # fails if it exists
        else:
            os.link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_directory(path.parent)


class FileLock:
    """An exclusive lock on a file for as long as the block runs; waits for other holders."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("ab")
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    self._file.seek(0)
                    msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
                    return
                except OSError:
                    time.sleep(0.05)
        else:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()
