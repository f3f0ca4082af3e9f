"""The writer: order, group commit, rotation, and every way a disk says no."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from message_queue.storage import files
from message_queue.storage.framing import HEADER, Frame, scan
from message_queue.storage.log import Durable, Fsync, SegmentLog, Trouble
from message_queue.storage.segments import segment_of, segment_path, segments_in


class Bench:
    """A log with everything it reported."""

    def __init__(
        self, directory: Path, segment_bytes: int = 1 << 20, fsync: Fsync = Fsync.ALWAYS
    ) -> None:
        self.durable: list[Durable[int]] = []
        self.halts: list[str] = []
        self.troubles: list[Trouble | None] = []
        self.log: SegmentLog[int] = SegmentLog(
            directory,
            segment_bytes=segment_bytes,
            fsync=fsync,
            on_durable=self.durable.extend,
            on_halt=self.halts.append,
            on_trouble=self.troubles.append,
            reserve_bytes=64 * 1024,
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - polls what has no event
                await asyncio.sleep(0.005)

    def slow(self, disk: bool) -> None:
        """As after syncs that took long: the thread writes (or else the loop, whatever the disk of
        this machine is like)."""
        self.log._slow_for = 1 << 30 if disk else 0
        self.log._mean_s = -1.0

    async def written(self, count: int) -> None:
        await self.until(lambda: len(self.durable) >= count)


SLOW = pytest.mark.parametrize("slow", [False, True], ids=["by the loop", "by the thread"])


def on_disk(directory: Path) -> list[bytes]:
    return [
        item.payload
        for number in segments_in(directory)
        for item in scan(segment_path(directory, number).read_bytes())
        if isinstance(item, Frame)
    ]


async def test_records_are_reported_in_order_and_read_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    for n in range(100):
        bench.log.append(b"record %d" % n, n)
    await bench.written(100)
    assert [d.token for d in bench.durable] == list(range(100))
    locators = [d.locator for d in bench.durable]
    found = await bench.log.read(locators[::-1])
    assert [found[locator] for locator in locators] == [b"record %d" % n for n in range(100)]
    assert bench.log.queued_bytes == 0
    await bench.log.close()
    assert on_disk(tmp_path) == [b"record %d" % n for n in range(100)]


async def test_what_waits_goes_out_in_one_write_with_one_sync(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    before = bench.log.syncs
    for n in range(500):
        bench.log.append(b"x" * 100, n)
    await bench.written(500)
    assert bench.log.syncs - before <= 2
    await bench.log.close()


async def test_a_quick_disk_is_written_when_the_turn_is_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.slow(False)
    bench.log.append(b"warm", 0)
    await bench.written(1)
    bench.log.append(b"one", 1)
    bench.log.append(b"two", 2)
    assert len(bench.durable) == 1
    await asyncio.sleep(0)
    assert [d.token for d in bench.durable] == [0, 1, 2]
    await bench.log.close()


async def test_what_comes_while_the_thread_writes_follows_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, segment_bytes=400)
    await bench.log.start({}, {})
    bench.slow(True)
    go, real = threading.Event(), files.sync_data
    begun = threading.Event()

    def sync_data(descriptor: int) -> None:
        begun.set()
        assert go.wait(10)
        real(descriptor)

    monkeypatch.setattr(files, "sync_data", sync_data)
    bench.log.append(b"first", 0)
    await bench.until(begun.is_set)
    bench.log.append(b"fits", 9)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # More than fits into this segment: the writer task is wanted, and has to wait its turn.
    for n in range(1, 9):
        bench.log.append(b"%d" % n * 100, n)
        await asyncio.sleep(0)
    assert bench.durable == []
    closing = asyncio.create_task(bench.log.close())
    await asyncio.sleep(0)
    go.set()
    await closing
    assert [d.token for d in bench.durable] == [0, 9, *range(1, 9)]
    assert on_disk(tmp_path) == [b"first", b"fits"] + [b"%d" % n * 100 for n in range(1, 9)]
    assert bench.log.crcs == {
        n: crc32(segment_path(tmp_path, n).read_bytes()) for n in segments_in(tmp_path)
    }


async def test_a_listener_that_fails_halts_the_node(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    def fails(written: list[Durable[int]]) -> None:
        raise ValueError("a step of the core")

    bench.log._on_durable = fails
    bench.log.append(b"stored", 0)
    await bench.until(lambda: bool(bench.halts))
    bench.log.append(b"after that nothing is", 1)
    await asyncio.sleep(0.01)
    await bench.log.close()
    assert len(bench.halts) == 1
    assert on_disk(tmp_path) == [b"stored"]


@SLOW
async def test_a_write_that_fails_for_no_reason_of_the_disk_halts_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.slow(slow)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    def write_all(descriptor: int, data: bytes) -> None:
        raise ValueError(descriptor)

    monkeypatch.setattr(files, "write_all", write_all)
    bench.log.append(b"never there", 0)
    await bench.until(lambda: bool(bench.halts))
    await bench.log.close()
    assert (len(bench.halts), bench.durable) == (1, [])


async def test_a_full_segment_is_followed_by_the_next_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, segment_bytes=300)
    await bench.log.start({}, {})
    for n in range(10):
        bench.log.append(b"y" * 100, n)
        await bench.written(n + 1)
    assert len(bench.log.sizes) >= 4
    assert all(size <= 300 for size in bench.log.sizes.values())
    await bench.log.delete(segment_of(bench.durable[0].locator))
    await bench.log.delete(bench.log.segment)
    assert bench.log.segment in bench.log.sizes
    assert 1 not in segments_in(tmp_path)
    await bench.log.close()


async def test_a_record_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path, segment_bytes=300)
    await bench.log.start({}, {})
    bench.log.append(b"z" * 5000, 0)
    bench.log.append(b"small", 1)
    await bench.written(2)
    locator = bench.durable[0].locator
    assert await bench.log.read([locator]) == {locator: b"z" * 5000}
    await bench.log.close()


async def test_a_flipped_record_is_not_read_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.log.append(b"precious", 0)
    await bench.written(1)
    path = segment_path(tmp_path, bench.log.segment)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert await bench.log.read([bench.durable[0].locator]) == {}
    await bench.log.close()


@SLOW
async def test_a_full_disk_refuses_new_messages_keeps_acks_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.slow(slow)
    bench.log.append(b"before", 0)
    await bench.written(1)
    reserve = tmp_path / "reserve"
    assert reserve.exists()
    real = files.write_all
    full = True

    def write_all(descriptor: int, data: bytes) -> None:
        if full and reserve.exists():
            real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, data)

    monkeypatch.setattr(files, "write_all", write_all)
    bench.log.append(b"an ack", 1)
    await bench.written(2)
    assert bench.troubles == [Trouble.FULL]
    assert not reserve.exists()
    full = False
    await bench.until(lambda: bench.log.trouble is None)
    assert reserve.exists()
    bench.log.append(b"after", 2)
    await bench.written(3)
    await bench.log.close()
    assert on_disk(tmp_path) == [b"before", b"an ack", b"after"]
    assert bench.halts == []


async def test_a_limit_on_file_size_only_begins_another_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    real = files.write_all

    def write_all(descriptor: int, data: bytes) -> None:
        if os.fstat(descriptor).st_size + len(data) > 400:
            raise OSError(errno.EFBIG, "File too large")
        real(descriptor, data)

    monkeypatch.setattr(files, "write_all", write_all)
    for n in range(10):
        bench.log.append(b"w" * 150, n)
        await bench.written(n + 1)
    assert bench.troubles == []
    await bench.log.close()
    assert len(on_disk(tmp_path)) == 10


@SLOW
async def test_a_failed_sync_moves_the_batch_to_a_new_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.slow(slow)
    bench.log.append(b"one", 0)
    await bench.written(1)
    first = bench.log.segment
    real = files.sync_data
    failures = iter([True])

    def sync_data(descriptor: int) -> None:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(files, "sync_data", sync_data)
    bench.log.append(b"two", 1)
    await bench.written(2)
    assert segment_of(bench.durable[1].locator) > first
    await bench.log.close()
    # The old file ends at its last synced byte: nothing in it is of doubtful standing.
    assert segment_path(tmp_path, first).stat().st_size == len(HEADER) + len(b"one") + 10
    assert on_disk(tmp_path) == [b"one", b"two"]
    assert bench.halts == []


async def test_two_failed_syncs_in_a_row_halt_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    await bench.log.start({}, {})
    bench.log.append(b"one", 0)
    await bench.written(1)
    headers = [0]
    real = files.sync_data

    def sync_data(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > len(HEADER):
            headers[0] += 1
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(files, "sync_data", sync_data)
    bench.log.append(b"two", 1)
    await bench.until(lambda: bool(bench.halts))
    assert headers == [2]
    assert len(bench.durable) == 1
    await bench.log.close()


async def test_a_failed_sync_after_the_report_halts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, fsync=Fsync.INTERVAL)
    await bench.log.start({}, {})

    def sync_data(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sync_data", sync_data)
    bench.log.append(b"reported early", 0)
    await bench.until(lambda: bool(bench.halts))
    assert len(bench.halts) == 1
    await bench.log.close()
