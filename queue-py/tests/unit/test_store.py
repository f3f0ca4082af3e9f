"""The store: what was persisted is there after a restart, and compaction never changes that."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from message_queue.core.ids import unpack_dot
from message_queue.core.messages import PromiseRecord, Standing
from message_queue.storage.framing import HEADER, Frame, scan
from message_queue.storage.recovery import recover
from message_queue.storage.segments import segment_path, segments_in

sys.path.insert(0, str(Path(__file__).parent))
from queue_store import EPOCH, StoreBench, ack, plain_puts, puts, seal


async def test_everything_persisted_is_there_after_a_restart(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(PromiseRecord(3, EPOCH, 1), seal(3))
    bench.persist(puts(3, 1, 10))
    bench.persist(ack(3, 11, 2, 5))
    await bench.settled()
    before = await bench.bodies(3)
    view = bench.store.states[3].view()
    await bench.store.close()
    again = await StoreBench(tmp_path).open()
    assert again.store.states[3].view() == view
    assert again.store.states[3].standing is Standing.MEMBER
    assert await again.bodies(3) == before
    assert sorted(before) == [1, 3, 4, 6, 7, 8, 9, 10]
    place = again.store.place(3, EPOCH, 4)
    assert place is not None
    assert place.meta == b"meta 4"
    await again.store.close()


async def test_a_put_acked_before_it_was_written_is_not_indexed(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    bench.persist(puts(1, 1, 1))
    bench.persist(ack(1, 2, 1))
    await bench.settled()
    assert bench.store.place(1, EPOCH, 1) is None
    assert bench.store.figures()["stored_records"] == 0
    await bench.store.close()


async def test_of_a_run_what_was_acked_before_it_was_written_is_not_indexed(
    tmp_path: Path,
) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    bench.persist(plain_puts(1, 1020, 10))  # across two blocks of the index
    bench.persist(ack(1, 1030, 1021, 1024, 1029))
    await bench.settled()
    left = {seq: b'"%d"' % seq for seq in (1020, 1022, 1023, 1025, 1026, 1027, 1028)}
    assert await bench.bodies(1) == left
    assert bench.store.figures()["stored_records"] == len(left)
    await bench.store.close()
    again = await StoreBench(tmp_path).open()
    assert await again.bodies(1) == left
    await again.store.close()


async def test_compaction_moves_what_is_left_of_runs(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path, segment_bytes=600).open()
    bench.persist(seal(1))
    left = {}
    for first in range(1, 200, 21):
        bench.persist(plain_puts(1, first, 20))
        acked = [seq for seq in range(first, first + 20) if seq % 7]
        bench.persist(ack(1, first + 20, *acked))
        left |= {seq: b'"%d"' % seq for seq in range(first, first + 20) if not seq % 7}
        await bench.settled()
    size = bench.store.figures()["log_bytes"]
    await bench.store.compact()
    assert bench.store.figures()["log_bytes"] < size / 2
    assert await bench.bodies(1) == left
    await bench.store.close()
    again = await StoreBench(tmp_path, segment_bytes=600).open()
    assert await again.bodies(1) == left
    await again.store.close()


async def test_compaction_gives_space_back_and_changes_nothing(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(PromiseRecord(1, EPOCH, 1), seal(1), PromiseRecord(2, EPOCH, 1), seal(2))
    seq = {1: 1, 2: 1}
    for round_ in range(40):
        for partition in (1, 2):
            first = seq[partition]
            bench.persist(puts(partition, first, 5))
            # Every fourth message of partition 1 stays, nothing of partition 2.
            keep = {first} if partition == 1 and round_ % 4 == 0 else set()
            gone = [s for s in range(first, first + 5) if s not in keep]
            bench.persist(ack(partition, first + 5, *gone))
            seq[partition] = first + 6
        await bench.settled()
    size = bench.store.figures()["log_bytes"]
    views = {p: bench.store.states[p].view() for p in (1, 2)}
    bodies = await bench.bodies(1)
    assert len(bodies) == 10
    await bench.store.compact()
    assert bench.store.figures()["log_bytes"] < size / 4
    assert await bench.bodies(1) == bodies
    await bench.store.close()
    again = await StoreBench(tmp_path).open()
    assert {p: again.store.states[p].view() for p in (1, 2)} == views
    assert again.store.states[1].promised == EPOCH
    assert await again.bodies(1) == bodies
    # Later records still fall into place, and a second round works on what the first one wrote.
    again.persist(ack(1, seq[1], *bodies))
    again.persist(puts(1, seq[1] + 1, 1))
    await again.settled()
    await again.store.compact()
    assert list(await again.bodies(1)) == [seq[1] + 1]
    await again.store.close()
    last = await StoreBench(tmp_path).open()
    assert list(await last.bodies(1)) == [seq[1] + 1]
    await last.store.close()


async def test_reading_while_compaction_moves_finds_the_new_place(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path, segment_bytes=600).open()
    bench.persist(seal(1))
    for first in range(1, 60, 6):
        bench.persist(puts(1, first, 4))
        bench.persist(ack(1, first + 4, first, first + 1, first + 2))
        await bench.settled()
    expected = await bench.bodies(1)
    reads = [asyncio.create_task(bench.bodies(1)) for _ in range(20)]
    await bench.store.compact()
    for read in reads:
        assert await read == expected
    await bench.store.close()


async def write_a_log(directory: Path) -> bytes:
    bench = await StoreBench(directory).open()
    bench.persist(PromiseRecord(1, EPOCH, 1), seal(1))
    bench.persist(puts(1, 1, 3, size=5))
    bench.persist(ack(1, 4, 2))
    bench.persist(plain_puts(1, 5, 2))
    await bench.settled()
    await bench.store.close()
    return segment_path(directory, 1).read_bytes()


async def test_a_cut_at_every_byte_recovers_a_prefix(tmp_path: Path) -> None:
    data = await write_a_log(tmp_path / "whole")
    seen = set()
    for size in range(len(data) + 1):
        directory = tmp_path / "cut"
        directory.mkdir(exist_ok=True)
        segment_path(directory, 1).write_bytes(data[:size])
        found = recover(directory)
        assert found.damaged == {}
        state = found.states.get(1)
        held = tuple(seq for _, seq in state.held.dots()) if state else ()
        assert held in ((), (1, 2, 3), (1, 3), (1, 3, 5, 6)), "a run is there as a whole or not"
        assert {unpack_dot(dot)[1] for dot in found.index.dots(1)} == set(held)
        assert not found.withdrawn
        # What is cut stays cut: a second start finds a clean log.
        again = recover(directory)
        assert again.cut_bytes == 0
        assert again.frames == found.frames
        seen.add(held)
        for number in segments_in(directory):
            segment_path(directory, number).unlink()
    assert seen == {(), (1, 2, 3), (1, 3), (1, 3, 5, 6)}


async def test_a_flip_of_every_byte_withdraws_the_partition_or_cuts_the_tail(
    tmp_path: Path,
) -> None:
    data = await write_a_log(tmp_path / "whole")
    promise = next(item for item in scan(data) if isinstance(item, Frame))
    directory = tmp_path / "flip"
    directory.mkdir()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x10
        # In a segment that is not the last one, nothing is ever taken for a torn tail.
        segment_path(directory, 1).write_bytes(broken)
        segment_path(directory, 2).write_bytes(HEADER)
        found = recover(directory)
        assert found.cut_bytes == 0
        assert segment_path(directory, 1).stat().st_size == len(data)
        assert 1 in found.damaged
        state = found.states[1]
        # The seal that follows the promise says all that the promise said.
        before_the_seal = at < promise.end
        assert state.standing is (Standing.MEMBER if before_the_seal else Standing.DAMAGED)
        for epoch, seq in state.held.dots():
            assert any(dot for dot in found.index.dots(1) if unpack_dot(dot) == (epoch, seq))


async def test_a_damaged_segment_goes_to_quarantine_and_its_good_part_stays(
    tmp_path: Path,
) -> None:
    data = bytearray(await write_a_log(tmp_path))
    at = data.index(b"meta 2")
    data[at] ^= 1
    segment_path(tmp_path, 1).write_bytes(data)
    bench = await StoreBench(tmp_path).open()
    assert list(bench.store.recovered.damaged) == [1]
    assert bench.store.states[1].standing is Standing.DAMAGED
    await bench.store.compact()
    assert segments_in(tmp_path / "quarantine") == [1]
    assert list(await bench.bodies(1)) == [5, 6]
    await bench.store.close()
    # The next start finds no damage, and still knows that the partition is not whole.
    again = await StoreBench(tmp_path).open()
    assert not again.store.recovered.damaged
    assert again.store.states[1].standing is Standing.DAMAGED
    assert list(await again.bodies(1)) == [5, 6]
    await again.store.close()


async def test_damage_before_a_checkpoint_costs_nothing(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    bench.persist(puts(1, 1, 2))
    await bench.settled()
    await bench.store.close()
    bench = await StoreBench(tmp_path).open()
    checkpoint = bench.store.states[1].checkpoint()
    bench.persist(checkpoint)
    await bench.settled()
    await bench.store.close()
    path = segment_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[len(HEADER) + 12] ^= 1  # in the seal
    path.write_bytes(data)
    found = recover(tmp_path)
    assert found.damaged
    assert found.withdrawn == []
    assert found.states[1].standing is Standing.MEMBER


async def test_a_record_damaged_while_running_is_named(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    bench.persist(puts(1, 1, 1))
    bench.persist(puts(1, 2, 1))
    await bench.settled()
    path = segment_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[data.index(b"meta 1")] ^= 1
    path.write_bytes(data)
    found, damaged = await bench.store.read(1, [(EPOCH, 1), (EPOCH, 2), (EPOCH, 99)])
    assert damaged == [(EPOCH, 1)]
    assert [seq for _, seq, _, _ in found] == [2]
    await bench.store.close()


async def test_a_segment_that_is_mostly_needed_stays_as_it_is(tmp_path: Path) -> None:
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    for seq in range(1, 31):
        bench.persist(puts(1, seq, 1))
        await bench.settled()
    bench.persist(ack(1, 31, 2))
    bench.persist(puts(1, 32, 20))
    await bench.settled()
    needed = await bench.bodies(1)
    first = segment_path(tmp_path, 1).read_bytes()
    await bench.store.compact()
    assert segment_path(tmp_path, 1).read_bytes() == first
    assert await bench.bodies(1) == needed
    await bench.store.close()


async def test_the_disk_does_not_grow_while_all_but_one_message_a_segment_is_acked(
    tmp_path: Path,
) -> None:
    """rabbitmq #13113. Sizes differ, so that counting messages instead of bytes would not do."""
    bench = await StoreBench(tmp_path).open()
    bench.persist(seal(1))
    seq, kept, most = 1, 0, 0
    for round_ in range(60):
        bench.persist(puts(1, seq, 1, size=3000))
        bench.persist(puts(1, seq + 1, 9, size=10))
        # Now the large one stays for good, now a small one.
        stays = seq if round_ % 20 == 0 else seq + 1 if round_ % 3 == 0 else None
        gone = [s for s in range(seq, seq + 10) if s != stays]
        bench.persist(ack(1, seq + 10, *gone))
        kept += {seq: 3000, seq + 1: 10}.get(stays or 0, 0)
        seq += 11
        await bench.settled()
        if bench.store.housekeeper._worth_it():
            await bench.store.compact()
        most = max(most, bench.store.figures()["log_bytes"])
    assert bench.store.figures()["compactions"] > 3
    assert kept > 9000
    assert most < 2 * kept + 8 * 4096, f"{most} bytes of log for {kept}"
    assert len(await bench.bodies(1)) == 22
    await bench.store.close()
