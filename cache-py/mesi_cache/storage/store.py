"""Main memory: the home's slice of the keys, in an embedded SQLite file or in this process.

Called from threads only, never from the event loop. Deleted keys stay as tombstones: their versions
must not come again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mesi_cache.config import ConfigError
from mesi_cache.core.records import Outcome, Record

AppliedRow = tuple[str, int, int, Outcome | None]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS main_memory (
    key TEXT PRIMARY KEY, value BLOB, version INTEGER NOT NULL, expires_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS applied (source TEXT, floor INTEGER, operation_id INTEGER, outcome BLOB);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Store(Protocol):
    """What a home needs of its main memory."""

    def load(self, keys: Sequence[str]) -> list[Record | None]:
        """The records of `keys`, None where there never was one."""

    def save(self, records: Iterable[tuple[str, Record]], applied: Iterable[AppliedRow]) -> None:
        """Replace these records and all of `applied`, in one durable transaction."""

    def applied(self) -> list[AppliedRow]:
        """What the last `save` was given."""

    def close(self) -> None:
        """Let go of the file."""


class MemoryStore:
    """Main memory that ends with the process."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def load(self, keys: Sequence[str]) -> list[Record | None]:
        return [self._records.get(key) for key in keys]

    def save(self, records: Iterable[tuple[str, Record]], applied: Iterable[AppliedRow]) -> None:
        self._records.update(records)

    def applied(self) -> list[AppliedRow]:
        return []

    def close(self) -> None:
        pass


class SqliteStore:
    """One file; one connection writes, another reads (WAL lets them work side by side)."""

    def __init__(self, path: Path, owner: str) -> None:
        """`owner` says whose slice it is. Raises ConfigError for another's or unusable file."""
        try:
            self._writer = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._writer.execute("PRAGMA journal_mode=WAL")
            # The log's segment goes after the commit, so the commit itself must be durable.
            self._writer.execute("PRAGMA synchronous=FULL")
            self._writer.executescript(_SCHEMA)
            self._writer.execute("INSERT OR IGNORE INTO about VALUES ('owner', ?)", (owner,))
            row = self._writer.execute("SELECT value FROM about WHERE name='owner'").fetchone()
            self._reader = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as e:
            raise ConfigError(f"--store: {path}: {e}") from e
        if row[0] != owner:
            self.close()
            raise ConfigError(f"--store: {path} belongs to {row[0]}, not to {owner}")

    def load(self, keys: Sequence[str]) -> list[Record | None]:
        found: dict[str, Record] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._reader.execute(
                f"SELECT key, value, version, expires_ms FROM main_memory WHERE key IN ({marks})",  # noqa: S608 - only question marks
                part,
            )
            for key, value, version, expires_ms in rows:
                found[key] = Record(value, version, expires_ms)
        return [found.get(key) for key in keys]

    def save(self, records: Iterable[tuple[str, Record]], applied: Iterable[AppliedRow]) -> None:
        rows = [(key, r.value, r.version, r.expires_ms) for key, r in records]
        kept = [
            (source, floor, operation_id, msgspec.msgpack.encode(outcome))
            for source, floor, operation_id, outcome in applied
        ]
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            self._writer.executemany("REPLACE INTO main_memory VALUES (?, ?, ?, ?)", rows)
            self._writer.execute("DELETE FROM applied")
            self._writer.executemany("INSERT INTO applied VALUES (?, ?, ?, ?)", kept)
            self._writer.execute("COMMIT")
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise

    def applied(self) -> list[AppliedRow]:
        decoder = msgspec.msgpack.Decoder(Outcome | None)
        rows = self._writer.execute("SELECT source, floor, operation_id, outcome FROM applied")
        return [(source, floor, number, decoder.decode(o)) for source, floor, number, o in rows]

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
