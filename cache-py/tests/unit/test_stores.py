"""Main memory: tombstones that go, deadlines nobody asks for, names of changes, other stores."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesi_cache.config import ConfigError
from mesi_cache.core.records import Outcome, Record
from mesi_cache.storage import sqlite_store, store
from mesi_cache.storage.origin_store import OriginStore
from mesi_cache.storage.origins import Refused
from mesi_cache.storage.sqlite_store import SqliteFile, SqliteStore
from mesi_cache.storage.store import (
    OVERDUE_MS,
    Loaded,
    MemoryStore,
    Saving,
    Store,
    StoreUnavailable,
)

NOW_MS = 1_700_000_000_000.0


class FakeOrigin:
    """An origin in a dict, which can be made to fail or refuse."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.away = False
        self.read_only = False
        self.asked: list[str] = []

    async def get(self, keys: Sequence[str]) -> list[bytes | StoreUnavailable | None]:
        self.asked.extend(keys)
        if self.away:
            return [StoreUnavailable("away")] * len(keys)
        return [self.values.get(key) for key in keys]

    async def put(
        self, values: Sequence[tuple[str, bytes | None]]
    ) -> list[Refused | StoreUnavailable | None]:
        if self.away:
            return [StoreUnavailable("away")] * len(values)
        if self.read_only:
            return [Refused("405")] * len(values)
        for key, value in values:
            self.values.pop(key, None)
            if value is not None:
                self.values[key] = value
        return [None] * len(values)

    async def stop(self) -> None:
        pass


@pytest.fixture
def threads() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        yield reader, writer


@pytest.fixture(params=["memory", "sqlite"])
async def kept(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = SqliteStore(SqliteFile(tmp_path / "m.db", "me", "sqlite"), *threads)
    yield opened
    opened.close()


async def save(into: Store, *records: tuple[str, Record], wall_ms: float = NOW_MS) -> None:
    await into.save(Saving(records, [], [], wall_ms))


async def one(of: Store, key: str) -> Loaded:
    return (await of.load([key]))[0]


async def test_tombstones_go_and_their_versions_never_come_again(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_TOMBSTONES", 10)
    monkeypatch.setattr(sqlite_store, "MOST_TOMBSTONES", 10)
    keys = [f"k{number}" for number in range(150)]
    for number, key in enumerate(keys):
        await save(kept, (key, Record(None, number + 1)), ("alive", Record(b"1", number + 1)))
    if isinstance(kept, SqliteStore):
        rows = len(kept._file.rows(keys))
    else:
        assert isinstance(kept, MemoryStore)
        rows = len(kept._records) - 1
    assert rows <= 11
    for number, key in enumerate(keys):
        record = await one(kept, key)
        assert isinstance(record, Record)
        assert record.value is None
        assert record.version >= number + 1
    assert await one(kept, "alive") == Record(b"1", 150)
    assert await one(kept, "never written") is None


async def test_a_value_whose_time_is_long_over_is_removed_and_its_version_stays_used(
    kept: Store,
) -> None:
    expires_ms = int(NOW_MS) + 1000
    await save(kept, ("short", Record(b"1", 7, expires_ms)), ("ever", Record(b"1", 1)))
    await save(kept, wall_ms=expires_ms + OVERDUE_MS - 1)
    assert await one(kept, "short") == Record(b"1", 7, expires_ms)  # the home may still log it
    await save(kept, wall_ms=expires_ms + OVERDUE_MS + 1)
    assert await one(kept, "short") == Record(None, 7)
    assert await one(kept, "ever") == Record(b"1", 1)


async def test_a_value_written_again_is_not_removed_for_its_old_deadline(kept: Store) -> None:
    expires_ms = int(NOW_MS) + 1000
    await save(kept, ("k", Record(b"1", 1, expires_ms)))
    await save(kept, ("k", Record(b"2", 2)))
    await save(kept, wall_ms=expires_ms + OVERDUE_MS + 1)
    assert await one(kept, "k") == Record(b"2", 2)


async def test_keys_that_no_client_can_name_are_kept_like_others(kept: Store) -> None:
    await save(kept, ("\x00once\x00a", Record(b"1", 1)), ("\x00once\x00b", Record(b"2", 1)))
    assert await kept.load(["\x00once\x00a", "\x00once\x00b", "\x00once\x00"]) == [
        Record(b"1", 1), Record(b"2", 1), None,
    ]  # fmt: skip


async def test_names_of_changes_are_kept_until_their_time_is_over(
    tmp_path: Path, threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor]
) -> None:
    file = SqliteFile(tmp_path / "m.db", "me", "sqlite")
    rows = [(f"n{number}", "print", int(NOW_MS) + number, Outcome("done", 1)) for number in (5, 9)]
    await SqliteStore(file, *threads).save(Saving([], [], rows, NOW_MS))
    assert file.restored().retries == rows
    await SqliteStore(file, *threads).save(Saving([], [], [], NOW_MS + 6))
    assert file.restored().retries == rows[1:]
    file.close()


def test_a_file_made_for_another_store_is_refused(tmp_path: Path) -> None:
    SqliteFile(tmp_path / "m.db", "me", "sqlite").close()
    with pytest.raises(ConfigError, match="was made for sqlite, not for http://origin"):
        SqliteFile(tmp_path / "m.db", "me", "http://origin")


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.fixture
async def far(
    tmp_path: Path, threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor]
) -> AsyncIterator[tuple[OriginStore, FakeOrigin]]:
    origin = FakeOrigin()
    opened = OriginStore(origin, SqliteFile(tmp_path / "m.db", "me", "fake"), *threads)
    yield opened, origin
    opened.close()


