"""The SQLite file as a whole: the log, the fold (fold.py), snapshots, and finding what is wrong.

One writer (writer.py) changes anything; readers have connections of their own.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from secure_store.core.audit import Told
from secure_store.core.effects import Durable
from secure_store.core.kv import Damaged
from secure_store.core.records import ORIGIN, Position, Record, follows
from secure_store.files import sync_directory
from secure_store.storage.connection import (
    HEAD,
    MARK_BYTES,
    due_name,
    encode,
    expiring,
    key_name,
    log_name,
    meta_name,
    named,
    value_name,
)
from secure_store.storage.fold import FOLD_TABLES, Fold, Row
from secure_store.storage.fold import Remembered as Remembered

_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_durable = msgspec.msgpack.Decoder(Durable).decode
_decode_row = msgspec.msgpack.Decoder(Row).decode


class Database(Fold):
    """One connection to everything that a node stores."""

    def save_state(self, state: Durable) -> None:
        self.put_meta("pair", encode(state))

    def load_state(self) -> Durable:
        raw = self.get_meta("pair")
        return Durable() if raw is None else _decode_durable(raw)

    def save_told(self, told: Told) -> None:
        self.put_meta("told", encode(told))

    def load_told(self) -> Told:
        """Which decided records have their audit line (see ledger.py)."""
        raw = self.get_meta("told")
        return Told() if raw is None else _decode_told(raw)

    # --- log ----------------------------------------------------------------------------------

    def append(self, records: tuple[Record, ...]) -> int:
        """Add to the log; returns the bytes written."""
        rows = [(r.seq, self.keyring.seal(log_name(r.seq), encode(r))) for r in records]
        self.db.executemany("INSERT INTO log VALUES (?, ?)", rows)
        self.log_grew(records[-1].position, len(rows))
        return sum(len(sealed) for _, sealed in rows)

    def _open_record(self, seq: int, sealed: bytes) -> Record:
        return _decode_record(self.keyring.open(log_name(seq), sealed))

    def read_log(self, after_seq: int, limit: int, max_bytes: int) -> tuple[Record, ...] | None:
        """Records after `after_seq`, in order without a gap; None if the next one is not kept."""
        records: list[Record] = []
        size = 0
        rows = self.db.execute(
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
        if not records and after_seq < self.last().seq:
            return None  # a snapshot left no log at all
        return tuple(records)

    def position(self, seq: int) -> Position | None:
        """The position of record `seq`; None if it is not kept."""
        if seq == 0:
            return ORIGIN
        row = self.db.execute("SELECT sealed FROM log WHERE seq = ?", (seq,)).fetchone()
        if row is not None:
            return self._open_record(seq, row[0]).position
        applied = self.applied()
        return applied if applied.seq == seq else None

    def last(self) -> Position:
        """The end of the log (of the fold, if a snapshot left no log)."""
        row = self.db.execute("SELECT seq, sealed FROM log ORDER BY seq DESC LIMIT 1").fetchone()
        return self.applied() if row is None else self._open_record(*row).position

    def log_size(self) -> tuple[int, int, int]:
        """(first seq, number of records, bytes)."""
        row = self.db.execute("SELECT min(seq), count(*), sum(length(sealed)) FROM log").fetchone()
        return (row[0] or 0, row[1], row[2] or 0)

    def trim_log(self, below_seq: int) -> tuple[int, int]:
        """Forget the records before this one; gives how many they were, and their bytes."""
        count, size = self.db.execute(
            "SELECT count(*), sum(length(sealed)) FROM log WHERE seq < ?", (below_seq,)
        ).fetchone()
        self.db.execute("DELETE FROM log WHERE seq < ?", (below_seq,))
        self.log_grew(self._log_end, -count)
        return count, size or 0

    # --- what is wrong ------------------------------------------------------------------------

    def check_rows(self) -> None:
        """Hold the rows that are there against the tally, without opening them; raises Damaged.

        Call inside a transaction of either kind.
        """
        tally = self.tally()
        marks, rows = 0, 0
        try:
            for name, head in self._heads():
                marks ^= self.mark(name, head)
                rows += 1
        except (TypeError, AttributeError):  # a flipped byte made a name or a blob something else
            raise Damaged("a stored row is of a wrong type") from None
        if tally is None:
            return  # nothing is stored
        if rows != tally.rows:
            raise Damaged(f"{tally.rows} rows were stored and {rows} are there")
        if marks.to_bytes(MARK_BYTES, "big") != tally.marks:
            raise Damaged("stored rows were replaced by others")
        begins = tally.log_end.seq - tally.log_rows + 1
        found = [seq for (seq,) in self.db.execute("SELECT seq FROM log ORDER BY seq")]
        if found != list(range(begins, tally.log_end.seq + 1)):
            raise Damaged(f"the log had {tally.log_rows} records from record {begins} on")
        if self.last() != tally.log_end:
            raise Damaged(f"the log ended at record {tally.log_end.seq}, and does no more")

    def _heads(self) -> Iterator[tuple[bytes, bytes]]:
        """(name, the first bytes of the sealed part) of each row that the tally counts."""
        for name, head in self.db.execute(f"SELECT name, {HEAD} FROM meta"):  # noqa: S608 - constant
            if name != "tally":
                yield meta_name(name), head
        for key, head in self.db.execute(f"SELECT key, {HEAD} FROM keys"):  # noqa: S608 - constant
            yield key_name(key), head
        # By the index that reads use: names come from it, what they lead to from the table.
        values = f"SELECT key, version, {HEAD} FROM vals INDEXED BY sqlite_autoindex_vals_1 "  # noqa: S608 - constant
        for key, version, head in self.db.execute(values + "ORDER BY key, version"):
            yield value_name(key, version), head
        for table in ("tokens", "policies"):
            for name, head in self.db.execute(f"SELECT name, {HEAD} FROM {table}"):  # noqa: S608 - constants
                yield named(table, name), head
        for due_ms, key in self.db.execute("SELECT due_ms, key FROM due"):
            yield due_name(key, due_ms), b""
        for name, expires_ms, head in self.db.execute(
            f"SELECT name, expires_ms, {HEAD} FROM remembered"  # noqa: S608 - constant
        ):
            yield expiring(name, expires_ms), head

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
        try:
            self.check_rows()
        except (Damaged, msgspec.MsgspecError) as e:
            yield f"the stored rows: {e}"
        for seq, sealed in self.db.execute("SELECT seq, sealed FROM log ORDER BY seq"):
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
        for (problem,) in self.db.execute("PRAGMA integrity_check"):
            if problem != "ok":
                yield f"SQLite: {problem}"

    # --- snapshots ----------------------------------------------------------------------------

    def snapshot_rows(self) -> Iterator[bytes]:
        """The fold as rows in the clear; call inside begin_read/end_read."""
        token_key = self.token_key()
        if token_key is not None:
            yield encode(Row("token_key", "", 0, token_key))
        for key, sealed in self.db.execute("SELECT key, sealed FROM keys ORDER BY key"):
            yield encode(Row("keys", key, 0, self.keyring.open(key_name(key), sealed)))
        for key, version, sealed in self.db.execute(
            "SELECT key, version, sealed FROM vals ORDER BY id"
        ):
            plain = self.keyring.open(value_name(key, version), sealed)
            yield encode(Row("vals", key, version, plain))
        for table in ("tokens", "policies"):
            rows = self.db.execute(f"SELECT name, sealed FROM {table} ORDER BY name")  # noqa: S608 - constant
            for name, sealed in rows:
                plain = self.keyring.open(named(table, name), sealed)
                yield encode(Row(table, name, 0, plain))
        rows = self.db.execute("SELECT name, expires_ms, sealed FROM remembered ORDER BY name")
        for name, expires_ms, sealed in rows:
            plain = self.keyring.open(named("remembered", name), sealed)
            yield encode(Row("remembered", name, expires_ms, plain))

    def stage(self, rows: tuple[bytes, ...], *, first: bool) -> None:
        """Keep rows of a snapshot that is being received."""
        if first:
            self.db.execute("DELETE FROM staged")
        self.db.executemany(
            "INSERT INTO staged (sealed) VALUES (?)",
            [(self.keyring.seal(b"staged", row),) for row in rows],
        )

    def install(self, position: Position, state: Durable) -> None:
        """Make the staged rows the state at `position`, instead of everything that was there."""
        self.db.execute("DELETE FROM log")
        for table in FOLD_TABLES:
            self.db.execute(f"DELETE FROM {table}")  # noqa: S608 - constant
        self.empty_tally()
        for (sealed,) in self.db.execute("SELECT sealed FROM staged ORDER BY id").fetchall():
            self.install_row(_decode_row(self.keyring.open(b"staged", sealed)))
        self.db.execute("DELETE FROM staged")
        self.put_meta("applied", encode(position))
        self.log_emptied(position)
        self.save_told(Told(position.seq, self.load_told().line))
        self.save_state(state)

    # --- making another store of it (backup.py) -------------------------------------------------

    def drop_log(self, position: Position) -> None:
        """Forget every record: the fold is the state at `position`."""
        self.db.execute("DELETE FROM log")
        self.put_meta("applied", encode(position))
        self.log_emptied(position)

    def drop_tokens(self) -> None:
        """Forget every token, and every remembered answer."""
        for table in ("tokens", "remembered"):
            self.db.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
        self.recount()

    def recount(self) -> None:
        """Make the tally anew, from rows that have been inspected."""
        self.empty_tally()
        for name, head in self._heads():
            if not name.startswith(b"meta\0"):
                self.came(name, head)

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy of the whole store to `path`, durably, whole or not at all; it
        opens with this node's keyring. Outside of transactions only. Raises sqlite3.Error,
        OSError."""
        scratch = path.with_name(path.name + ".new")
        scratch.unlink(missing_ok=True)
        try:
            self.db.execute("PRAGMA query_only = OFF")  # (it changes nothing here all the same)
            self.db.execute("VACUUM INTO ?", (str(scratch),))
            with scratch.open("rb+") as f:
                os.fsync(f.fileno())
            scratch.chmod(0o600)
            scratch.replace(path)
        except (sqlite3.Error, OSError):
            scratch.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
