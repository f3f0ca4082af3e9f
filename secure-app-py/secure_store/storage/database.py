"""The SQLite file: log, keys, values, tokens, policies. Every payload in it is sealed (keyring.py).

What is named in the clear: key names, version numbers, sequence numbers, token accessors, role
names. The name is the associated data of the sealed part, so rows cannot be swapped, renamed or
renumbered.

Tables `keys … remembered` are the fold of the log's *decided* records up to `applied`; the log may
hold more. One writer (writer.py) changes anything; readers have connections of their own.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from secure_store.config import ConfigError
from secure_store.core import kv
from secure_store.core.changes import (
    Change,
    Destroy,
    Genesis,
    MarkDeleted,
    PutPolicy,
    PutToken,
    PutValue,
    Remember,
    RevokeToken,
    UseToken,
    decode_changes,
)
from secure_store.core.effects import Durable
from secure_store.core.kv import Damaged, KeyState
from secure_store.core.records import ORIGIN, Position, Record, follows
from secure_store.core.tokens import TokenSet
from secure_store.files import sync_directory
from secure_store.storage.keyring import Keyring

SCHEMA_VERSION = 1
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
CREATE TABLE IF NOT EXISTS staged (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
"""
_STATE_TABLES = ("keys", "vals", "tokens", "policies", "remembered")

_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_state = msgspec.msgpack.Decoder(KeyState).decode
_decode_durable = msgspec.msgpack.Decoder(Durable).decode
_decode_position = msgspec.msgpack.Decoder(Position).decode


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """A stored answer (see changes.Remember)."""

    request_hash: bytes
    status: int
    body: bytes
    version: int
    expires_ms: int


def key_name(key: str) -> bytes:
    return b"key\0" + key.encode()


