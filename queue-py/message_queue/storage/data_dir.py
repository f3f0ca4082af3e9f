"""The data directory: who owns it, and that only one process uses it at a time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

import msgspec

from message_queue.config import ConfigError


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written once, at the first start; a start with another identity is refused."""

    service: str
    node_id: str
    position: int  # in --peers: where the ring places this node
    cluster: str  # fingerprint of the member list that the store was made with


class DataDir:
    """An open, locked data directory. `close()` releases the lock; the process's death does too."""

    def __init__(self, path: Path, lock_file: IO[bytes]) -> None:
        self.path = path
        self._lock_file = lock_file

    @classmethod
    def open(cls, path: Path, identity: Identity) -> DataDir:
        """Lock `path` for `identity`, creating it if absent.

        Raises ConfigError, with nothing written, if the directory belongs to another node,
        cluster or service, is in use, or cannot be read or made.
        """
        try:
            stored = stored_identity(path)
            if stored is not None and stored != identity:
                raise ConfigError(
                    f"{path} belongs to {_describe(stored)}, not to {_describe(identity)}"
                )
            path.mkdir(parents=True, exist_ok=True)
            lock_file = (path / "lock").open("ab")
            try:
                _lock(lock_file)
            except OSError:
                lock_file.close()
                raise ConfigError(f"{path} is in use by another process") from None
            if stored is None:
                write_durably(path / "identity.json", msgspec.json.encode(identity))
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror or e}") from e
        return cls(path, lock_file)

    def next_incarnation(self, wall_ms: int) -> int:
        """A number that no earlier start of this node used, durable on return: peers tell this life
        from earlier ones by it. Taken from the clock, so that it grows even over a lost disk, and
        from the last one, so that it grows even if the clock goes back. Raises OSError."""
        path = self.path / "incarnation"
        try:
            before = int(path.read_text("ascii"))
        except (FileNotFoundError, ValueError):
            before = 0
        incarnation = max(before + 1, wall_ms)
        write_durably(path, str(incarnation).encode())
        return incarnation

    def close(self) -> None:
        self._lock_file.close()


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


def _describe(identity: Identity) -> str:
    return (
        f"{identity.service} node {identity.node_id!r} at position {identity.position} of cluster "
        f"{identity.cluster}"
    )


def stored_identity(path: Path) -> Identity | None:
    """Whose directory it is; None if nobody's. Raises ConfigError."""
    try:
        raw = (path / "identity.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(raw, type=Identity)
    except msgspec.MsgspecError as e:
        raise ConfigError(f"{path / 'identity.json'} is not readable: {e}") from e


def _lock(f: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        f.seek(0)
        msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
