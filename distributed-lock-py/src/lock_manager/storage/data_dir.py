"""The data directory: whose it is, and that only one process uses it at a time.

    lock            held (flock / msvcrt) as long as the process lives
    identity.json   written once, last of all, when the store beside it is complete and synced
    raft.sqlite3    the store (and its -wal, -shm)

So without identity.json nothing was ever promised from here, whatever else lies around; with it, a
store that is missing or has another id is a loss, not a fresh start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

import msgspec

from lock_manager.storage.errors import CorruptStore, ForeignStore, StoreError, StoreInUse

SERVICE = "lock_manager"


class Owner(msgspec.Struct, frozen=True):
    """The node that wants to use a directory."""

    node_id: str  # --id
    position: int  # its Raft id: the place in --peers, from 1
    raft_addr: str
    http_addr: str


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of identity.json."""

    service: str
    owner: Owner
    store_id: str


class DataDir:
    """An open, locked data directory. `close()` releases the lock; the process's death does too."""

    def __init__(self, path: Path, lock_file: IO[bytes], identity: Identity | None) -> None:
        self.path = path
        self.identity = identity  # None: nothing was ever stored here
        self._lock_file = lock_file

    @classmethod
    def open(cls, path: Path, owner: Owner) -> DataDir:
        """Locks `path` for `owner`, creating it if absent.

        Raises StoreError (ForeignStore, StoreInUse, CorruptStore), with nothing written, if the
        directory belongs to somebody else, is in use, or cannot be read or made.
        """
        try:
            _check_owner(path, _read_identity(path), owner)
            path.mkdir(parents=True, exist_ok=True)
            lock_file = (path / "lock").open("ab")
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from error
        try:
            _lock(lock_file)
            # Only now is it certain that nobody writes it meanwhile.
            identity = _read_identity(path)
            _check_owner(path, identity, owner)
        except OSError:
            lock_file.close()
            raise StoreInUse(f"{path} is in use by another process") from None
        except StoreError:
            lock_file.close()
            raise
        return cls(path, lock_file, identity)

    def claim(self, owner: Owner, store_id: str) -> None:
        """Writes identity.json, durably: from now on this is `owner`'s directory."""
        self.identity = Identity(SERVICE, owner, store_id)
        _write_durably(self.path / "identity.json", msgspec.json.encode(self.identity))

    def close(self) -> None:
        self._lock_file.close()


def _check_owner(path: Path, identity: Identity | None, owner: Owner) -> None:
    """A node may move to other addresses, but not all at once: then it is another cluster's
    directory."""
    if identity is None:
        return
    stored = identity.owner
    if identity.service != SERVICE:
        raise ForeignStore(f"{path} belongs to the service {identity.service}")
    if (stored.node_id, stored.position) != (owner.node_id, owner.position):
        raise ForeignStore(
            f"{path} belongs to node {stored.node_id!r} at position {stored.position} of --peers, "
            f"not to {owner.node_id!r} at position {owner.position}"
        )
    if stored.raft_addr != owner.raft_addr and stored.http_addr != owner.http_addr:
        raise ForeignStore(
            f"{path} belongs to another cluster: node {stored.node_id!r} at {stored.raft_addr} "
            f"and {stored.http_addr}"
        )


def _read_identity(path: Path) -> Identity | None:
    file = path / "identity.json"
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(raw, type=Identity)
    except msgspec.DecodeError as error:
        raise CorruptStore(f"{file} is not readable: {error}") from error


def _write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: after a crash either the old or the new is there."""
    scratch = path.with_name(path.name + ".new")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes a rename or a new file in `path` durable (Windows has no such call, and needs none)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