def value_name(key: str, version: int) -> bytes:
    return b"value\0%d\0" % version + key.encode()


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of a snapshot: `table`, the row's name, and its payload in the clear (inside
    mTLS)."""

    table: str
    name: str
    number: int
    payload: bytes


_decode_row = msgspec.msgpack.Decoder(Row).decode


class Database:
    """One connection with the sealing around it. Use from one thread at a time."""

    def __init__(self, path: Path, keyring: Keyring, *, writable: bool = False) -> None:
        self._keyring = keyring
        try:
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            self._db.execute("PRAGMA busy_timeout = 5000")
            if writable:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                found = self._db.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, SCHEMA_VERSION):
                    raise ConfigError(f"{path} is of schema {found}, this is {SCHEMA_VERSION}")
                self._db.executescript(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            else:
                self._db.execute("PRAGMA query_only = ON")
        except sqlite3.Error as e:
            raise ConfigError(f"{path} is not usable: {e}") from None

    def close(self) -> None:
        self._db.close()

    # --- transactions (the writer's) ----------------------------------------------------------

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def begin_read(self) -> None:
        """Hold one consistent view until `end_read`."""
        self._db.execute("BEGIN")

    def end_read(self) -> None:
        self._db.execute("ROLLBACK")

    def commit(self) -> None:
        """Durable when this returns (WAL, synchronous=FULL)."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def claim(self) -> None:
        """Make whatever a killed predecessor left in the page cache durable, by a commit of our
        own: what this start reads it will answer for."""
        self.begin()
        self._put_meta("claimed", os.urandom(8))
        self.commit()

    # --- meta ---------------------------------------------------------------------------------

    def _put_meta(self, name: str, plain: bytes) -> None:
        sealed = self._keyring.seal(b"meta\0" + name.encode(), plain)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, sealed))

    def _get_meta(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT sealed FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._keyring.open(b"meta\0" + name.encode(), row[0])

    def save_state(self, state: Durable) -> None:
        self._put_meta("pair", _encode(state))

    def load_state(self) -> Durable:
        raw = self._get_meta("pair")
        return Durable() if raw is None else _decode_durable(raw)

    def applied(self) -> Position:
        """The record up to which the tables are folded."""
        raw = self._get_meta("applied")
        return ORIGIN if raw is None else _decode_position(raw)

    def token_key(self) -> bytes | None:
        """The cluster's token-hash key; None before the cluster is known."""
        return self._get_meta("token_key")

    # --- log ----------------------------------------------------------------------------------

    def append(self, records: tuple[Record, ...]) -> int:
        """Add to the log; returns the bytes written."""
        rows = [(r.seq, self._keyring.seal(b"log\0%d" % r.seq, _encode(r))) for r in records]
        self._db.executemany("INSERT INTO log VALUES (?, ?)", rows)
        return sum(len(sealed) for _, sealed in rows)

    def _open_record(self, seq: int, sealed: bytes) -> Record:
        return _decode_record(self._keyring.open(b"log\0%d" % seq, sealed))

    def read_log(self, after_seq: int, limit: int, max_bytes: int) -> tuple[Record, ...] | None:
        """Records after `after_seq`, in order without a gap; None if the next one is not kept."""
        records: list[Record] = []
        size = 0
        rows = self._db.execute(
            "SELECT seq, sealed FROM log WHERE seq > ? ORDER BY seq LIMIT ?", (after_seq, limit)
        )
        for seq, sealed in rows:
            if seq != after_seq + len(records) + 1:
                return None if not records else tuple(records)
            records.append(self._open_record(seq, sealed))
            size += len(sealed)
            if size > max_bytes:
                break
        rows.close()
        return tuple(records)

    def position(self, seq: int) -> Position | None:
        """The position of record `seq`; None if it is not kept."""
        if seq == 0:
            return ORIGIN
        row = self._db.execute("SELECT sealed FROM log WHERE seq = ?", (seq,)).fetchone()
        if row is not None:
            return self._open_record(seq, row[0]).position
        applied = self.applied()
        return applied if applied.seq == seq else None

    def last(self) -> Position:
        """The end of the log (of the fold, if a snapshot left no log)."""
        row = self._db.execute("SELECT seq, sealed FROM log ORDER BY seq DESC LIMIT 1").fetchone()
        return self.applied() if row is None else self._open_record(*row).position

    def log_size(self) -> tuple[int, int, int]:
        """(first seq, number of records, bytes)."""
        row = self._db.execute("SELECT min(seq), count(*), sum(length(sealed)) FROM log").fetchone()
        return (row[0] or 0, row[1], row[2] or 0)

    def trim_log(self, below_seq: int) -> None:
        self._db.execute("DELETE FROM log WHERE seq < ?", (below_seq,))

    # --- the fold -----------------------------------------------------------------------------

    def key_state(self, key: str) -> KeyState | None:
        row = self._db.execute("SELECT sealed FROM keys WHERE key = ?", (key,)).fetchone()
        return None if row is None else _decode_state(self._keyring.open(key_name(key), row[0]))

    def value(self, key: str, version: int) -> bytes | None:
        """The JSON text of one version; None if it is not kept."""
        row = self._db.execute(
            "SELECT sealed FROM vals WHERE key = ? AND version = ?", (key, version)
        ).fetchone()
        return None if row is None else self._keyring.open(value_name(key, version), row[0])

    def keys_from(self, start: str, limit: int) -> list[tuple[str, KeyState]]:
        """Up to `limit` keys >= start in order, each opened (a renamed row does not open)."""
        rows = self._db.execute(
            "SELECT key, sealed FROM keys WHERE key >= ? ORDER BY key LIMIT ?", (start, limit)
        ).fetchall()
        return [(k, _decode_state(self._keyring.open(key_name(k), s))) for k, s in rows]

    def remembered(self, scope_hash: bytes) -> Remembered | None:
        row = self._db.execute(
            "SELECT sealed FROM remembered WHERE name = ?", (scope_hash.hex(),)
        ).fetchone()
        if row is None:
            return None
        plain = self._keyring.open(b"remembered\0" + scope_hash.hex().encode(), row[0])
        return msgspec.msgpack.decode(plain, type=Remembered)

    def load_tokens(self) -> TokenSet:
        tokens = TokenSet()
        for name, sealed in self._db.execute("SELECT name, sealed FROM tokens ORDER BY name"):
            plain = self._keyring.open(b"tokens\0" + name.encode(), sealed)
            tokens.apply(msgspec.msgpack.decode(plain, type=PutToken))
        return tokens

    def load_policies(self) -> list[PutPolicy]:
        policies = []
        for name, sealed in self._db.execute("SELECT name, sealed FROM policies ORDER BY name"):
            plain = self._keyring.open(b"policies\0" + name.encode(), sealed)
            policies.append(msgspec.msgpack.decode(plain, type=PutPolicy))
        return policies

    def apply(self, records: tuple[Record, ...], tokens: TokenSet, now_ms: int) -> None:
        """Fold decided records, in order. `tokens` is the writer's own copy of the token set."""
        for record in records:
            for change in decode_changes(record.payload):
                self._apply_change(change, tokens)
        if records:
            self._put_meta("applied", _encode(records[-1].position))
            self._db.execute("DELETE FROM remembered WHERE expires_ms < ?", (now_ms,))

    def _apply_change(self, change: Change, tokens: TokenSet) -> None:
        match change:
            case PutValue() | MarkDeleted() | Destroy():
                self._apply_key_change(change)
            case PutToken() | UseToken() | RevokeToken():
                for gone in tokens.apply(change):
                    self._db.execute("DELETE FROM tokens WHERE name = ?", (gone,))
                if not isinstance(change, RevokeToken) and change.accessor in tokens.by_accessor:
                    self._put_named(
                        "tokens", change.accessor, _encode(tokens.by_accessor[change.accessor])
                    )
            case PutPolicy(role):
                self._put_named("policies", role, _encode(change))
            case Remember(scope_hash):
                name = scope_hash.hex()
                kept = Remembered(
                    change.request_hash,
                    change.status,
                    change.body,
                    change.version,
                    change.expires_ms,
                )
                sealed = self._keyring.seal(b"remembered\0" + name.encode(), _encode(kept))
                self._db.execute(
                    "INSERT OR REPLACE INTO remembered VALUES (?, ?, ?)",
                    (name, change.expires_ms, sealed),
                )
            case Genesis(token_key):
                self._put_meta("token_key", token_key)

    def _put_named(self, table: str, name: str, plain: bytes) -> None:
        sealed = self._keyring.seal(table.encode() + b"\0" + name.encode(), plain)
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (name, sealed))  # noqa: S608 - constant

    def _apply_key_change(self, change: kv.KeyChange) -> None:
        key = change.key
        before = self.key_state(key)
        after = kv.apply(before, change)
        if after is None:
            self._db.execute("DELETE FROM keys WHERE key = ?", (key,))
            self._db.execute("DELETE FROM vals WHERE key = ?", (key,))
            return
        self._put_key(key, after)
        if isinstance(change, PutValue):
            self._put_value(key, change.version, change.value)
            if before is not None and before.versions[0].number < after.versions[0].number:
                self._db.execute(
                    "DELETE FROM vals WHERE key = ? AND version < ?",
                    (key, after.versions[0].number),
                )
        elif isinstance(change, Destroy):
            self._db.execute(
                "DELETE FROM vals WHERE key = ? AND version = ?", (key, change.version)
            )

    def _put_key(self, key: str, state: KeyState) -> None:
        sealed = self._keyring.seal(key_name(key), _encode(state))
        self._db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key, sealed))

    def _put_value(self, key: str, version: int, value: bytes) -> None:
        sealed = self._keyring.seal(value_name(key, version), value)
        self._db.execute(
            "INSERT OR REPLACE INTO vals (key, version, sealed) VALUES (?, ?, ?)",
            (key, version, sealed),
        )

    # --- snapshots ----------------------------------------------------------------------------

    def inspect(self) -> Iterator[str]:
        """Open everything that is stored; yields one sentence per thing that is wrong. Call inside
        begin_read/end_read."""
        cluster_id = ""
        last: Position | None = None
        try:
            cluster_id = self.load_state().cluster_id
            self.applied()
        except (Damaged, msgspec.MsgspecError) as e:
            yield f"the pair's state: {e}"
        for seq, sealed in self._db.execute("SELECT seq, sealed FROM log ORDER BY seq"):
            try:
                record = self._open_record(seq, sealed)
            except (Damaged, msgspec.MsgspecError) as e:
                yield f"log record {seq}: {e}"
                last = None
                continue
            if last is not None and not follows(cluster_id, last, (record,)):
                yield f"log record {seq}: does not follow the one before"
            last = record.position
        rows = self.snapshot_rows()
        while True:
            try:
                if next(rows, None) is None:
                    break
            except (Damaged, msgspec.MsgspecError) as e:
                yield f"a stored row: {e}"
                break
        for (problem,) in self._db.execute("PRAGMA integrity_check"):
            if problem != "ok":
                yield f"SQLite: {problem}"

    def snapshot_rows(self) -> Iterator[bytes]:
        """The fold as rows in the clear; call inside begin_read/end_read."""
        token_key = self.token_key()
        if token_key is not None:
            yield _encode(Row("token_key", "", 0, token_key))
        for key, sealed in self._db.execute("SELECT key, sealed FROM keys ORDER BY key"):
            yield _encode(Row("keys", key, 0, self._keyring.open(key_name(key), sealed)))
        for key, version, sealed in self._db.execute(
            "SELECT key, version, sealed FROM vals ORDER BY id"
        ):
            plain = self._keyring.open(value_name(key, version), sealed)
            yield _encode(Row("vals", key, version, plain))
        for table in ("tokens", "policies"):
            rows = self._db.execute(f"SELECT name, sealed FROM {table} ORDER BY name")  # noqa: S608 - constant
            for name, sealed in rows:
                plain = self._keyring.open(table.encode() + b"\0" + name.encode(), sealed)
                yield _encode(Row(table, name, 0, plain))
        rows = self._db.execute("SELECT name, expires_ms, sealed FROM remembered ORDER BY name")
        for name, expires_ms, sealed in rows:
            plain = self._keyring.open(b"remembered\0" + name.encode(), sealed)
            yield _encode(Row("remembered", name, expires_ms, plain))

    def stage(self, rows: tuple[bytes, ...], *, first: bool) -> None:
        """Keep rows of a snapshot that is being received."""
        if first:
            self._db.execute("DELETE FROM staged")
        self._db.executemany(
            "INSERT INTO staged (sealed) VALUES (?)",
            [(self._keyring.seal(b"staged", row),) for row in rows],
        )

    def set_aside(self, path: Path) -> None:
        """Copy the whole store to `path`, durably: what a replaced primary acknowledged alone is in
        it, and opens with this node's keyring. Outside of transactions only."""
        scratch = path.with_name(path.name + ".new")
        scratch.unlink(missing_ok=True)
        self._db.execute("VACUUM INTO ?", (str(scratch),))
        with scratch.open("rb+") as f:
            os.fsync(f.fileno())
        scratch.replace(path)
        sync_directory(path.parent)

    def install(self, position: Position, state: Durable) -> None:
        """Make the staged rows the state at `position`, instead of everything that was there."""
        self._db.execute("DELETE FROM log")
        for table in _STATE_TABLES:
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - constant
        for (sealed,) in self._db.execute("SELECT sealed FROM staged ORDER BY id").fetchall():
            self._install_row(_decode_row(self._keyring.open(b"staged", sealed)))
        self._db.execute("DELETE FROM staged")
        self._put_meta("applied", _encode(position))
        self.save_state(state)

    def _install_row(self, row: Row) -> None:
        match row.table:
            case "token_key":
                self._put_meta("token_key", row.payload)
            case "keys":
                self._put_key(row.name, _decode_state(row.payload))
            case "vals":
                self._put_value(row.name, row.number, row.payload)
            case "tokens" | "policies":
                self._put_named(row.table, row.name, row.payload)
            case "remembered":
                sealed = self._keyring.seal(b"remembered\0" + row.name.encode(), row.payload)
                self._db.execute(
                    "INSERT OR REPLACE INTO remembered VALUES (?, ?, ?)",
                    (row.name, row.number, sealed),
                )
            case _:
                raise Damaged("a snapshot row of an unknown table")
