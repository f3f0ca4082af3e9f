"""The write log and main memory: what a crash may leave, and what must come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mesi_cache import config
from mesi_cache.config import Config, ConfigError
from mesi_cache.core.records import Incr, Once, Outcome, Record
from mesi_cache.core.step import Logged
from mesi_cache.storage.main_memory import MainMemory
from mesi_cache.storage.sqlite_store import SqliteFile
from mesi_cache.storage.store import Loaded
from mesi_cache.storage.write_log import WriteLog


def _line(number: int, key: str = "k") -> Logged:
    return Logged(key, Record(b"%d" % number, number), "a", number, 0, Outcome("done", number))


def _config(directory: Path, *flags: str) -> Config:
    directory.mkdir(exist_ok=True)
    address = "127.0.0.1:1"
    return config.parse([f"--addr={address}", "--id=a", f"--data_dir={directory}", *flags], {})


def _log_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("log-*.bin"))


class Running:
    """Main memory with the node's callbacks."""

    def __init__(self, settings: Config) -> None:
        self.memory = MainMemory.open(settings)
        self.settled = asyncio.Event()
        self.loaded: dict[str, Loaded] = {}
        self.arrived = asyncio.Event()
        self.memory.start(
            on_settled=self.settled.set,
            on_loaded=self._on_loaded,
            applied_rows=lambda: [("a", 1, 2, Outcome("done", 2))],
            failed=lambda error: pytest.fail(str(error)),
        )

    def _on_loaded(self, records: Sequence[tuple[str, Loaded]]) -> None:
        self.loaded.update(records)
        self.arrived.set()

    async def load(self, key: str) -> Loaded:
        self.arrived.clear()
        known = dict(self.memory.load([key]))
        if key in known:
            return known[key]
        async with asyncio.timeout(20):
            await self.arrived.wait()
        return self.loaded.pop(key)

    async def crash(self) -> None:
        """The process dies: nothing more is written, the files stay as they are."""
        for task in self.memory._tasks:
            task.cancel()
        await asyncio.gather(*self.memory._tasks, return_exceptions=True)
        self.memory.close()


def test_every_line_appended_comes_back_in_order(tmp_path: Path) -> None:
    log, lines = WriteLog.recover(tmp_path, strict=True)
    assert lines == []
    log.append([_line(1), _line(2)])
    log.append([_line(3)])
    log.close()
    log, lines = WriteLog.recover(tmp_path, strict=True)
    assert lines == [_line(1), _line(2), _line(3)]
    log.append([_line(4)])
    log.close()
    assert WriteLog.recover(tmp_path, strict=True)[1][-1] == _line(4)


def test_a_torn_end_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    log, _ = WriteLog.recover(tmp_path, strict=True)
    log.append([_line(1), _line(2)])
    log.close()
    (path,) = tmp_path.glob("log-*.bin")
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        directory = tmp_path / str(cut)
        directory.mkdir()
        (directory / path.name).write_bytes(whole[:-cut])
        _, lines = WriteLog.recover(directory, strict=True)
        assert lines == [_line(1), _line(2)][: len(lines)]
        assert len(lines) == (1 if len(whole) - cut >= len(whole) // 2 else 0)


def test_damage_before_good_records_is_refused_where_everything_was_synced(tmp_path: Path) -> None:
    log, _ = WriteLog.recover(tmp_path, strict=True)
    log.append([_line(1), _line(2), _line(3)])
    log.close()
    (path,) = tmp_path.glob("log-*.bin")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="damaged at byte"):
        WriteLog.recover(tmp_path, strict=True)


async def test_what_was_appended_survives_a_crash_before_any_sync(tmp_path: Path) -> None:
    settings = _config(tmp_path, "--flush_ms=60000")
    first = Running(settings)
    assert first.memory.append([_line(1), _line(2)]) <= first.memory.settled
    await first.crash()
    second = Running(settings)
    assert second.memory.epoch == first.memory.epoch + 1
    assert await second.load("k") == Record(b"2", 2)
    assert ("a", 0, 2, Outcome("done", 2)) in second.memory.restored.applied
    await second.crash()


async def test_what_is_stored_needs_its_log_no_longer(tmp_path: Path) -> None:
    settings = _config(tmp_path)
    first = Running(settings)
    first.memory.append([_line(1), _line(2, "other")])
    await first.memory.stop()
    first.memory.close()
    assert _log_bytes(tmp_path) == 0
    second = Running(settings)
    assert await second.load("k") == Record(b"1", 1)
    assert await second.load("other") == Record(b"2", 2)
    assert await second.load("nothing") is None
    assert ("a", 1, 2, Outcome("done", 2)) in second.memory.restored.applied
    await second.crash()


async def test_what_was_stored_or_read_lately_is_known_at_once_and_is_the_newest(
    tmp_path: Path,
) -> None:
    running = Running(_config(tmp_path))
    memory = running.memory
    memory.append([_line(1)])
    assert await memory._save()
    assert not memory._pending
    assert dict(memory.load(["k"])) == {"k": Record(b"1", 1)}
    memory.append([_line(2)])
    assert dict(memory.load(["k"])) == {"k": Record(b"2", 2)}
    assert await memory._save()
    assert dict(memory.load(["k"])) == {"k": Record(b"2", 2)}
    await running.crash()
    again = Running(_config(tmp_path))
    again.memory._pending.clear()  # what the log has brought back
    assert await again.load("k") == Record(b"2", 2)
    assert dict(again.memory.load(["k"])) == {"k": Record(b"2", 2)}
    await again.crash()


