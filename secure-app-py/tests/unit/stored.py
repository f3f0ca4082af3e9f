"""A filled database, and everything that is read from one."""

from __future__ import annotations

from pathlib import Path

from secure_store.core.changes import (
    Destroy,
    Genesis,
    MarkDeleted,
    PutPolicy,
    PutToken,
    PutValue,
    encode_changes,
)
from secure_store.core.effects import Durable
from secure_store.core.messages import Role
from secure_store.core.policy import Rule
from secure_store.core.records import ORIGIN, Record, extend
from secure_store.core.tokens import TokenSet
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring

MASTER = b"m" * 32
VALUE = b'"a secret value"'


def records(*changes, start=ORIGIN) -> tuple[Record, ...]:
    made = []
    for change in changes:
        made.append(extend("c", start, 1, encode_changes((change,))))
        start = made[-1].position
    return tuple(made)


def filled(path: Path) -> tuple[Database, Keyring]:
    keyring = Keyring.open_or_make(path / "keyring.json", MASTER)
    database = Database(path / "store.db", keyring, writable=True)
    some = records(
        Genesis(b"t" * 32),
        PutValue("a", 1, VALUE, 5, 0),
        PutValue("a", 2, b"2", 6, 0),
        PutValue("b", 1, b'{"x":[1,2]}', 7, 0),
        MarkDeleted("b", 1, 9),
        PutToken("acc", b"h" * 32, ("user",), "name", 1, 0, -1, ""),
        PutPolicy("reader", (Rule("a/*", ("read",)),)),
        PutValue("gone", 1, b"0", 7, 0),
        Destroy("gone", 0),
    )
    database.begin()
    database.append(some)
    database.apply(some, TokenSet(), 0)
    database.save_state(Durable(role=Role.PRIMARY, cluster_id="c", epoch=1))
    database.commit()
    return database, keyring


def contents(database: Database) -> list[object]:
    """Everything a node reads from a database."""
    database.check_rows()
    return [
        database.load_state(),
        database.applied(),
        database.last(),
        database.token_key(),
        database.read_log(0, 100, 1 << 20),
        [(k, s, [database.value(k, v.number) for v in s.versions])
         for k, s in database.keys_from("", 100)],
        database.key_state("a"),
        database.key_state("gone"),
        list(database.load_tokens().by_accessor.values()),
        database.load_policies(),
    ]  # fmt: skip
