"""The store gives back what was acknowledged, or says that it cannot."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from lock_manager.core.invariants import DiskImage
from lock_manager.core.peer_book import PeerIdentity
from lock_manager.core.raft import (
    HardState,
    Persist,
    Restored,
    Snapshot,
)
from lock_manager.storage import (
    CorruptStore,
    ForeignStore,
    Store,
    StoreFailed,
    StoreInUse,
)
from lock_manager.storage import store as storing

from .store_samples import MEMBERS, OWNER, entry


async def write(store: Store, writes: Iterable[Persist]) -> None:
    """Submits all and waits until the last one is durable."""
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    last = 0

    def done(seq: int) -> None:
        if seq == last and not finished.done():
            finished.set_result(None)

    def failed(error: StoreFailed) -> None:
        if not finished.done():
            finished.set_exception(error)

    store.start(done, failed)
    for one in writes:
        last = one.seq
        store.submit(one)
    async with asyncio.timeout(20):
        await finished


def sample_writes() -> list[Persist]:
    """Everything that Raft does to a store: append, truncate, compact, install over a conflict."""
    return [
        Persist(seq=1, hard_state=HardState(1, 1), entries=tuple(entry(i, 1) for i in range(1, 9))),
        Persist(seq=2, hard_state=HardState(2, None), truncate_from=5, entries=(entry(5, 2),)),
        Persist(seq=3, snapshot=Snapshot(3, 1, MEMBERS, os.urandom(3 << 20)), compact_to=3),
        Persist(seq=4, entries=tuple(entry(i, 2) for i in range(6, 40))),
        Persist(
            seq=5,
            hard_state=HardState(4, 2),
            snapshot=Snapshot(50, 3, MEMBERS, b"state"),
            truncate_from=51,
            compact_to=50,
        ),
        Persist(seq=6, entries=tuple(entry(i, 4) for i in range(51, 61))),
    ]


async def test_a_reopened_store_holds_what_was_written(tmp_path: Path) -> None:
    image = DiskImage()
    for cut in range(1, 7):
        path = tmp_path / str(cut)
        store = Store.open(path, OWNER)
        assert store.restored == Restored()
        writes = sample_writes()[:cut]
        await write(store, writes)
        await store.close()
        image = DiskImage()
        for one in writes:
            image.apply(one)
        again = Store.open(path, OWNER)
        assert again.restored == image.restored
        assert again.store_id == store.store_id
        await again.close()


async def test_all_that_waits_shares_one_transaction(tmp_path: Path) -> None:
    store = Store.open(tmp_path, OWNER)
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    store._connection.set_trace_callback(count)
    for seq in range(1, 501):  # before the writer starts: all of it waits
        store.submit(Persist(seq=seq, entries=(entry(seq, 1),)))
    await write(store, [Persist(seq=501, entries=(entry(501, 1),))])
    assert store.backlog_bytes == 0
    await store.close()
    assert commits <= 3


async def test_a_snapshot_reaches_the_disk_in_steps_that_nobody_waits_for(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "live", OWNER)
    entries = tuple(entry(i, 1) for i in range(1, 21))
    store._commit([Persist(seq=1, hard_state=HardState(1, 1), entries=entries)])
    store._commit([Persist(seq=2, snapshot=Snapshot(5, 1, MEMBERS, b"old"), compact_to=5)])
    while store._saving is not None:
        store._commit([])
    big = Snapshot(15, 1, MEMBERS, os.urandom(5 << 20))
    seen = []
    step = 0
    store._commit([Persist(seq=3, snapshot=big, compact_to=15, entries=(entry(21, 1),))])
    while store._saving is not None:
        step += 1
        # Others' writes go on meanwhile; whenever the power fails, the old or the new one is whole.
        store._commit([Persist(seq=3 + step, entries=(entry(21 + step, 1),))])
        shutil.copytree(tmp_path / "live", tmp_path / str(step))
        cut = await asyncio.to_thread(Store.open, tmp_path / str(step), OWNER)
        restored = cut.restored
        await cut.close()
        assert restored.snapshot in (Snapshot(5, 1, MEMBERS, b"old"), big)
        first = restored.snapshot.index + 1
        indices = [one.index for one in restored.entries if one.index >= first]
        assert indices == list(range(first, 22 + step))
        seen.append(restored.snapshot.index)
    assert step >= 5
    assert {5, 15} <= set(seen)
    await store.close()


async def test_a_newer_snapshot_supersedes_one_that_is_being_written(tmp_path: Path) -> None:
    store = Store.open(tmp_path, OWNER)
    entries = tuple(entry(i, 1) for i in range(1, 21))
    store._commit([Persist(seq=1, entries=entries)])
    first = Snapshot(5, 1, MEMBERS, os.urandom(4 << 20))
    second = Snapshot(12, 1, MEMBERS, os.urandom(3 << 20))
    store._commit([Persist(seq=2, snapshot=first, compact_to=5)])
    store._commit([])
    await write(store, [Persist(seq=3, snapshot=second, compact_to=12)])
    await store.close()
    again = Store.open(tmp_path, OWNER)
    assert again.restored.snapshot == second
    assert [one.index for one in again.restored.entries] == list(range(13, 21))
    await again.close()


async def test_peers_are_remembered(tmp_path: Path) -> None:
    store = Store.open(tmp_path, OWNER)
    store.bind_peer(PeerIdentity(2, "node2", "abc"))
    await write(store, [Persist(seq=1, hard_state=HardState(1, None))])
    await store.close()
    again = Store.open(tmp_path, OWNER)
    assert again.peers == {2: PeerIdentity(2, "node2", "abc")}
    await again.close()


async def test_a_slow_disk_is_the_threads_affair_and_the_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path, OWNER)
    done: asyncio.Queue[int] = asyncio.Queue()
    commit = store._commit
    by_the_loop: list[bool] = []
    slow = False

    def slowly(batch: list[Persist]) -> int:
        by_the_loop.append(threading.current_thread() is threading.main_thread())
        if slow:
            time.sleep(0.005)  # the disk's own time, not a wait for anything
        return commit(batch)

    monkeypatch.setattr(store, "_commit", slowly)
    monkeypatch.setattr(storing, "PATIENCE_LEADING_S", 0.002)
    store.start(done.put_nowait, pytest.fail)
    seq = 0

    async def write_some(count: int) -> None:
        nonlocal seq
        for _ in range(count):
            seq += 1
            store.submit(Persist(seq=seq, entries=(entry(seq, 1),)), leading=True)
            while await asyncio.wait_for(done.get(), 20) < seq:
                pass

    slow = True
    await write_some(storing.THREAD_DOES // 2)
    assert not all(by_the_loop)
    slow = False
    del by_the_loop[:]
    await write_some(storing.THREAD_DOES * 2)
    assert any(by_the_loop)  # it tried again, and stayed if the disk is quick enough
    for _ in range(500):  # many at once, by whoever
        seq += 1
        store.submit(Persist(seq=seq, entries=(entry(seq, 1),)), leading=True)
    told = [0]
    while told[-1] < seq:
        told.append(await asyncio.wait_for(done.get(), 20))
    assert told == sorted(told)
    await store.close()
    again = Store.open(tmp_path, OWNER)
    assert [one.index for one in again.restored.entries] == list(range(1, seq + 1))
    await again.close()


@pytest.mark.parametrize(
    ("broken", "write"),
    [
        pytest.param("INSERT", Persist(seq=1, entries=(entry(1, 1),)), id="lone entry"),
        pytest.param("COMMIT", Persist(seq=1, entries=(entry(1, 1), entry(2, 1))), id="loop"),
        pytest.param("COMMIT", Persist(seq=1, snapshot=Snapshot(1, 1, MEMBERS, b"")), id="thread"),
    ],
)
async def test_a_failed_commit_is_reported_once_and_nothing_is_written_after_it(
    tmp_path: Path, broken: str, write: Persist
) -> None:
    store = Store.open(tmp_path, OWNER)
    told: list[object] = []
    first = asyncio.Event()

    def tell(what: object) -> None:
        told.append(what)
        first.set()

    store.start(tell, tell)
    connection = store._connection

    class Failing:
        """A disk whose fsync fails once and would then pretend that all is well."""

        def __init__(self) -> None:
            self.failures = 1

        def execute(self, statement: str, *arguments: object) -> sqlite3.Cursor:
            if statement.startswith(broken) and self.failures:
                self.failures -= 1
                raise sqlite3.OperationalError("disk I/O error")
            return connection.execute(statement, *arguments)

        def executemany(self, statement: str, rows: Iterable[object]) -> sqlite3.Cursor:
            return connection.executemany(statement, rows)  # type: ignore[arg-type]

    store._connection = Failing()  # type: ignore[assignment]
    store.submit(write)
    async with asyncio.timeout(20):
        await first.wait()
    assert isinstance(told[0], StoreFailed)
    # Nothing is wrong with these: one for the loop, two for the thread.
    store.submit(Persist(seq=2, hard_state=HardState(7, 1)))
    store.submit(Persist(seq=3, hard_state=HardState(8, 1), snapshot=Snapshot(1, 1, MEMBERS, b"")))
    store.bind_peer(PeerIdentity(2, "node2", "abc"))
    await store.close()
    await asyncio.sleep(0)  # whatever the thread had to tell would be told by now
    assert store._extent.hard_state == HardState()
    connection.close()
    assert len(told) == 1


def test_a_directory_has_one_owner_and_one_user(tmp_path: Path) -> None:
    store = Store.open(tmp_path, OWNER)
    with pytest.raises(StoreInUse):
        Store.open(tmp_path, OWNER)
    asyncio.run(store.close())
    for wrong in (
        msgspec.structs.replace(OWNER, node_id="node2"),
        msgspec.structs.replace(OWNER, position=2),
        msgspec.structs.replace(OWNER, raft_addr="127.0.0.1:1", http_addr="127.0.0.1:2"),
    ):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(ForeignStore):
            Store.open(tmp_path, wrong)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    moved = msgspec.structs.replace(OWNER, raft_addr="127.0.0.1:1")
    asyncio.run(Store.open(tmp_path, moved).close())


def test_a_store_that_vanished_is_a_loss_and_not_a_fresh_start(tmp_path: Path) -> None:
    asyncio.run(Store.open(tmp_path, OWNER).close())
    (tmp_path / "raft.sqlite3").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptStore, match="missing"):
        Store.open(tmp_path, OWNER)
    (tmp_path / "raft.sqlite3").touch()
    with pytest.raises(CorruptStore):
        Store.open(tmp_path, OWNER)


def test_an_interrupted_first_start_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "raft.sqlite3").write_bytes(b"half a file")
    store = Store.open(tmp_path, OWNER)
    assert store.restored == Restored()
    asyncio.run(store.close())


# ------------------------------------------------------------------------------------------- damage


def everything_written() -> Restored:
    image = DiskImage()
    for one in small_writes():
        image.apply(one)
    return image.restored


def small_writes() -> list[Persist]:
    """Several transactions, a few kilobytes each, so that every kind of page is hit."""
    writes = [Persist(seq=1, hard_state=HardState(1, 1))]
    for seq in range(2, 12):
        first = (seq - 2) * 20 + 1
        writes.append(
            Persist(seq=seq, entries=tuple(entry(i, 1, 90) for i in range(first, first + 20)))
        )
    writes.append(Persist(seq=12, snapshot=Snapshot(30, 1, MEMBERS, b"s" * 9000), compact_to=30))
    writes.append(Persist(seq=13, hard_state=HardState(2, None), truncate_from=190))
    return writes


async def killed_store(path: Path, *, checkpointed: bool) -> None:
    """A data directory as kill -9 leaves it, one transaction per write."""
    store = Store.open(path / "live", OWNER)
    for one in small_writes():
        store._commit([one])
    if checkpointed:
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(path / "live", path / "killed")
    await store.close()


def outcome(path: Path) -> Restored | None:
    """What a start makes of the directory: its state, or None for a clear refusal."""
    try:
        store = Store.open(path, OWNER)
    except CorruptStore as error:
        message = str(error)
    else:
        asyncio.run(store.close())
        return store.restored
    assert "raft.sqlite3" in message
    assert "\n" not in message
    return None


@pytest.mark.parametrize("checkpointed", [False, True])
async def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, checkpointed: bool) -> None:
    """Cut or flip the files at many places: a start gives everything that was committed, or refuses
    in one line. Never less, never anything in between, never another exception."""
    await killed_store(tmp_path, checkpointed=checkpointed)
    everything = everything_written()
    chance = random.Random(7)
    killed = tmp_path / "killed"
    refused = 0

    def start_with(name: str, content: bytes) -> None:
        nonlocal refused
        damaged = tmp_path / "damaged"
        shutil.copytree(killed, damaged)
        (damaged / name).write_bytes(content)
        state = outcome(damaged)
        shutil.rmtree(damaged)
        refused += state is None
        assert state is None or state == everything, "something was lost in silence"

    places = int(os.environ.get("DAMAGE_PLACES", "25"))
    for name in ("raft.sqlite3", "raft.sqlite3-wal", "commits"):
        if not (killed / name).exists():
            continue
        content = (killed / name).read_bytes()
        if not content:
            continue
        for _ in range(places):
            await asyncio.to_thread(start_with, name, content[: chance.randrange(len(content))])
            at = chance.randrange(len(content))
            flipped = bytes([content[at] ^ (1 << chance.randrange(8))])
            await asyncio.to_thread(start_with, name, content[:at] + flipped + content[at + 1 :])
        page = 4096
        for start in range(0, len(content), page):
            zeroed = content[:start] + bytes(page) + content[start + page :]
            await asyncio.to_thread(start_with, name, zeroed[: len(content)])
    assert refused >= 10


async def test_a_power_cut_may_leave_an_older_high_water_mark(tmp_path: Path) -> None:
    """It is written without an fsync: an older number is no sign of a loss."""
    store = Store.open(tmp_path, OWNER)
    older = (tmp_path / "commits").read_bytes()
    await write(store, [Persist(seq=1, entries=(entry(1, 1),))])
    await store.close()
    assert (tmp_path / "commits").read_bytes() != older
    (tmp_path / "commits").write_bytes(older)
    again = Store.open(tmp_path, OWNER)
    assert [one.index for one in again.restored.entries] == [1]
    await again.close()


def test_a_commit_means_an_fsync(tmp_path: Path) -> None:
    store = Store.open(tmp_path, OWNER)
    (synchronous,) = store._connection.execute("PRAGMA synchronous").fetchone()
    (journal,) = store._connection.execute("PRAGMA journal_mode").fetchone()
    asyncio.run(store.close())
    assert (synchronous, journal) == (2, "wal")  # FULL: the WAL is synced at every commit
