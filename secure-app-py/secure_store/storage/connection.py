"""One SQLite connection with the sealing around it: transactions, the table `meta`, the tally.

What is named in the clear: key names, version numbers, sequence numbers, token accessors, role
names. The name is the associated data of the sealed part, so rows cannot be swapped, renamed or
renumbered.

**The tally** finds what sealing alone cannot: a row that is missing, and a row that was put back as
it was once. It is a keyed set hash: the XOR of `mark(row)` over all live rows, mark being keyed
BLAKE2b over the row's name and nonce (Bellare and Micciancio's XHASH; the tally is sealed, so
nobody can look for collisions). A nonce stands for its whole ciphertext, because nothing else opens
with it. Each change costs two marks, each commit one more row; a start costs one mark a row, and
reads no value.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from secure_store.config import ConfigError
from secure_store.core.kv import Damaged
from secure_store.core.records import ORIGIN, Position
from secure_store.storage.keyring import ID_BYTES, NONCE_BYTES, Keyring

SCHEMA_VERSION = 3
WAL_BYTES = 4 << 20  # what is written between two checkpoints (writer.py), and some room
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS vals (id INTEGER PRIMARY KEY, key TEXT NOT NULL, version INTEGER NOT
NULL,
  sealed BLOB NOT NULL, UNIQUE (key, version));
CREATE TABLE IF NOT EXISTS tokens (name TEXT PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS policies (name TEXT PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS remembered (name TEXT PRIMARY KEY, expires_ms INTEGER NOT NULL,
  sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS remembered_expiry ON remembered (expires_ms);
CREATE TABLE IF NOT EXISTS due (due_ms INTEGER, key TEXT, PRIMARY KEY (due_ms, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS staged (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
"""
HEAD_BYTES = ID_BYTES + NONCE_BYTES  # what a mark takes of a sealed part
HEAD = f"substr(sealed, 1, {HEAD_BYTES})"
MARK_BYTES = 16
_TALLY = "tally"

encode = msgspec.msgpack.Encoder().encode


class Tally(msgspec.Struct, frozen=True, array_like=True):
    """What the store holds, as of its last commit: the set hash, the row count, and of the log its
    end and its length (which say where it begins: it has no gaps)."""

    marks: bytes
    rows: int
    log_end: Position
    log_rows: int


_decode_tally = msgspec.msgpack.Decoder(Tally).decode


def meta_name(name: str) -> bytes:
    return b"meta\0" + name.encode()


def log_name(seq: int) -> bytes:
    return b"log\0%d" % seq


def key_name(key: str) -> bytes:
    return b"key\0" + key.encode()


def value_name(key: str, version: int) -> bytes:
    return b"value\0%d\0" % version + key.encode()


def named(table: str, name: str) -> bytes:
    """The name of a row of `tokens`, `policies` or `remembered`."""
    return table.encode() + b"\0" + name.encode()


def expiring(name: str, expires_ms: int) -> bytes:
    """What the mark of a `remembered` row covers: also when it may be dropped."""
    return named("remembered", name) + b"\0%d" % expires_ms


def due_name(key: str, due_ms: int) -> bytes:
    """What the mark of a `due` row covers: all of it, there is nothing sealed."""
    return b"due\0%d\0" % due_ms + key.encode()


