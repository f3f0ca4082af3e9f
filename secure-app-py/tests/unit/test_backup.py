"""Backups: whole or refused, and what is made of them is a cluster of its own."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from secure_store.core.changes import PutValue
from secure_store.core.messages import Role
from secure_store.storage.backup import BackupError, Manifest, create, restore, verify
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring
from testkit.sim.loading import load

store = load(str(Path(__file__).with_name("stored.py")))


def made(tmp_path: Path) -> tuple[Path, Path, Manifest]:
    """(data directory of a running node, its backup, the manifest)."""
    data = tmp_path / "a"
    data.mkdir()
    database, keyring = store.filled(data)
    tail = store.records(PutValue("late", 1, b'"in the log only"', 5, 0), start=database.last())
    database.begin()
    database.append(tail)
    database.commit()
    manifest = create(data, keyring, tmp_path / "backup", node="a", made_at="now")
    return data, tmp_path / "backup", manifest


def put_back(path: Path, to: Path, *, keep_tokens: bool = True, master: bytes = store.MASTER):
    return restore(
        path, master, to, node="b", fresh_cluster_id="other", keep_tokens=keep_tokens, now_ms=1
    )


def test_a_backup_of_a_store_in_use_holds_everything_and_nothing_in_the_clear(tmp_path) -> None:
    _, path, manifest = made(tmp_path)
    assert (manifest.cluster_id, manifest.epoch, manifest.seq, manifest.keys) == ("c", 1, 10, 2)
    assert path.stat().st_mode & 0o077 == 0
    raw = path.read_bytes()
    assert b"a secret value" not in raw
    assert b"in the log only" not in raw
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "backup"]
    keyring = Keyring.open_or_make(tmp_path / "a" / "keyring.json", store.MASTER)
    with pytest.raises(BackupError, match="overwritten"):
        create(tmp_path / "a", keyring, path, node="a", made_at="now")


def test_a_restored_store_is_the_same_data_as_a_new_incarnation(tmp_path: Path) -> None:
    data, path, _ = made(tmp_path)
    put_back(path, tmp_path / "b")
    was = Keyring.open_or_make(data / "keyring.json", store.MASTER)
    keyring = Keyring.open_or_make(tmp_path / "b" / "keyring.json", store.MASTER)
    assert keyring.audit_mac_key != was.audit_mac_key, "it must not sign as the node it copies"
    database = Database(tmp_path / "b" / "store.db", keyring)
    state = database.load_state()
    assert (state.role, state.cluster_id, state.epoch) == (Role.PRIMARY, "other", 2)
    assert database.last().seq == 10
    assert database.read_log(0, 10, 1 << 20) is None, "whoever is behind needs a snapshot"
    assert database.read_log(10, 10, 1 << 20) == ()
    assert database.value("late", 1) == b'"in the log only"'
    assert database.value("a", 1) == store.VALUE
    assert list(database.load_tokens().by_accessor) == ["acc"]
    assert database.token_key() == b"t" * 32
    assert list(database.inspect()) == []
    put_back(path, tmp_path / "c", keep_tokens=False)
    keyring = Keyring.open_or_make(tmp_path / "c" / "keyring.json", store.MASTER)
    database = Database(tmp_path / "c" / "store.db", keyring)
    assert database.load_tokens().by_accessor == {}
    assert list(database.inspect()) == []


def test_flipped_bytes_truncations_and_a_wrong_key_are_refused(tmp_path: Path) -> None:
    _, path, _ = made(tmp_path)
    raw = path.read_bytes()
    bad = tmp_path / "bad"
    into = tmp_path / "into"
    # (Samples: the MAC covers every byte alike.)
    places = [
        *range(0, 1_500, 19),
        *range(1_500, len(raw) - 40, 2_003),
        *range(len(raw) - 32, len(raw), 7),
    ]
    for at in places:
        flipped = bytearray(raw)
        flipped[at] ^= 0x04
        bad.write_bytes(bytes(flipped))
        into.mkdir()
        with pytest.raises(BackupError):
            verify(bad, store.MASTER, into)
        for left in into.iterdir():
            left.unlink()
        into.rmdir()
    for cut in (0, 10, 60, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:cut])
        with pytest.raises(BackupError):
            put_back(bad, tmp_path / "b")
    bad.write_bytes(raw + b"x")
    with pytest.raises(BackupError, match="longer"):
        put_back(bad, tmp_path / "b")
    with pytest.raises(BackupError, match="master key"):
        put_back(path, tmp_path / "b", master=b"x" * 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "backup", "bad"], "no trace"


def test_a_restore_overwrites_nothing_and_a_damaged_store_is_not_backed_up(tmp_path: Path) -> None:
    data, path, _ = made(tmp_path)
    with pytest.raises(BackupError, match="not empty"):
        put_back(path, data)
    (tmp_path / "empty").mkdir()
    put_back(path, tmp_path / "empty")
    raw = sqlite3.connect(data / "store.db", isolation_level=None)
    raw.execute("DELETE FROM vals WHERE version = 2")
    keyring = Keyring.open_or_make(data / "keyring.json", store.MASTER)
    with pytest.raises(BackupError, match="damaged"):
        create(data, keyring, tmp_path / "second", node="a", made_at="now")
    assert not (tmp_path / "second").exists()
