"""The tables that reads see: keys, values, tokens, policies, remembered answers.

They are the fold of the log's *decided* records up to `applied`; the log may hold more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from secure_store.core import kv
from secure_store.core.changes import (
    Audited,
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
from secure_store.core.kv import Damaged, KeyState
from secure_store.core.records import ORIGIN, Position, Record
from secure_store.core.tokens import TokenSet
from secure_store.storage.connection import (
    HEAD,
    Connection,
    due_name,
    encode,
    expiring,
    key_name,
    named,
    value_name,
)

OtherChange = PutToken | RevokeToken | UseToken | PutPolicy | Remember | Audited | Genesis
FOLD_TABLES = ("keys", "vals", "tokens", "policies", "remembered", "due")

_decode_state = msgspec.msgpack.Decoder(KeyState).decode
_decode_position = msgspec.msgpack.Decoder(Position).decode


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """A stored answer (see changes.Remember)."""

    request_hash: bytes
    status: int
    body: bytes
    version: int
    expires_ms: int


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of a snapshot: `table`, the row's name, and its payload in the clear (inside
    mTLS)."""

    table: str
    name: str
    number: int
    payload: bytes


class Decided(NamedTuple):
    """What a decided record changes, and where it ends."""

    changes: tuple[Change, ...]
    position: Position


class _KeyFold:
    """What becomes of one key: its state now, and how the rows of its values change."""

    __slots__ = ("before", "destroyed", "is_gone", "row", "state", "values")

    def __init__(self, before: KeyState | None, row: bytes) -> None:
        self.before = self.state = before
        self.row = row
        self.values: dict[int, bytes] = {}  # that have no row yet
        self.destroyed: list[int] = []  # that may have one
        self.is_gone = False  # all that have one: numbers begin anew

    def take(self, change: kv.KeyChange) -> None:
        self.state = kv.apply(self.state, change)
        match change:
            case PutValue(_, version, value):
                self.values[version] = value
            case Destroy(_, 0):
                self.values.clear()
                self.destroyed.clear()
                self.is_gone = True
            case Destroy(_, version):
                if self.values.pop(version, None) is None:
                    self.destroyed.append(version)
            case MarkDeleted():
                pass


