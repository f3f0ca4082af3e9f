"""The data directory: who owns it, and that only one process uses it at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import msgspec

from secure_store.config import ConfigError
from secure_store.files import write_durably


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written once, at the first start; a start with another identity is refused."""

    service: str
    node_id: str


class DataDir:
    """An open, locked data directory. `close()` releases the lock; the process's death does too."""

    def __init__(self, path: Path, lock_file: IO[bytes]) -> None:
        self.path = path
        self._lock_file = lock_file

    @classmethod
    def open(cls, path: Path, identity: Identity) -> DataDir:
        """Lock `path` for `identity`, creating it if absent.

        Raises ConfigError, with nothing written, if the directory belongs to another node or
        service, is in use, or cannot be read or made.
        """
        try:
            stored = stored_identity(path)
            if stored is not None and stored != identity:
                raise ConfigError(
                    f"{path} belongs to {_describe(stored)}, not to {_describe(identity)}"
                )
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
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

    def close(self) -> None:
        self._lock_file.close()


def _describe(identity: Identity) -> str:
    return f"{identity.service} node {identity.node_id!r}"


def stored_identity(path: Path) -> Identity | None:
    """Whose directory this is; None if nobody's. Raises ConfigError."""
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