async def test_what_the_origin_has_is_read_through_at_a_version_that_stays(
    far: tuple[OriginStore, FakeOrigin],
) -> None:
    kept, origin = far
    origin.values["k"] = b'"A"'
    assert await one(kept, "k") == Record(b'"A"', 1)
    assert await one(kept, "k") == Record(b'"A"', 1)
    origin.values["k"] = b'"B"'  # behind our back
    assert await one(kept, "k") == Record(b'"B"', 2)
    del origin.values["k"]
    assert await one(kept, "k") == Record(None, 3)
    assert await one(kept, "never") == Record(None, 0)


async def test_what_is_saved_goes_to_the_origin_and_keeps_version_and_deadline(
    far: tuple[OriginStore, FakeOrigin],
) -> None:
    kept, origin = far
    await save(kept, ("a", Record(b"1", 4, 99)), ("b", Record(None, 2)), ("\x00r", Record(b"0", 1)))
    assert origin.values == {"a": b"1"}
    assert await kept.load(["a", "b", "\x00r"]) == [
        Record(b"1", 4, 99), Record(None, 2), Record(b"0", 1),
    ]  # fmt: skip
    assert "\x00r" not in origin.asked


async def test_an_origin_that_is_away_is_neither_read_old_nor_written_by_halves(
    far: tuple[OriginStore, FakeOrigin],
) -> None:
    kept, origin = far
    await save(kept, ("k", Record(b"1", 1)))
    origin.away = True
    assert isinstance(await one(kept, "k"), StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        await save(kept, ("k", Record(b"2", 2)))
    origin.away = False
    assert await one(kept, "k") == Record(b"1", 1)
    await save(kept, ("k", Record(b"2", 2)))
    assert await one(kept, "k") == Record(b"2", 2)


async def test_what_a_read_only_origin_refuses_is_kept_here(
    far: tuple[OriginStore, FakeOrigin],
) -> None:
    kept, origin = far
    origin.values = {"k": b"0", "gone": b"0", "other": b"0"}
    origin.read_only = True
    await save(kept, ("k", Record(b"1", 2)), ("gone", Record(None, 2)))
    assert await kept.load(["k", "gone", "other"]) == [
        Record(b"1", 2), Record(None, 2), Record(b"0", 1),
    ]  # fmt: skip
    origin.read_only = False
    await save(kept, ("k", Record(b"3", 3)))
    assert origin.values["k"] == b"3"
    assert await one(kept, "k") == Record(b"3", 3)


async def test_an_overdue_value_is_removed_at_the_origin(
    far: tuple[OriginStore, FakeOrigin],
) -> None:
    kept, origin = far
    await save(kept, ("k", Record(b"1", 3, int(NOW_MS))), ("new", Record(b"1", 1, int(NOW_MS))))
    late_ms = NOW_MS + OVERDUE_MS + 1
    await save(kept, ("new", Record(b"2", 2)), wall_ms=late_ms)
    assert origin.values == {"new": b"2"}
    assert await one(kept, "k") == Record(None, 3)


async def test_what_is_forgotten_of_versions_is_bounded_and_never_comes_again(
    far: tuple[OriginStore, FakeOrigin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "MOST_KNOWN", 15)
    kept, origin = far
    for number in range(80):
        await save(kept, (f"k{number}", Record(b"1", 5)))
    with sqlite3.connect(kept._file._writer.execute("PRAGMA database_list").fetchone()[2]) as db:
        assert db.execute("SELECT count(*) FROM known").fetchone()[0] <= 16
    for number in range(80):
        origin.values[f"k{number}"] = b"2"
        record = await one(kept, f"k{number}")
        assert isinstance(record, Record)
        assert record.version > 5
    await asyncio.sleep(0)