class Fold(Connection):
    """Reading the tables, and folding decided records into them."""

    def applied(self) -> Position:
        """The record up to which the tables are folded."""
        raw = self.get_meta("applied")
        return ORIGIN if raw is None else _decode_position(raw)

    def token_key(self) -> bytes | None:
        """The cluster's token-hash key; None before the cluster is known."""
        return self.get_meta("token_key")

    def key_state(self, key: str) -> KeyState | None:
        row = self.db.execute("SELECT sealed FROM keys WHERE key = ?", (key,)).fetchone()
        return None if row is None else _decode_state(self.keyring.open(key_name(key), row[0]))

    def value(self, key: str, version: int) -> bytes | None:
        """The JSON text of one version; None if it is not kept."""
        row = self.db.execute(
            "SELECT sealed FROM vals WHERE key = ? AND version = ?", (key, version)
        ).fetchone()
        return None if row is None else self.keyring.open(value_name(key, version), row[0])

    def keys_from(self, start: str, limit: int) -> list[tuple[str, KeyState]]:
        """Up to `limit` keys >= start in order, each opened (a renamed row does not open)."""
        rows = self.db.execute(
            "SELECT key, sealed FROM keys WHERE key >= ? ORDER BY key LIMIT ?", (start, limit)
        ).fetchall()
        return [(k, _decode_state(self.keyring.open(key_name(k), s))) for k, s in rows]

    def due(self, now_ms: int, limit: int) -> list[str]:
        """Up to `limit` keys with a value to destroy (see kv.KeyState.due_ms), the oldest first."""
        rows = self.db.execute(
            "SELECT key FROM due WHERE due_ms <= ? ORDER BY due_ms LIMIT ?", (now_ms, limit)
        ).fetchall()
        return [key for (key,) in rows]

    def remembered(self, scope_hash: bytes) -> Remembered | None:
        row = self.db.execute(
            "SELECT sealed FROM remembered WHERE name = ?", (scope_hash.hex(),)
        ).fetchone()
        if row is None:
            return None
        plain = self.keyring.open(named("remembered", scope_hash.hex()), row[0])
        return msgspec.msgpack.decode(plain, type=Remembered)

    def load_tokens(self) -> TokenSet:
        tokens = TokenSet()
        for name, sealed in self.db.execute("SELECT name, sealed FROM tokens ORDER BY name"):
            plain = self.keyring.open(named("tokens", name), sealed)
            tokens.apply(msgspec.msgpack.decode(plain, type=PutToken))
        return tokens

    def load_policies(self) -> list[PutPolicy]:
        policies = []
        for name, sealed in self.db.execute("SELECT name, sealed FROM policies ORDER BY name"):
            plain = self.keyring.open(named("policies", name), sealed)
            policies.append(msgspec.msgpack.decode(plain, type=PutPolicy))
        return policies

    # --- folding ------------------------------------------------------------------------------

    def apply(self, records: tuple[Record, ...], tokens: TokenSet, now_ms: int) -> None:
        """`fold` of records as they stand in the log."""
        decided = [Decided(decode_changes(r.payload), r.position) for r in records]
        self.fold(decided, tokens, now_ms)

    def fold(self, decided: Sequence[Decided], tokens: TokenSet, now_ms: int) -> None:
        """Fold decided records, in order: each key is read and written once, whatever happened to
        it. `tokens` is the writer's own copy of the token set."""
        keys: dict[str, _KeyFold] = {}
        for record in decided:
            for change in record.changes:
                match change:
                    case PutValue() | MarkDeleted() | Destroy():
                        folded = keys.get(change.key)
                        if folded is None:
                            folded = keys[change.key] = _KeyFold(*self._key_row(change.key))
                        folded.take(change)
                    case _:
                        self._apply_change(change, tokens)
        for key, folded in keys.items():
            self._put_folded(key, folded)
        if decided:
            self.put_meta("applied", encode(decided[-1].position))
            self._drop_remembered(now_ms)

    def _apply_change(self, change: OtherChange, tokens: TokenSet) -> None:
        match change:
            case PutToken() | UseToken() | RevokeToken():
                for gone in tokens.apply(change):
                    self._drop_named("tokens", gone)
                if not isinstance(change, RevokeToken) and change.accessor in tokens.by_accessor:
                    token = encode(tokens.by_accessor[change.accessor])
                    self._put_named("tokens", change.accessor, token)
            case PutPolicy(role):
                self._put_named("policies", role, encode(change))
            case Remember(scope_hash):
                kept = Remembered(
                    change.request_hash,
                    change.status,
                    change.body,
                    change.version,
                    change.expires_ms,
                )
                self._put_remembered(scope_hash.hex(), change.expires_ms, encode(kept))
            case Genesis(token_key):
                self.put_meta("token_key", token_key)
            case Audited():
                pass  # told by the log, see ledger.py

    def _key_row(self, key: str) -> tuple[KeyState | None, bytes]:
        """A key's state, and its row as it stands there (empty: none)."""
        row = self.db.execute("SELECT sealed FROM keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None, b""
        return _decode_state(self.keyring.open(key_name(key), row[0])), row[0]

    def _put_folded(self, key: str, folded: _KeyFold) -> None:
        before, after = folded.before, folded.state
        if folded.row:
            self.went(key_name(key), folded.row)
        self._put_due(key, before, after)
        if before is not None and (folded.is_gone or after is None):
            self._drop_values(key, "version >= ?", 0)
        if after is None:
            self.db.execute("DELETE FROM keys WHERE key = ?", (key,))
            return
        self._put_key(key, after)
        oldest = after.versions[0].number
        if before is not None and not folded.is_gone:
            if before.versions[0].number < oldest:
                self._drop_values(key, "version < ?", oldest)
            for version in folded.destroyed:
                self._drop_values(key, "version = ?", version)
        for version, value in folded.values.items():
            if version >= oldest:
                self._put_value(key, version, value)

    def _put_due(self, key: str, before: KeyState | None, after: KeyState | None) -> None:
        """The index by expiry follows a key's state."""
        was_ms = before.due_ms if before is not None else 0
        due_ms = after.due_ms if after is not None else 0
        if was_ms == due_ms:
            return
        if was_ms:
            self.db.execute("DELETE FROM due WHERE due_ms = ? AND key = ?", (was_ms, key))
            self.went(due_name(key, was_ms), b"")
        if due_ms:
            self.db.execute("INSERT INTO due VALUES (?, ?)", (due_ms, key))
            self.came(due_name(key, due_ms), b"")

    def _put_key(self, key: str, state: KeyState) -> None:
        """(Whoever replaces a row has said so: `went`.)"""
        sealed = self.keyring.seal(key_name(key), encode(state))
        self.db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key, sealed))
        self.came(key_name(key), sealed)

    def _put_value(self, key: str, version: int, value: bytes) -> None:
        """Version numbers are not used twice, so there is no such row yet."""
        sealed = self.keyring.seal(value_name(key, version), value)
        self.db.execute(
            "INSERT INTO vals (key, version, sealed) VALUES (?, ?, ?)", (key, version, sealed)
        )
        self.came(value_name(key, version), sealed)

    def _drop_values(self, key: str, which: str, version: int) -> None:
        rows = self.db.execute(
            f"SELECT version, {HEAD} FROM vals WHERE key = ? AND {which}",  # noqa: S608 - constants
            (key, version),
        ).fetchall()
        for number, head in rows:
            self.went(value_name(key, number), head)
        if rows:
            self.db.execute(f"DELETE FROM vals WHERE key = ? AND {which}", (key, version))  # noqa: S608 - constants

    def _put_named(self, table: str, name: str, plain: bytes) -> None:
        """A row of `tokens` or `policies`."""
        self._drop_named(table, name)
        sealed = self.keyring.seal(named(table, name), plain)
        self.db.execute(f"INSERT INTO {table} VALUES (?, ?)", (name, sealed))  # noqa: S608 - constant
        self.came(named(table, name), sealed)

    def _drop_named(self, table: str, name: str) -> None:
        old = self.db.execute(f"SELECT {HEAD} FROM {table} WHERE name = ?", (name,)).fetchone()  # noqa: S608 - constants
        if old is not None:
            self.went(named(table, name), old[0])
            self.db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))  # noqa: S608 - constant

    def _put_remembered(self, name: str, expires_ms: int, plain: bytes) -> None:
        old = self.db.execute(
            f"SELECT expires_ms, {HEAD} FROM remembered WHERE name = ?",  # noqa: S608 - constant
            (name,),
        ).fetchone()
        if old is not None:
            self.went(expiring(name, old[0]), old[1])
        sealed = self.keyring.seal(named("remembered", name), plain)
        self.db.execute(
            "INSERT OR REPLACE INTO remembered VALUES (?, ?, ?)", (name, expires_ms, sealed)
        )
        self.came(expiring(name, expires_ms), sealed)

    def _drop_remembered(self, now_ms: int) -> None:
        rows = self.db.execute(
            f"SELECT name, expires_ms, {HEAD} FROM remembered WHERE expires_ms < ?",  # noqa: S608 - constant
            (now_ms,),
        ).fetchall()
        for name, expires_ms, head in rows:
            self.went(expiring(name, expires_ms), head)
        if rows:
            self.db.execute("DELETE FROM remembered WHERE expires_ms < ?", (now_ms,))

    def install_row(self, row: Row) -> None:
        """A row of a snapshot, into tables that were emptied; raises Damaged for a foreign one."""
        match row.table:
            case "token_key":
                self.put_meta("token_key", row.payload)
            case "keys":
                state = _decode_state(row.payload)
                self._put_key(row.name, state)
                self._put_due(row.name, None, state)
            case "vals":
                self._put_value(row.name, row.number, row.payload)
            case "tokens" | "policies":
                self._put_named(row.table, row.name, row.payload)
            case "remembered":
                self._put_remembered(row.name, row.number, row.payload)
            case _:
                raise Damaged("a snapshot row of an unknown table")
