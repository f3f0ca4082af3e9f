"""A store that is cut or flipped at any byte or page: whole, refused in one line, or, where a power
cut took the count of commits along, exactly as it was after one of its commits. Never a mixture.

`DAMAGE_EVERY=64` tries each 64th byte instead of a sample, `DAMAGE_EVERY=1` all of them (hours).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lock_manager.core.invariants import DiskImage
from lock_manager.core.raft import (
    Entry,
    HardState,
    Persist,
    Restored,
    Snapshot,
)
from lock_manager.storage import CorruptStore, Store

from .store_samples import MEMBERS, OWNER, entry

DATABASE, WAL, COUNT = "raft.sqlite3", "raft.sqlite3-wal", "commits"
EVERY = int(os.environ.get("DAMAGE_EVERY", "0"))
pytestmark = pytest.mark.timeout(36_000 if EVERY else 120)
PAGE, WAL_HEADER, FRAME_HEADER = 4096, 32, 24


def entries(first: int, last: int, term: int) -> tuple[Entry, ...]:
    return tuple(entry(index, term, 90) for index in range(first, last + 1))


def writes() -> list[Persist]:
    """All that Raft asks of a store, one transaction each."""
    return [
        Persist(seq=1, hard_state=HardState(1, 1)),
        Persist(seq=2, entries=entries(1, 20, 1)),
        Persist(seq=3, entries=entries(21, 40, 1)),
        Persist(seq=4, hard_state=HardState(2, None), truncate_from=31, entries=entries(31, 33, 2)),
        Persist(seq=5, entries=entries(34, 60, 2)),
        Persist(seq=6, hard_state=HardState(3, 2)),
        Persist(seq=7, entries=entries(61, 62, 3)),
        Persist(
            seq=8,
            snapshot=Snapshot(70, 3, MEMBERS, b"s" * 9_000),
            truncate_from=71,
            compact_to=70,
        ),
        Persist(seq=9, entries=entries(71, 75, 3)),
        Persist(seq=10, hard_state=HardState(4, None)),
    ]


@pytest.fixture(scope="module")
def history() -> list[Restored]:
    """What the store holds when it is made and after each write."""
    image = DiskImage()
    found = [image.restored]
    for one in writes():
        image.apply(one)
        found.append(image.restored)
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory as kill -9 leaves it, all of it still in the WAL."""
    path = tmp_path_factory.mktemp("store")

    async def fill() -> None:
        store = Store.open(path / "live", OWNER)
        synced = asyncio.Event()
        store.start(lambda seq: synced.set(), lambda error: None)
        for one in writes():
            synced.clear()
            store.submit(one)
            await asyncio.wait_for(synced.wait(), 20)
        shutil.copytree(path / "live", path / "killed")
        await store.close()

    asyncio.run(fill())
    return path / "killed"


def start(path: Path, **files: bytes) -> Restored | None:
    """What a start makes of the directory with these files in it; None: it refused, clearly."""
    damaged = path.parent / "damaged"
    shutil.copytree(path, damaged)
    try:
        for name, content in files.items():
            (damaged / name).write_bytes(content)
        try:
            store = Store.open(damaged, OWNER)
        except CorruptStore as error:
            refusal = str(error)
        else:
            asyncio.run(store.close())
            return store.restored
        assert DATABASE in refusal
        assert "\n" not in refusal
        return None
    finally:
        shutil.rmtree(damaged)


def damages(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut and flipped around the edges of pages and of WAL frames, and anywhere."""
    if EVERY:
        places = list(range(0, len(content), EVERY))
    else:
        chance = random.Random(11)
        edges = {*range(0, len(content), PAGE)}
        edges |= {*range(WAL_HEADER, len(content), FRAME_HEADER + PAGE)}
        near = sorted({edge + offset for edge in edges for offset in (-1, 0, 1, 9)})
        places = chance.sample(near, min(25, len(near))) + chance.sample(range(len(content)), 15)
    for at in places:
        if 0 <= at < len(content):
            yield at, content[:at]
            yield at, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def count_of(commits: int) -> bytes:
    number = commits.to_bytes(8, "big")
    return number + zlib.crc32(number).to_bytes(4, "big")


def test_a_wal_damaged_anywhere_is_a_shorter_history_at_worst(
    killed: Path, history: list[Restored]
) -> None:
    """After kill -9 the count is exact, and nothing at all may be missing; after a power cut it may
    be older, and what it does not count may be."""
    content = (killed / WAL).read_bytes()
    used = len(content.rstrip(b"\0"))  # the rest may be kept ready for what comes
    seen = set()
    for at, damaged in damages(content[:used]):
        exact = start(killed, **{WAL: damaged})
        assert exact in (None, history[-1]), f"damage at {at}: something was lost in silence"
        survived = at % len(history)
        state = start(killed, **{WAL: damaged, COUNT: count_of(survived + 1)})
        if state is not None:
            assert state in history[survived:], f"damage at {at}: neither before nor after a commit"
            seen.add(history.index(state))
    assert len(seen) >= 5, seen


def test_a_database_damaged_anywhere_is_whole_or_refused(
    killed: Path, history: list[Restored]
) -> None:
    whole = killed.parent / "checkpointed"
    shutil.copytree(killed, whole)
    with closing(sqlite3.connect(whole / DATABASE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert start(whole) == history[-1]
    refused = 0
    for at, damaged in damages((whole / DATABASE).read_bytes()):
        state = start(whole, **{DATABASE: damaged, COUNT: count_of(0)})  # the count does not help
        refused += state is None
        assert state in (None, history[-1]), f"damage at {at}: something was lost in silence"
    assert refused >= 20