async def test_with_fsync_always_nothing_is_told_before_it_is_durable(tmp_path: Path) -> None:
    running = Running(_config(tmp_path, "--fsync=always"))
    position = running.memory.append([_line(1)])
    assert running.memory.settled < position
    await asyncio.wait_for(running.settled.wait(), 20)
    assert running.memory.settled >= position
    await running.crash()


async def test_write_through_stores_before_it_tells(tmp_path: Path) -> None:
    running = Running(_config(tmp_path, "--write_policy=through"))
    position = running.memory.append([_line(1)])
    assert running.memory.settled < position
    await asyncio.wait_for(running.settled.wait(), 20)
    assert await running.memory._store.load(["k"]) == [Record(b"1", 1)]
    await running.crash()


async def test_main_memory_in_the_process_forgets(tmp_path: Path) -> None:
    settings = _config(tmp_path, "--store=memory")
    first = Running(settings)
    first.memory.append([_line(1)])
    assert await first.load("k") == Record(b"1", 1)
    await first.crash()
    second = Running(settings)
    assert await second.load("k") is None
    await second.crash()


def test_a_longer_lease_of_an_earlier_life_is_waited_for_until_it_is_over(tmp_path: Path) -> None:
    MainMemory.open(_config(tmp_path, "--lease_ms=5000")).close()
    second = MainMemory.open(_config(tmp_path, "--lease_ms=1000"))
    assert second.lease_wait_ms == 5000
    second.close()
    third = MainMemory.open(_config(tmp_path, "--lease_ms=1000"))
    assert third.lease_wait_ms == 5000  # the second may not have lived long enough
    asyncio.run(third.forget_lease())
    third.close()
    fourth = MainMemory.open(_config(tmp_path, "--lease_ms=1000"))
    assert fourth.lease_wait_ms == 1000
    fourth.close()


def test_a_store_of_another_member_is_refused(tmp_path: Path) -> None:
    store = f"--store=sqlite:{tmp_path / 'shared.db'}"
    MainMemory.open(_config(tmp_path / "one", store)).close()
    other = _config(tmp_path / "two", store)
    MainMemory.open(other).close()  # the same member again
    stranger = config.parse(
        ["--addr=127.0.0.1:2", "--id=b", f"--data_dir={tmp_path / 'two'}", store], {}
    )
    with pytest.raises(ConfigError, match="belongs to"):
        MainMemory.open(stranger)


@pytest.mark.parametrize("record", [Record(b"1", 1), None], ids=["done", "without effect"])
async def test_a_named_change_is_remembered_whether_it_is_in_the_log_or_stored(
    record: Record | None, tmp_path: Path
) -> None:
    settings = _config(tmp_path)
    once, outcome = Once.of("mine", "k", Incr(1)), Outcome("done", 1, b"1")
    until_ms = int(time.time() * 1000) + 60_000
    line = Logged("k", record, "a", 7, 0, outcome, once, until_ms)
    row = ("mine", once.print, until_ms, outcome)
    first = Running(settings)
    first.memory.append([line])
    await first.crash()
    second = Running(settings)  # from the log
    assert second.memory.restored.retries == [row]
    await second.memory.stop()
    second.memory.close()
    assert _log_bytes(tmp_path) == 0
    third = Running(settings)  # from the store
    assert third.memory.restored.retries == [row]
    assert await third.load("k") == record
    await third.crash()


class Died(BaseException):
    """kill -9."""


@pytest.mark.parametrize("at", ["prepare", "rotate", "save", "drop", "in drop"])
@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
async def test_a_death_at_any_step_of_a_checkpoint_loses_nothing_and_brings_nothing_old_back(
    at: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _config(tmp_path)
    first = Running(settings)
    memory = first.memory
    for task in memory._tasks:
        task.cancel()  # this test says when
    once, until_ms = Once.of("mine", "k", Incr(1)), int(time.time() * 1000) + 60_000
    refused = Outcome("mismatch", 1)
    named = Logged("k", None, "a", 9, 0, refused, once, until_ms)
    memory.append([_line(1), _line(1, "other"), named])
    await memory._checkpoint()
    memory.append([_line(2)])

    def dies(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def step(*args: object, **how: object) -> object:
            result = real(*args, **how) if after else None
            raise Died(result)

        monkeypatch.setattr(kind, name, step)

    if at == "save":
        dies(SqliteFile, "save")
    elif at == "in drop":
        dies(Path, "unlink")
    else:
        dies(WriteLog, at)
    with pytest.raises(Died):
        await memory._checkpoint()
    memory.append([_line(3)])  # what is still told before the process is gone
    monkeypatch.undo()
    await first.crash()
    for _ in range(2):  # and the next life dies at once
        again = Running(settings)
        assert await again.load("k") == Record(b"3", 3)
        assert await again.load("other") == Record(b"1", 1)
        assert again.memory.restored.retries[-1] == ("mine", once.print, until_ms, refused)
        await again.crash()
