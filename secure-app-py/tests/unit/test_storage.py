"""What is kept: sealed, swappable by nobody, readable after a restart, whole or not at all."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from secure_store.config import ConfigError
from secure_store.core.changes import (
    Destroy,
    PutPolicy,
    PutValue,
    Remember,
    UseToken,
)
from secure_store.core.effects import Durable
from secure_store.core.kv import Damaged
from secure_store.core.messages import Role
from secure_store.core.tokens import TokenSet
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring, make_master_key, read_master_key
from secure_store.storage.view import View
from testkit.sim.loading import load

stored = load(str(Path(__file__).with_name("stored.py")))
MASTER, VALUE, filled, contents, records = (
    stored.MASTER, stored.VALUE, stored.filled, stored.contents, stored.records,
)  # fmt: skip


def test_what_was_committed_is_read_back_by_another_connection(tmp_path: Path) -> None:
    database, _ = filled(tmp_path)
    again = Database(tmp_path / "store.db", Keyring.open_or_make(tmp_path / "keyring.json", MASTER))
    assert contents(again) == contents(database)
    assert again.value("a", 1) == VALUE
    assert again.last().seq == 9


def test_an_uncommitted_transaction_leaves_nothing(tmp_path: Path) -> None:
    database, keyring = filled(tmp_path)
    before = contents(database)
    database.begin()
    database.append(records(PutValue("z", 1, b"1", 1, 0), start=database.last()))
    database.rollback()
    assert contents(Database(tmp_path / "store.db", keyring)) == before


def test_no_file_holds_a_value_or_a_token_in_the_clear(tmp_path: Path) -> None:
    database, _ = filled(tmp_path)
    database.close()
    for path in tmp_path.iterdir():
        raw = path.read_bytes()
        assert b"a secret value" not in raw, path
        assert b"t" * 32 not in raw, path
        assert MASTER not in raw, path


SEALED = [("meta", "name"), ("log", "seq"), ("keys", "key"), ("vals", "id"),
          ("tokens", "name"), ("policies", "name")]  # fmt: skip


@pytest.mark.parametrize(("table", "name"), SEALED)
def test_every_flipped_byte_of_a_sealed_field_is_an_error_never_wrong_data(
    tmp_path: Path, table: str, name: str
) -> None:
    database, keyring = filled(tmp_path)
    database.close()
    raw = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    raw.execute("PRAGMA synchronous = OFF")
    select = f"SELECT {name}, sealed FROM {table}"  # noqa: S608 - constants above
    update = f"UPDATE {table} SET sealed = ? WHERE {name} = ?"  # noqa: S608
    for identity, sealed in raw.execute(select).fetchall():
        for at in range(len(sealed)):
            flipped = bytearray(sealed)
            flipped[at] ^= 0x10
            raw.execute(update, (bytes(flipped), identity))
            with pytest.raises(Damaged):
                contents(Database(tmp_path / "store.db", keyring))
        raw.execute(update, (sealed, identity))
    contents(Database(tmp_path / "store.db", keyring))


def test_inspection_finds_nothing_in_a_sound_store_and_names_what_is_damaged(tmp_path) -> None:
    database, keyring = filled(tmp_path)
    assert list(database.inspect()) == []
    database.close()
    raw = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    for table in ("log", "vals", "tokens", "meta"):
        raw.execute(f"UPDATE {table} SET sealed = zeroblob(length(sealed))")  # noqa: S608
        found = list(Database(tmp_path / "store.db", keyring).inspect())
        assert found, table


def test_swapped_and_renamed_rows_do_not_open(tmp_path: Path) -> None:
    database, keyring = filled(tmp_path)
    database.close()
    raw = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    raw.execute("UPDATE vals SET version = 3 WHERE key = 'a' AND version = 1")
    with pytest.raises(Damaged):
        Database(tmp_path / "store.db", keyring).value("a", 3)
    raw.execute("UPDATE keys SET key = 'c' WHERE key = 'b'")
    with pytest.raises(Damaged):
        Database(tmp_path / "store.db", keyring).keys_from("", 10)
    with pytest.raises(Damaged):
        Database(tmp_path / "store.db", keyring).key_state("c")
    raw.execute("UPDATE log SET seq = 100 WHERE seq = 9")
    with pytest.raises(Damaged):
        Database(tmp_path / "store.db", keyring).last()


def test_a_wrong_master_key_and_a_damaged_keyring_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "keyring.json"
    with pytest.raises(ConfigError, match="master key"):
        Keyring.open_or_make(path, b"x" * 32)
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[at] ^= 2
        path.write_bytes(bytes(flipped))
        with pytest.raises(ConfigError):
            Keyring.open_or_make(path, MASTER)


def test_a_rotated_key_seals_what_comes_and_opens_what_was(tmp_path: Path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", MASTER)
    old = keyring.seal(b"n", b"old")
    assert keyring.rotate() == 2
    new = keyring.seal(b"n", b"new")
    keyring.rewrap(b"n" * 32)
    again = Keyring.open_or_make(tmp_path / "keyring.json", b"n" * 32)
    assert (again.open(b"n", old), again.open(b"n", new)) == (b"old", b"new")
    assert again.active_key == 2
    with pytest.raises(Damaged):
        again.open(b"m", new)
    with pytest.raises(ConfigError):
        Keyring.open_or_make(tmp_path / "keyring.json", MASTER)


def test_a_master_key_file_is_private_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    key = make_master_key(path)
    assert read_master_key(path) == key
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(FileExistsError):
        make_master_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="600"):
        read_master_key(path)


def test_a_snapshot_makes_the_same_state_under_another_key(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    database, _ = filled(tmp_path / "one")
    other = Keyring.open_or_make(tmp_path / "two" / "keyring.json", b"o" * 32)
    copy = Database(tmp_path / "two" / "store.db", other, writable=True)
    database.begin_read()
    rows = tuple(database.snapshot_rows())
    position = database.applied()
    database.end_read()
    copy.begin()
    copy.stage(rows[:3], first=True)
    copy.stage(rows[3:], first=False)
    copy.install(position, Durable(role=Role.REPLICA, cluster_id="c", epoch=1))
    copy.commit()
    copy.check_rows()
    assert copy.keys_from("", 10) == database.keys_from("", 10)
    assert copy.value("a", 1) == VALUE
    assert copy.last() == database.last()
    assert copy.token_key() == database.token_key()
    assert copy.load_policies() == database.load_policies()
    assert list(copy.load_tokens().by_accessor) == ["acc"]
    aside = tmp_path / "two" / "aside.db"
    copy.copy_to(aside)
    assert Database(aside, other).value("a", 1) == VALUE


def test_reads_see_what_is_shown_and_plans_what_is_appended(tmp_path: Path) -> None:
    database, keyring = filled(tmp_path)
    view = View(Database(tmp_path / "store.db", keyring), None)
    change = PutValue("a", 3, b"3", 8, 0)
    view.append((change,), 10)
    assert view.current("a", 100) == (2, b"2")
    assert view.head_state("a").newest.number == 3
    assert view.is_open("a", 9)
    assert view.is_open_under("", 9)
    assert not view.is_open("a", 10)
    view.show((change,), 10)
    assert view.current("a", 100) == (3, b"3")
    assert list(view.scan("", "", 100)) == ["a"]
    view.show((PutValue("aa", 1, b"1", 8, 0),), 11)
    assert list(view.scan("", "", 100)) == ["a", "aa"]
    assert list(view.scan("", "a", 100)) == ["aa"]
    more = records(change, PutValue("aa", 1, b"1", 8, 0), start=database.last())
    database.begin()
    database.append(more)
    database.apply(more, TokenSet(), 0)
    database.commit()
    view.applied(11)
    assert view.current("a", 100) == (3, b"3")
    assert view.value("a", 1) == VALUE
    assert list(view.scan("a", "", 100)) == ["a", "aa"]


def test_a_row_that_is_missing_or_was_put_back_is_found_at_the_next_start(tmp_path: Path) -> None:
    database, keyring = filled(tmp_path)
    database.check_rows()
    before = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    old_state = before.execute("SELECT sealed FROM keys WHERE key = 'a'").fetchone()[0]
    before.close()
    more = records(
        PutValue("a", 3, b"3", 8, 0),
        Remember(b"s" * 32, b"r" * 32, 200, b"{}", 1, 50),
        UseToken("acc", 4),
        PutPolicy("reader", ()),
        Destroy("a", 2),
        start=database.last(),
    )
    tokens = database.load_tokens()
    database.begin()
    database.append(more)
    database.apply(more, tokens, 0)
    database.commit()
    database.check_rows()
    last = records(PutValue("a", 4, b"4", 8, 0), start=database.last())
    database.begin()
    database.append(last)
    database.apply(last, tokens, 60)  # the remembered answer has expired
    database.trim_log(5)
    database.commit()
    database.check_rows()
    database.close()
    whole = (tmp_path / "store.db").read_bytes()  # the last connection has emptied the WAL
    assert not (tmp_path / "store.db-wal").exists()
    sound = Database(tmp_path / "store.db", keyring)
    sound.check_rows()
    sound.close()
    damages = [
        "DELETE FROM keys WHERE key = 'b'",
        "DELETE FROM vals WHERE key = 'a' AND version = 1",
        "DELETE FROM tokens",
        "DELETE FROM policies",
        "DELETE FROM meta WHERE name = 'pair'",
        "DELETE FROM meta WHERE name = 'tally'",
        "DELETE FROM log WHERE seq = 15",
        "DELETE FROM log WHERE seq = 5",
        "DELETE FROM log WHERE seq = 9",
        "UPDATE keys SET sealed = :old WHERE key = 'a'",
    ]
    for damage in damages:
        (tmp_path / "store.db").write_bytes(whole)
        raw = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        raw.execute(damage, {"old": old_state} if ":old" in damage else {})
        raw.close()
        damaged = Database(tmp_path / "store.db", keyring)
        with pytest.raises(Damaged):
            damaged.check_rows()
        damaged.close()


def test_the_tally_of_an_interrupted_transaction_is_forgotten(tmp_path: Path) -> None:
    database, _ = filled(tmp_path)
    again = records(PutValue("z", 1, b"1", 1, 0), start=database.last())
    for _ in range(2):
        database.begin()
        database.append(again)
        database.apply(again, TokenSet(), 0)
        database.rollback()
        database.check_rows()
    database.begin()
    database.append(again)
    database.apply(again, TokenSet(), 0)
    database.commit()
    database.check_rows()
