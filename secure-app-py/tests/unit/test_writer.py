"""Who commits (loop or thread), in which order, and how decided records reach the tables."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from secure_store.core.changes import Change, Destroy, MarkDeleted, PutValue, Remember
from secure_store.core.effects import AppendLog, Durable, SaveState
from secure_store.core.kv import apply
from secure_store.core.records import Record
from secure_store.core.tokens import TokenSet
from secure_store.storage import backlog, writer
from secure_store.storage.database import Database
from secure_store.storage.fold import Decided
from secure_store.storage.keyring import Keyring
from secure_store.storage.writer import Writer
from testkit.sim.loading import load

stored = load(str(Path(__file__).with_name("stored.py")))
records, filled, MASTER = stored.records, stored.filled, stored.MASTER


class Desk:
    """A writer on a fresh store, and what it told."""

    def __init__(self, path: Path) -> None:
        keyring = Keyring.open_or_make(path / "keyring.json", MASTER)
        self.database = Database(path / "store.db", keyring, writable=True)
        self.again = lambda: Database(path / "store.db", keyring)
        self.told: list[tuple[int, int]] = []
        self.failures: list[str] = []
        self.on_durable: Callable[[int, int], None] = lambda *_: None
        self.writer = Writer(
            self.database,
            on_durable=self._durable,
            on_failed=self.failures.append,
            on_quarantine=lambda _: None,
            quarantine_dir=path,
            now_ms=lambda: 0,
        )
        self.writer.start()
        self.number = 0
        self.last = self.database.last()

    def _durable(self, number: int, applied_seq: int) -> None:
        self.told.append((number, applied_seq))
        self.on_durable(number, applied_seq)

    def append(self, *changes: Change) -> tuple[Record, ...]:
        made = records(*changes, start=self.last)
        self.last = made[-1].position
        self.number += 1
        self.writer.persist([AppendLog(self.number, made)])
        return made

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():  # noqa: ASYNC110 - nothing to await
                await asyncio.sleep(0.005)

    def numbers(self) -> list[int]:
        return [number for number, _ in self.told if number]


def put(key: str, version: int, value: bytes = b"1") -> PutValue:
    return PutValue(key, version, value, 1, 0)


async def test_a_small_write_is_committed_by_the_loop_one_turn_later(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 60.0)
    desk = Desk(tmp_path)
    desk.append(put("a", 1))
    desk.append(put("b", 1))
    assert not desk.told, "the frames of this turn leave first"
    await asyncio.sleep(0)
    assert desk.numbers() == [2], "both in one transaction"
    assert desk.writer.own_commits == 1
    assert desk.again().last() == desk.last
    await desk.writer.stop()


async def test_writes_stay_in_order_while_loop_and_thread_take_turns(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 60.0)
    monkeypatch.setattr(writer, "OWN_BYTES", 1_000)
    desk = Desk(tmp_path)
    chance = random.Random(3)
    for round_number in range(60):
        for _ in range(chance.randint(1, 4)):
            desk.append(put(f"k{round_number}", 1, b"v" * chance.choice([1, 10, 2_000])))
        if chance.random() < 0.7:
            await asyncio.sleep(chance.choice([0, 0, 0.002]))
        if round_number % 6 == 0:
            await desk.until(lambda: desk.numbers()[-1:] == [desk.number])
    await desk.until(lambda: desk.numbers()[-1:] == [desk.number])
    assert desk.numbers() == sorted(desk.numbers())
    assert 0 < desk.writer.own_commits < desk.writer.commits, "both have written"
    log = desk.again().read_log(0, 1_000, 1 << 30)
    assert log is not None
    assert [r.seq for r in log] == list(range(1, desk.last.seq + 1))
    await desk.writer.stop()
    desk.again().check_rows()


async def test_while_the_disk_is_slow_the_thread_writes_and_then_the_loop_again(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 0.0)
    monkeypatch.setattr(writer, "THREAD_DOES", 3)
    desk = Desk(tmp_path)
    for version in range(1, 6):
        desk.append(put("a", version))
        await desk.until(lambda: desk.numbers()[-1:] == [desk.number])
    assert desk.writer.own_commits == 2
    assert desk.writer.commits == 5
    await desk.writer.stop()


async def test_a_commit_that_fails_ends_the_node_and_nothing_is_written_after_it(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 60.0)
    desk = Desk(tmp_path)
    real = desk.database.commit

    def failing() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(desk.database, "commit", failing)
    desk.append(put("a", 1))
    await desk.until(lambda: bool(desk.failures))
    monkeypatch.setattr(desk.database, "commit", real)
    desk.append(put("b", 1))
    desk.writer.persist([SaveState(9, Durable(epoch=4))])
    desk.writer.apply([Decided((put("a", 1),), desk.last)])
    await asyncio.sleep(0.05)
    await desk.writer.stop()
    assert desk.numbers() == []
    assert desk.failures == ["the database cannot be written: disk I/O error"]
    assert desk.again().last().seq == 0
    assert desk.again().load_state().epoch == 0


async def test_a_job_of_the_thread_has_the_database_to_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 60.0)
    monkeypatch.setattr(writer, "JOB_PAUSE_S", 0.0)
    desk = Desk(tmp_path)
    inside: list[str] = []
    steps = iter(range(20))

    def job(_: Database) -> bool:
        inside.append(threading.current_thread().name)
        return next(steps) == 19

    done: list[bool] = []
    desk.writer.background(job, lambda: done.append(True))
    for version in range(1, 20):
        desk.append(put("a", version))
        await asyncio.sleep(0)
    await desk.until(lambda: done == [True] and desk.numbers()[-1:] == [desk.number])
    assert set(inside) == {"writer"}
    desk.append(put("a", 20))
    await asyncio.sleep(0)
    assert desk.numbers()[-1] == desk.number, "and then it is the loop's again"
    await desk.writer.stop()
    desk.again().check_rows()


@pytest.mark.parametrize("slow", [False, True])
async def test_decided_records_reach_the_tables_a_slice_at_a_time_without_an_fsync(
    tmp_path, monkeypatch, slow
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_PRIMARY_S", 0.0 if slow else 60.0)
    monkeypatch.setattr(backlog, "FOLD_AFTER_S", 0.05)
    monkeypatch.setattr(backlog, "SLICE_RECORDS", 10)
    desk = Desk(tmp_path)
    made: list[Record] = []
    for n in range(35):
        made += desk.append(put(f"k{n % 7}", n // 7 + 1, b"%d" % n))
    await desk.until(lambda: desk.numbers()[-1:] == [desk.number])
    commits = desk.writer.commits
    desk.writer.apply([Decided((put(f"k{n % 7}", n // 7 + 1, b"%d" % n),), r.position)
                       for n, r in enumerate(made)])  # fmt: skip
    await desk.until(lambda: desk.told[-1][1] == desk.last.seq)
    assert len([t for t in desk.told if t[1]]) >= 4, "in slices"
    assert desk.writer.commits == commits, "nobody waited for an fsync"
    again = desk.again()
    assert again.applied() == desk.last
    assert again.value("k3", 5) == b"31"
    await desk.writer.stop()
    again.check_rows()


async def test_stopping_brings_everything_to_the_tables(tmp_path) -> None:
    desk = Desk(tmp_path)
    made = desk.append(put("a", 1, b"7"))
    desk.writer.apply([Decided((put("a", 1, b"7"),), made[-1].position)])
    await desk.writer.stop()
    assert desk.again().value("a", 1) == b"7"
    assert desk.again().applied() == desk.last


def _some_changes(chance: random.Random, count: int) -> list[Change]:
    """A history that the rules allow, on few keys."""
    states: dict[str, object] = {}
    made: list[Change] = []
    while len(made) < count:
        key = chance.choice("abc")
        state = states.get(key)
        newest = state.newest.number if state is not None else 0  # type: ignore[attr-defined]  # a KeyState
        match chance.randint(0, 9):
            case 0 if state is not None:
                change: PutValue | MarkDeleted | Destroy = Destroy(key, 0)
            case 1 | 2 if state is not None:
                change = Destroy(key, chance.choice(state.versions).number)  # type: ignore[attr-defined]  # a KeyState
            case 3 if state is not None:
                change = MarkDeleted(key, newest, 5)
            case _:
                change = put(key, newest + 1, b"%d" % len(made))
        states[key] = apply(state, change)  # type: ignore[arg-type]  # a KeyState or None
        made.append(change)
    return made


@pytest.mark.parametrize("seed", range(int(os.environ.get("SIM_SEEDS", "6"))))
def test_folding_many_at_once_comes_out_as_one_by_one(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    changes = _some_changes(chance, 150)
    remember = Remember(b"s" * 32, b"r" * 32, 200, b"{}", 1, 50)
    made = records(*changes, remember)
    outcomes = []
    for name in ("one by one", "many at once"):
        folder = tmp_path / name
        folder.mkdir()
        keyring = Keyring.open_or_make(folder / "keyring.json", MASTER)
        database = Database(folder / "store.db", keyring, writable=True)
        rest = list(made)
        database.db.execute("PRAGMA synchronous = OFF")  # it is the order that is tested
        with database.transaction():
            database.save_state(Durable(cluster_id="c"))
        while rest:
            size = 1 if name == "one by one" else chance.randint(1, 90)
            part, rest = tuple(rest[:size]), rest[size:]
            with database.transaction():
                database.append(part)
                database.apply(part, TokenSet(), 0)
        database.check_rows()
        assert list(database.inspect()) == []
        outcomes.append(
            (
                database.keys_from("", 10),
                [(k, v, database.value(k, v)) for k, v in database.db.execute(
                    "SELECT key, version FROM vals ORDER BY key, version")],
                database.applied(),
            )
        )  # fmt: skip
    assert outcomes[0] == outcomes[1]


def test_what_was_folded_without_an_fsync_is_lost_whole_or_not_at_all(tmp_path: Path) -> None:
    """A power cut may leave any beginning of the write-ahead log: whatever it leaves opens, and
    the log still has what the tables lost."""
    database, keyring = filled(tmp_path)
    more = records(put("n", 1, b"x" * 9_000), put("a", 3), start=database.last())
    with database.transaction():
        database.append(more)
    synced = (tmp_path / "store.db-wal").read_bytes()
    tokens = database.load_tokens()
    with database.transaction(is_synced=False):
        database.apply(more, tokens, 0)
    assert database.db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL again"
    whole = (tmp_path / "store.db-wal").read_bytes()
    main = (tmp_path / "store.db").read_bytes()
    database.db.close()
    lost = kept = 0
    page = 4096 + 24
    assert len(whole) == len(synced), "it has its full length from the start"
    starts = range(32, len(whole), page)
    unsynced = [at for at in starts if whole[at : at + page] != synced[at : at + page]]
    for cut in (*unsynced, len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "store.db").write_bytes(main)
        (folder / "store.db-wal").write_bytes(whole[:cut] + synced[cut:])
        after = Database(folder / "store.db", keyring)
        assert after.last() == more[-1].position, "what was synced is there"
        after.check_rows()
        if after.applied() == more[-1].position:
            kept += 1
            assert after.value("n", 1) == b"x" * 9_000
        else:
            lost += 1
            assert after.key_state("n") is None
            assert after.read_log(after.applied().seq, 10, 1 << 20) == more
        after.db.close()
    assert lost, "some cuts take it"
    assert kept, "some do not"
