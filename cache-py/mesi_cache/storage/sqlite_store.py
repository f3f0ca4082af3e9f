"""Main memory in an embedded SQLite file; also what a home keeps beside a store elsewhere.

`SqliteFile` is called from threads only: one connection writes, another reads (WAL lets them work
side by side). `SqliteStore` is main memory on top of it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mesi_cache.config import ConfigError
from mesi_cache.core.records import Outcome, Record
from mesi_cache.storage.store import (
    MOST_TOMBSTONES,
    OVERDUE_MS,
    RESERVED,
    SWEEP,
    Loaded,
    Restored,
    Saving,
    bucket,
)

MOST_KNOWN = 100_000
_BATCH = 500

_SCHEMA = """
CREATE TABLE IF NOT EXISTS main_memory (
    key TEXT PRIMARY KEY, value BLOB, version INTEGER NOT NULL, expires_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tombstones ON main_memory (version) WHERE value IS NULL;
CREATE INDEX IF NOT EXISTS deadlines ON main_memory (expires_ms) WHERE expires_ms > 0;
CREATE TABLE IF NOT EXISTS floors (bucket INTEGER PRIMARY KEY, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS known (
    key TEXT UNIQUE NOT NULL, version INTEGER NOT NULL, digest BLOB, expires_ms INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS known_deadlines ON known (expires_ms) WHERE expires_ms > 0;
CREATE TABLE IF NOT EXISTS applied (source TEXT, floor INTEGER, operation_id INTEGER, outcome BLOB);
CREATE TABLE IF NOT EXISTS retries (
    name TEXT PRIMARY KEY, print TEXT NOT NULL, until_ms INTEGER NOT NULL, outcome BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS retries_until ON retries (until_ms);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_COUNT_TOMBSTONES = "SELECT count(*) FROM main_memory WHERE value IS NULL"
_COUNT_KNOWN = "SELECT count(*) FROM known"


@dataclass(frozen=True, slots=True)
class Known:
    """Of a value that is stored elsewhere: its version, and by what to recognise it."""

    version: int
    digest: bytes | None  # None: absent
    expires_ms: int


class SqliteFile:
    """One node's file."""

    def __init__(self, path: Path, owner: str, store: str) -> None:
        """`owner` says whose slice it is, `store` where the values are. Raises ConfigError for a
        file of another owner or store, or an unusable one."""
        try:
            self._writer = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._reader = self._writer  # so that `close` always can
            self._writer.execute("PRAGMA journal_mode=WAL")
            # The log's segment goes after the commit, so the commit itself must be durable.
            self._writer.execute("PRAGMA synchronous=FULL")
            self._writer.executescript(_SCHEMA)
            self._writer.executemany(
                "INSERT OR IGNORE INTO about VALUES (?, ?)", [("owner", owner), ("store", store)]
            )
            about = dict(self._writer.execute("SELECT name, value FROM about"))
            self._tombstones = self._count(_COUNT_TOMBSTONES)
            self._known = self._count(_COUNT_KNOWN)
            self._reader = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as e:
            raise ConfigError(f"--store: {path}: {e}") from e
        if about["owner"] != owner:
            self.close()
            raise ConfigError(f"--store: {path} belongs to {about['owner']}, not to {owner}")
        if about["store"] != store:
            self.close()
            raise ConfigError(f"--store: {path} was made for {about['store']}, not for {store}")

    # --- reading ------------------------------------------------------------------------------

    def rows(self, keys: Sequence[str]) -> dict[str, Record]:
        """What this file has of `keys`, tombstones included."""
        return {
            key: Record(value, version, expires_ms)
            for key, value, version, expires_ms in self._select(
                "SELECT key, value, version, expires_ms FROM main_memory WHERE key IN", keys
            )
        }

    def load(self, keys: Sequence[str]) -> list[Record | None]:
        """The records of `keys`: None where there never was one."""
        found = self.rows(keys)
        # After the rows: a row that is gone by now has left its floor in the same transaction.
        floors = self.floors([key for key in keys if key not in found])
        for key, floor in floors.items():
            found[key] = Record(None, floor)
        return [found.get(key) for key in keys]

    def floors(self, keys: Sequence[str]) -> dict[str, int]:
        """Above which version each of `keys` begins, where that is not 0."""
        buckets = {key: bucket(key) for key in keys}
        rows = self._select("SELECT * FROM floors WHERE bucket IN", list(buckets.values()))
        floors: dict[int, int] = dict(rows)
        return {key: floors[b] for key, b in buckets.items() if b in floors}

    def known(self, keys: Sequence[str]) -> dict[str, Known]:
        rows = self._select("SELECT key, version, digest, expires_ms FROM known WHERE key IN", keys)
        return {key: Known(version, digest, expires) for key, version, digest, expires in rows}

    def known_overdue(self, wall_ms: float) -> list[str]:
        """Keys of values stored elsewhere whose time was up long ago."""
        rows = self._reader.execute(
            "SELECT key FROM known WHERE expires_ms > 0 AND expires_ms < ? LIMIT ?",
            (int(wall_ms - OVERDUE_MS), SWEEP),
        )
        return [row[0] for row in rows]

    def restored(self) -> Restored:
        rows = self._writer.execute("SELECT source, floor, operation_id, outcome FROM applied")
        maybe = msgspec.msgpack.Decoder(Outcome | None)
        applied = [(source, floor, number, maybe.decode(o)) for source, floor, number, o in rows]
        rows = self._writer.execute(
            "SELECT name, print, until_ms, outcome FROM retries ORDER BY until_ms"
        )
        outcome = msgspec.msgpack.Decoder(Outcome)
        return Restored(
            applied, [(name, p, until, outcome.decode(o)) for name, p, until, o in rows]
        )

    # --- writing ------------------------------------------------------------------------------

    def save(self, saving: Saving, *, tidy_all: bool) -> None:
        """One durable transaction. `tidy_all`: this file is all that there is, so tombstones may be
        collected; else only those of reserved keys."""
        with self._transaction():
            self._save_rows(saving)
            self._tidy(saving.wall_ms, tidy_all=tidy_all)

    def save_known(
        self, saving: Saving, known: Iterable[tuple[str, Known]], forgotten: Sequence[str]
    ) -> None:
        """The same for a store elsewhere: `known` is stored there now (and no longer here),
        `forgotten` are overdue values that were removed there."""
        with self._transaction():
            self._save_rows(saving)
            self._know(known)
            for start in range(0, len(forgotten), _BATCH):
                part = forgotten[start : start + _BATCH]
                self._to_floors("known", f"key IN ({_marks(part)})", part)
            if self._known > MOST_KNOWN:  # counts those that were written over as well
                self._known = self._count(_COUNT_KNOWN)
            if self._known > MOST_KNOWN:  # the least recently written first
                oldest = "SELECT key FROM known WHERE expires_ms = 0 ORDER BY rowid LIMIT ?"
                self._known -= self._to_floors("known", f"key IN ({oldest})", (SWEEP,))
            self._tidy(saving.wall_ms, tidy_all=False)

    def learn(self, known: Sequence[tuple[str, Known]]) -> None:
        """Values that were found elsewhere. Durable before their versions are told. (What a save
        has put here since is newer, and stays.)"""
        rows = [(key, k.version, k.digest, k.expires_ms) for key, k in known]
        with self._transaction():
            self._writer.executemany(
                "INSERT INTO known VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET version = excluded.version, digest = excluded.digest, "
                "expires_ms = excluded.expires_ms WHERE excluded.version > version",
                rows,
            )
        self._known += len(rows)

    def _save_rows(self, saving: Saving) -> None:
        outcome = msgspec.msgpack.Encoder().encode
        rows = [(key, r.value, r.version, r.expires_ms) for key, r in saving.records]
        self._writer.executemany("REPLACE INTO main_memory VALUES (?, ?, ?, ?)", rows)
        self._tombstones += sum(row[1] is None for row in rows)
        self._writer.execute("DELETE FROM applied")
        self._writer.executemany(
            "INSERT INTO applied VALUES (?, ?, ?, ?)",
            [(source, floor, number, outcome(o)) for source, floor, number, o in saving.applied],
        )
        self._writer.executemany(
            "REPLACE INTO retries VALUES (?, ?, ?, ?)",
            [(name, p, until_ms, outcome(o)) for name, p, until_ms, o in saving.retries],
        )
        self._writer.execute("DELETE FROM retries WHERE until_ms < ?", (int(saving.wall_ms),))

    def _know(self, known: Iterable[tuple[str, Known]]) -> None:
        rows = [(key, k.version, k.digest, k.expires_ms) for key, k in known]
        self._writer.executemany("REPLACE INTO known VALUES (?, ?, ?, ?)", rows)
        self._writer.executemany("DELETE FROM main_memory WHERE key = ?", [row[:1] for row in rows])
        self._known += len(rows)

    def _tidy(self, wall_ms: float, *, tidy_all: bool) -> None:
        mine = "" if tidy_all else f"key < '{chr(ord(RESERVED) + 1)}' AND "
        overdue = f"SELECT key FROM main_memory WHERE {mine} expires_ms > 0 AND expires_ms < ?"  # noqa: S608 - constants
        before_ms = int(wall_ms - OVERDUE_MS)
        self._to_floors("main_memory", f"key IN ({overdue} LIMIT ?)", (before_ms, SWEEP))
        if self._tombstones > MOST_TOMBSTONES:  # counts those that were written over as well
            self._tombstones = self._count(_COUNT_TOMBSTONES)
        if self._tombstones > MOST_TOMBSTONES:  # the lowest versions first: they forbid least
            dead = (
                f"SELECT key FROM main_memory WHERE {mine} value IS NULL ORDER BY version LIMIT ?"  # noqa: S608 - constants
            )
            self._tombstones -= self._to_floors("main_memory", f"key IN ({dead})", (SWEEP,))

    def _to_floors(self, table: str, which: str, values: Sequence[object]) -> int:
        """Remove rows, but not what their versions forbid. Returns how many they were."""
        rows = self._writer.execute(
            f"SELECT key, version FROM {table} WHERE {which}",  # noqa: S608 - constants
            values,
        ).fetchall()
        self._writer.executemany(
            "INSERT INTO floors VALUES (?, ?) ON CONFLICT (bucket) DO UPDATE "
            "SET version = max(version, excluded.version)",
            [(bucket(key), version) for key, version in rows],
        )
        self._writer.executemany(
            f"DELETE FROM {table} WHERE key = ?",  # noqa: S608 - constants
            [row[:1] for row in rows],
        )
        return len(rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise

    def _select(self, query: str, values: Sequence[object]) -> Iterator[Any]:
        for start in range(0, len(values), _BATCH):
            part = values[start : start + _BATCH]
            yield from self._reader.execute(f"{query} ({_marks(part)})", part)

    def _count(self, query: str) -> int:
        count: int = self._writer.execute(query).fetchone()[0]
        return count

    def close(self) -> None:
        self._writer.close()
        self._reader.close()


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


class SqliteStore:
    """Main memory in this node's own file."""

    def __init__(
        self, file: SqliteFile, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> None:
        self._file = file
        self._reader = reader
        self._writer = writer

    async def load(self, keys: Sequence[str]) -> Sequence[Loaded]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, self._file.load, keys)

    async def save(self, saving: Saving) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, lambda: self._file.save(saving, tidy_all=True))

    async def stop(self) -> None:
        pass

    def restored(self) -> Restored:
        return self._file.restored()

    def close(self) -> None:
        self._file.close()
