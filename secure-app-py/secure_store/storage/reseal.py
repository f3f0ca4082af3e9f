"""Brings every row under the newest data key, a slice at a time, while the node serves.

The writer's thread runs it between its commits, and nobody else seals, so what comes in behind the
pass is under the newest key already. There is nothing to remember: a row says in its first bytes
which key it is sealed under, so a pass that a crash has interrupted is begun anew and skips what is
done. The old data keys are retired only when a whole pass has been committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secure_store.core.kv import Damaged
from secure_store.storage.connection import (
    HEAD,
    expiring,
    key_name,
    log_name,
    meta_name,
    named,
    value_name,
)
from secure_store.storage.database import Database
from secure_store.storage.keyring import ID_BYTES

SLICE_ROWS = 512  # looked at
SLICE_BYTES = 256 << 10  # sealed anew


class _Table:
    """How one table's rows are called: `columns` begin with the one it is ordered by; `seal_name`
    and `mark_name` take their values (the tally does not count a table without a mark)."""

    def __init__(
        self,
        table: str,
        columns: str,
        seal_name: Callable[..., bytes],
        mark_name: Callable[..., bytes] | None,
    ) -> None:
        self.order = columns.split(",")[0]
        self.page = (
            f"SELECT {columns}, {HEAD} FROM {table} WHERE {self.order} > ? "  # noqa: S608 - constants
            f"ORDER BY {self.order} LIMIT {SLICE_ROWS}"
        )
        self.read = f"SELECT sealed FROM {table} WHERE {self.order} = ?"  # noqa: S608 - constants
        self.write = f"UPDATE {table} SET sealed = ? WHERE {self.order} = ?"  # noqa: S608 - constants
        self.seal_name = seal_name
        self.mark_name = mark_name
        self.before_first: Any = -(1 << 63) if self.order in ("seq", "id") else ""


def _of(table: str) -> Callable[[str], bytes]:
    return lambda name: named(table, name)


_TABLES = (
    _Table("meta", "name", meta_name, meta_name),
    _Table("log", "seq", log_name, None),
    _Table("keys", "key", key_name, key_name),
    _Table("vals", "id, key, version", lambda _, k, v: value_name(k, v),
           lambda _, k, v: value_name(k, v)),
    _Table("tokens", "name", _of("tokens"), _of("tokens")),
    _Table("policies", "name", _of("policies"), _of("policies")),
    _Table("remembered", "name, expires_ms", lambda name, _: named("remembered", name), expiring),
    _Table("staged", "id", lambda _: b"staged", None),
)  # fmt: skip


class Reseal:
    """One pass. `target`: the data key that was the newest when it began."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.resealed = 0
        self.damaged = 0
        self._at = 0
        self._after = _TABLES[0].before_first

    def slice(self, database: Database) -> bool:
        """The next rows, inside the caller's transaction; True when the pass is through. A row that
        does not open is counted and left as it is (then its data key must be kept)."""
        table = _TABLES[self._at]
        rows = database.db.execute(table.page, (self._after,)).fetchall()
        size = 0
        for *identity, head in rows:
            self._after = identity[0]
            if int.from_bytes(head[:ID_BYTES], "big") >= self.target:
                continue
            size += self._one(database, table, identity, head)
            if size >= SLICE_BYTES:
                return False
        if len(rows) < SLICE_ROWS:
            self._at += 1
            if self._at == len(_TABLES):
                return True
            self._after = _TABLES[self._at].before_first
        return False

    def _one(self, database: Database, table: _Table, identity: list[Any], head: bytes) -> int:
        (sealed,) = database.db.execute(table.read, identity[:1]).fetchone()
        name = table.seal_name(*identity)
        try:
            anew = database.keyring.seal(name, database.keyring.open(name, sealed))
        except Damaged:
            self.damaged += 1
            return 0
        database.db.execute(table.write, (anew, identity[0]))
        if table.mark_name is not None and identity[0] != "tally":
            database.went(table.mark_name(*identity), head)
            database.came(table.mark_name(*identity), anew)
        self.resealed += 1
        return len(anew)
