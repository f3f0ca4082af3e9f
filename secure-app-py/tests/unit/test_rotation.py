"""Another data key, another master key: nothing stays under the old one, at whatever line a crash
comes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secure_store import files
from secure_store.core.changes import PutValue, Remember
from secure_store.storage import keyring as keyrings
from secure_store.storage import reseal
from secure_store.storage.database import Database
from secure_store.storage.keyring import (
    Keyring,
    make_master_key,
    open_keyring,
    read_master_key,
    replace_master,
)
from secure_store.storage.reseal import Reseal
from testkit.sim.loading import load

store = load(str(Path(__file__).with_name("stored.py")))
TABLES = ("meta", "log", "keys", "vals", "tokens", "policies", "remembered")


def keys_in_use(database: Database) -> set[int]:
    """The numbers of the data keys that any row is sealed under."""
    found: set[int] = set()
    for table in TABLES:
        for (sealed,) in database.db.execute(f"SELECT sealed FROM {table}"):  # noqa: S608
            found.add(int.from_bytes(sealed[:4], "big"))
    return found


def through(job: Reseal, database: Database) -> int:
    """Run a pass to its end; gives the number of slices."""
    slices = 0
    done = False
    while not done:
        database.begin()
        done = job.slice(database)
        database.commit()
        database.check_rows()
        slices += 1
    return slices


def test_after_a_pass_no_row_is_under_an_old_key_and_everything_reads_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reseal, "SLICE_BYTES", 300)  # many slices
    database, keyring = store.filled(tmp_path)
    more = store.records(Remember(b"s" * 32, b"r" * 32, 200, b"{}", 1, 50), start=database.last())
    database.begin()
    database.append(more)
    database.apply(more, database.load_tokens(), 0)
    database.commit()
    before = store.contents(database)
    keyring.rotate()
    job = Reseal(keyring.active_key)
    assert through(job, database) > len(TABLES)
    assert keys_in_use(database) == {2}
    assert job.resealed > 10
    keyring.retire(job.target)
    database.close()
    again = Keyring.open_or_make(tmp_path / "keyring.json", store.MASTER)
    assert again.numbers == [2]
    fresh = Database(tmp_path / "store.db", again)
    assert store.contents(fresh) == before
    assert list(fresh.inspect()) == []


def test_what_is_written_during_a_pass_and_a_second_rotation_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reseal, "SLICE_BYTES", 1)
    database, keyring = store.filled(tmp_path)
    keyring.rotate()
    job = Reseal(keyring.active_key)
    done = False
    version = 2
    while not done:
        database.begin()
        done = job.slice(database)
        version += 1
        more = store.records(PutValue("a", version, b"1", 8, 0), start=database.last())
        database.append(more)
        database.apply(more, database.load_tokens(), 0)
        if version == 10:
            keyring.rotate()
        database.commit()
        if version > 12:
            monkeypatch.setattr(reseal, "SLICE_BYTES", 1 << 20)
    assert min(keys_in_use(database)) >= job.target == 2
    keyring.retire(job.target)
    assert keyring.numbers == [2, 3]
    through(Reseal(3), database)
    assert keys_in_use(database) == {3}


class Crash(BaseException):
    """The process ends here."""


def test_a_change_of_master_keys_survives_a_crash_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each durable step (a rename, a link, an unlink, a file's fsync) is made the last one."""
    steps = 0
    limit = 0

    def counted(real):
        def step(*args, **kwargs):
            nonlocal steps
            if steps == limit:
                raise Crash
            steps += 1
            return real(*args, **kwargs)

        return step

    for limit in range(60):
        folder = tmp_path / str(limit)
        folder.mkdir()
        master = folder / "master.key"
        first = make_master_key(master)
        keyring = Keyring.open_or_make(folder / "keyring.json", first)
        sealed = keyring.seal(b"n", b"old")
        steps = 0
        with monkeypatch.context() as m:
            m.setattr(Path, "replace", counted(Path.replace))
            m.setattr(Path, "unlink", counted(Path.unlink))
            m.setattr(files.os, "link", counted(os.link))
            m.setattr(files.os, "fsync", counted(os.fsync))
            m.setattr(keyrings, "sync_directory", counted(files.sync_directory))
            try:
                replace_master(keyring, master)
                ended = True
            except Crash:
                ended = False
        looked = open_keyring(folder / "keyring.json", master, finish=False)
        assert looked.open(b"n", sealed) == b"old"
        again = open_keyring(folder / "keyring.json", master, finish=True)
        assert again.open(b"n", sealed) == b"old"
        Keyring.open_or_make(folder / "keyring.json", read_master_key(master))
        if ended:
            assert read_master_key(master) != first
            assert read_master_key(folder / "master.key.old") == first
            (folder / "master.key.old").unlink()  # it may go now
            open_keyring(folder / "keyring.json", master, finish=True)
            break
    else:
        pytest.fail("it never came to its end")
    assert limit > 8


def test_a_node_that_shares_the_file_follows_at_its_next_start(tmp_path: Path) -> None:
    master = tmp_path / "master.key"
    one = Keyring.open_or_make(tmp_path / "one.json", make_master_key(master))
    other = Keyring.open_or_make(tmp_path / "two.json", read_master_key(master))
    sealed = other.seal(b"n", b"x")
    replace_master(one, master)
    assert open_keyring(tmp_path / "two.json", master, finish=True).open(b"n", sealed) == b"x"
    again = Keyring.open_or_make(tmp_path / "two.json", read_master_key(master))
    assert again.open(b"n", sealed) == b"x"