class Connection:
    """Use from one thread at a time; only a writable one changes anything, inside begin/commit."""

    def __init__(self, path: Path, keyring: Keyring, *, writable: bool = False) -> None:
        self.path = path
        self.keyring = keyring
        # Keyed once: a copy of it costs less than keying anew.
        self._marking = hashlib.blake2b(key=keyring.derive(b"rows"), digest_size=MARK_BYTES)
        self._marks = 0
        self._rows = 0
        self._log_end = ORIGIN
        self._log_rows = 0
        self._loaded = False
        self._changed = False
        try:
            self.db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            self.db.execute("PRAGMA busy_timeout = 5000")
            if writable:
                self.db.execute("PRAGMA journal_mode = WAL")
                self.db.execute("PRAGMA synchronous = FULL")
                self.db.execute("PRAGMA wal_autocheckpoint = 0")
                found = self.db.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, SCHEMA_VERSION):
                    raise ConfigError(f"{path} is of schema {found}, this is {SCHEMA_VERSION}")
                self.db.executescript(_SCHEMA)
                self.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                self._grow_wal()
            else:
                self.db.execute("PRAGMA query_only = ON")
        except sqlite3.Error as e:
            raise ConfigError(f"{path} is not usable: {e}") from None

    def close(self) -> None:
        self.db.close()

    def _grow_wal(self) -> None:
        """Give the write-ahead log the length between two checkpoints at once: a commit that
        overwrites need not wait for the file system to note a new length. (A transaction too large
        for the cache goes into the log, and is rolled back.)"""
        (pages,) = self.db.execute("PRAGMA cache_size").fetchone()
        self.db.execute("PRAGMA cache_size = 8")
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("INSERT INTO staged (sealed) VALUES (zeroblob(?))", (WAL_BYTES,))
        self.db.execute("ROLLBACK")
        self.db.execute(f"PRAGMA cache_size = {pages}")

    # --- transactions -------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to write; raises Damaged if the tally cannot be read."""
        self.db.execute("BEGIN IMMEDIATE")
        if not self._loaded:
            self._load_tally()

    def begin_read(self) -> None:
        """Hold one consistent view until `end_read`."""
        self.db.execute("BEGIN")

    def end_read(self) -> None:
        self.db.execute("ROLLBACK")

    def commit(self) -> None:
        """Durable when this returns (WAL, synchronous=FULL)."""
        if self._changed:
            marks = self._marks.to_bytes(MARK_BYTES, "big")
            tally = Tally(marks, self._rows, self._log_end, self._log_rows)
            sealed = self.keyring.seal(meta_name(_TALLY), encode(tally))
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_TALLY, sealed))
            self._changed = False
        self.db.execute("COMMIT")

    def rollback(self) -> None:
        self._loaded = self._changed = False
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    @contextmanager
    def transaction(self, *, is_synced: bool = True) -> Iterator[None]:
        """One transaction, durable at the end; unless `is_synced`, as soon as a later one is (and a
        power cut before that takes it whole)."""
        if not is_synced:
            self.db.execute("PRAGMA synchronous = NORMAL")
        try:
            self.begin()
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise
        finally:
            if not is_synced:
                self.db.execute("PRAGMA synchronous = FULL")

    def checkpoint(self) -> None:
        """Bring what the write-ahead log holds into the file, so that it is written from its
        beginning again. (A commit that found it full would have to, while somebody waits.)"""
        self.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def claim(self) -> None:
        """Make whatever a killed predecessor left in the page cache durable, by a commit of our
        own: what this start reads it will answer for."""
        self.begin()
        self._changed = True
        self.commit()

    # --- the tally ----------------------------------------------------------------------------

    def mark(self, name: bytes, sealed: bytes) -> int:
        """What a row adds to the tally."""
        digest = self._marking.copy()
        digest.update(sealed[:HEAD_BYTES] + name)
        return int.from_bytes(digest.digest(), "big")

    def came(self, name: bytes, sealed: bytes) -> None:
        """A row is there now."""
        self._marks ^= self.mark(name, sealed)
        self._rows += 1
        self._changed = True

    def went(self, name: bytes, sealed: bytes) -> None:
        """A row (its first HEAD_BYTES will do) is gone, or about to be replaced."""
        self._marks ^= self.mark(name, sealed)
        self._rows -= 1
        self._changed = True

    def log_grew(self, position: Position, rows: int) -> None:
        """The log has so many more rows (fewer, if negative), and ends here."""
        self._log_end = position
        self._log_rows += rows
        self._changed = True

    def log_emptied(self, position: Position) -> None:
        self.log_grew(position, -self._log_rows)

    def empty_tally(self) -> None:
        """Everything that is counted has been deleted, but for the rows of `meta`."""
        self._marks = self._rows = 0
        self._changed = True
        for name, head in self.db.execute(f"SELECT name, {HEAD} FROM meta"):  # noqa: S608 - constant
            if name != _TALLY:
                self.came(meta_name(name), head)

    def tally(self) -> Tally | None:
        """The one of the last commit; None if the store is empty. Raises Damaged."""
        row = self.db.execute("SELECT sealed FROM meta WHERE name = ?", (_TALLY,)).fetchone()
        if row is not None:
            return _decode_tally(self.keyring.open(meta_name(_TALLY), row[0]))
        for table in ("meta", "log", "keys", "vals", "tokens", "policies", "remembered", "due"):
            if self.db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():  # noqa: S608 - constant
                raise Damaged("the tally of the stored rows is missing")
        return None

    def _load_tally(self) -> None:
        found = self.tally()
        if found is None:
            self._marks, self._rows, self._log_end, self._log_rows = 0, 0, ORIGIN, 0
        else:
            self._marks = int.from_bytes(found.marks, "big")
            self._rows, self._log_end, self._log_rows = found.rows, found.log_end, found.log_rows
        self._loaded = True

    # --- meta ---------------------------------------------------------------------------------

    def put_meta(self, name: str, plain: bytes) -> None:
        old = self.db.execute(f"SELECT {HEAD} FROM meta WHERE name = ?", (name,)).fetchone()  # noqa: S608 - constant
        if old is not None:
            self.went(meta_name(name), old[0])
        sealed = self.keyring.seal(meta_name(name), plain)
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, sealed))
        self.came(meta_name(name), sealed)

    def get_meta(self, name: str) -> bytes | None:
        row = self.db.execute("SELECT sealed FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else self.keyring.open(meta_name(name), row[0])
