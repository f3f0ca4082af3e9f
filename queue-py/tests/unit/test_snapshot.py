"""The index snapshot: it spares a start the log, and is never believed against its segments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from message_queue.core.messages import PromiseRecord, Standing
from message_queue.storage import compaction
from message_queue.storage.framing import Frame, scan
from message_queue.storage.recovery import Recovered, recover
from message_queue.storage.segments import segment_path, segments_in
from message_queue.storage.snapshot import SnapshotUnreadable, parse, path_in, read

sys.path.insert(0, str(Path(__file__).parent))
from queue_store import EPOCH, StoreBench, ack, plain_puts, puts, seal


async def write_with_snapshot(directory: Path) -> StoreBench:
    """Two partitions, a snapshot in the middle, and records behind it; closed."""
    bench = await StoreBench(directory, segment_bytes=2048).open()
    bench.persist(PromiseRecord(1, EPOCH, 1), seal(1), PromiseRecord(2, EPOCH, 1), seal(2))
    bench.persist(plain_puts(1, 1, 3))
    bench.persist(puts(2, 1, 1, size=4))
    bench.persist(ack(1, 4, 2))
    await bench.settled()
    assert await bench.store.housekeeper.snapshot()
    bench.persist(plain_puts(1, 5, 2))
    bench.persist(ack(1, 7, 1, 5))
    await bench.settled()
    await bench.store.close()
    return bench


def seen(found: Recovered) -> tuple[object, ...]:
    """What a start makes of a directory."""
    return tuple(
        (p, found.states[p].view(), found.states[p].standing, list(found.index.dots(p)))
        for p in sorted(found.states)
    ) + tuple(sorted((s, live.puts, live.bytes) for s, live in found.index.live.items()))


async def test_a_start_from_a_snapshot_sees_what_a_replay_of_the_whole_log_sees(
    tmp_path: Path,
) -> None:
    bench = await write_with_snapshot(tmp_path)
    with_it = recover(tmp_path)
    assert with_it.from_snapshot == 3
    assert not with_it.warnings
    path_in(tmp_path).unlink()
    without = recover(tmp_path)
    assert without.from_snapshot == 0
    assert without.frames > with_it.frames
    assert seen(with_it) == seen(without)
    assert with_it.sizes == without.sizes
    assert with_it.crcs == without.crcs
    await bench.open()
    assert sorted(await bench.bodies(1)) == [3, 6]
    await bench.store.close()


async def test_a_snapshot_with_any_byte_cut_or_flipped_is_ignored(tmp_path: Path) -> None:
    await write_with_snapshot(tmp_path)
    path = path_in(tmp_path)
    data = path.read_bytes()
    expected = seen(recover(tmp_path))
    for at in range(len(data)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]):
            with pytest.raises(SnapshotUnreadable):
                parse(broken)
    path.write_bytes(data[:-1])
    found = recover(tmp_path)
    assert found.useless_snapshot
    assert "damaged" in found.warnings[0]
    assert seen(found) == expected
    # A store that starts says so once and does without it.
    bench = await StoreBench(tmp_path).open()
    assert not path.exists()
    await bench.store.close()


async def test_segments_cut_behind_a_snapshot_withdraw_what_only_it_knew(tmp_path: Path) -> None:
    """The promise, the seal, every put and every ack that it vouches for was durable: a log that
    ends earlier is no torn tail."""
    await write_with_snapshot(tmp_path)
    snapshot = read(path_in(tmp_path))
    assert snapshot is not None
    mark = max(snapshot.end.marks)
    whole = segment_path(tmp_path, mark.segment).read_bytes()
    later = [n for n in segments_in(tmp_path) if n > mark.segment]
    for number in later:
        segment_path(tmp_path, number).unlink()
    *_, clock = (item for item in scan(whole[: mark.size]) if isinstance(item, Frame))
    for size in range(8, clock.start):
        segment_path(tmp_path, mark.segment).write_bytes(whole[:size])
        found = recover(tmp_path)
        assert any("ahead" in warning for warning in found.warnings)
        assert found.states[1].promised == EPOCH
        # The last record but the clock's is partition 1's ack: it may not be forgotten.
        assert found.states[1].standing is Standing.DAMAGED
        assert any(record.partition == 1 for record in found.withdrawn)  # type: ignore[union-attr]
    segment_path(tmp_path, mark.segment).write_bytes(whole[: mark.size])
    assert recover(tmp_path).states[1].standing is Standing.MEMBER


async def test_a_flip_in_a_segment_under_a_snapshot_is_found_at_the_next_start(
    tmp_path: Path,
) -> None:
    await write_with_snapshot(tmp_path)
    path = segment_path(tmp_path, 1)
    data = path.read_bytes()
    snapshot = read(path_in(tmp_path))
    assert snapshot is not None
    assert snapshot.end.marks[0].segment == 1
    for at in range(snapshot.end.marks[0].size):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x08]) + data[at + 1 :])
        found = recover(tmp_path)
        assert found.useless_snapshot
        assert found.damaged or found.cut_bytes
    path.unlink()
    assert recover(tmp_path).states[1].standing is Standing.DAMAGED


async def test_what_was_withdrawn_for_a_snapshot_stays_withdrawn_when_it_is_gone(
    tmp_path: Path,
) -> None:
    await write_with_snapshot(tmp_path)
    path = segment_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:200])
    bench = await StoreBench(tmp_path).open()
    assert bench.store.states[1].standing is Standing.DAMAGED
    assert not path_in(tmp_path).exists()
    await bench.store.close()
    again = await StoreBench(tmp_path).open()
    assert not again.store.recovered.warnings
    assert again.store.states[1].standing is Standing.DAMAGED
    assert again.store.states[1].promised == EPOCH
    await again.store.close()


async def test_a_segment_goes_only_when_no_snapshot_rests_on_it(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path, segment_bytes=1024).open()
    bench.persist(PromiseRecord(1, EPOCH, 1), seal(1))
    for first in range(1, 201, 5):
        bench.persist(plain_puts(1, first, 4))
        # Nothing is left of the first segments, and a part of the later ones.
        bench.persist(ack(1, first + 4, *range(first, first + (4 if first < 120 else 3))))
        await bench.settled()
    assert await bench.store.housekeeper.snapshot()
    under = set(segments_in(tmp_path))
    await bench.store.compact()
    assert under - set(segments_in(tmp_path)), "nothing was deleted under the snapshot"
    snapshot = read(path_in(tmp_path))
    assert snapshot is not None
    assert {mark.segment for mark in snapshot.end.marks} <= set(segments_in(tmp_path))
    held = await bench.bodies(1)
    await bench.store.close()
    found = recover(tmp_path)
    assert not found.warnings
    assert not found.withdrawn
    again = await StoreBench(tmp_path).open()
    assert await again.bodies(1) == held
    await again.store.close()


async def test_a_full_disk_takes_no_snapshot_and_keeps_none(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1), puts(1, 1, 3))
    await bench.settled()
    assert await bench.store.housekeeper.snapshot()

    async def no_room(size: int) -> bool:
        return size < 0

    bench.store._log.has_room = no_room  # type: ignore[method-assign]
    assert not await bench.store.housekeeper.snapshot()
    assert not path_in(tmp_path).exists()
    await bench.store.close()
    assert len(recover(tmp_path).states[1].held) == 3


async def test_a_snapshot_is_worth_it_by_what_a_start_would_replay_and_by_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches cost a start little; a snapshot, which costs by the message, waits for many."""
    monkeypatch.setattr(compaction, "TAIL_COST", 100)
    bench = await StoreBench(tmp_path, segment_bytes=1 << 20).open()
    housekeeper = bench.store.housekeeper
    bench.persist(seal(1))
    at = 1
    for _ in range(10):
        bench.persist(plain_puts(1, at, 320))
        at += 320
    await bench.settled()
    assert 100 < housekeeper.tail < 130, "ten for the puts of a run, one for the run"
    assert not housekeeper.due, "less was written than four snapshots take"
    for _ in range(10):
        bench.persist(plain_puts(1, at, 320, size=2_000))
        at += 320
    await bench.settled()
    assert housekeeper.due
    assert await housekeeper.snapshot()
    assert housekeeper.tail < 10
    for _ in range(9):
        bench.persist(plain_puts(1, at, 320, size=2_000))
        at += 320
    await bench.settled()
    assert not housekeeper.due, "a start would replay nine runs"
    await bench.store.close()


async def test_a_start_counts_what_it_replayed(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path, segment_bytes=1 << 20).open()
    bench.persist(seal(1))
    bench.persist(plain_puts(1, 1, 640))
    await bench.settled()
    tail = bench.store.housekeeper.tail
    await bench.store.close()
    await bench.open()
    assert tail <= bench.store.housekeeper.tail <= tail + 3, "or it would never write one"
    await bench.store.close()
