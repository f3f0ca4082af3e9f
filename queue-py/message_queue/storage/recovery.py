"""Start-up: the newest snapshot, verified against the segments, then the log behind it; without a
good snapshot, the whole log.

Every byte of the log is checked at every start: what a snapshot covers by one CRC a segment, the
rest frame by frame. A torn end of the last segment is cut: it is a write that was never reported.
Damage anywhere else is reported and stepped over; every good frame after it is read. What the
damage cost cannot be known, so every partition that it may have touched is withdrawn: the node
counts in no majority of it until it has copied it from its peers (`WithdrawRecord`), and the
damaged segment goes to `quarantine/` once its good part is rewritten. The same holds for what a
snapshot knows and its segments do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import (
    CheckpointRecord,
    ClockRecord,
    LogRecord,
    PromiseRecord,
    SealRecord,
    Span,
    Spans,
    WithdrawRecord,
)
from message_queue.core.placement.ring import PARTITIONS
from message_queue.core.replication.dots import DotSet, joined, runs_in
from message_queue.core.replication.state import PartitionState
from message_queue.storage import files, snapshot
from message_queue.storage.framing import HEADER, Damage, Frame, scan
from message_queue.storage.index import BLOCK_BITS, Index
from message_queue.storage.log import Mark
from message_queue.storage.records import Moved, UnreadableRecord, decode, replay_cost
from message_queue.storage.records import runs_in as runs_stored
from message_queue.storage.segments import locate, segment_path, segments_in
from message_queue.storage.snapshot import Snapshot, SnapshotUnreadable


@dataclass
class Recovered:
    """What the log said."""

    states: dict[int, PartitionState] = field(default_factory=dict)
    index: Index = field(default_factory=Index)
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of every segment that stays."""
    crcs: dict[int, int] = field(default_factory=dict)
    """CRC-32 of their bytes."""
    clock_ms: int = 0
    frames: int = 0
    """Records that were replayed,"""
    cost: int = 0
    """and what that took (`records.replay_cost`)."""
    from_snapshot: int = 0
    """Puts that a snapshot spared us."""
    marked: frozenset[int] = frozenset()
    """Segments that the snapshot in force rests on."""
    useless_snapshot: bool = False
    """One is there that must go once `withdrawn` is durable."""
    warnings: list[str] = field(default_factory=list)
    cut_bytes: int = 0
    damaged: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Segment -> unreadable stretches."""
    withdrawn: list[LogRecord] = field(default_factory=list)
    """Already applied to the states; to be made durable before anything else."""


def recover(directory: Path) -> Recovered:
    """Read what is in `directory`. Blocks. Raises OSError."""
    found = Recovered()
    numbers = segments_in(directory)
    newest: Snapshot | None = None
    try:
        newest = snapshot.read(snapshot.path_in(directory))
    except SnapshotUnreadable as e:
        found.useless_snapshot = True
        found.warnings.append(f"the index snapshot is damaged, the whole log is replayed: {e}")
    ahead: dict[int, PartitionState] = {}
    marks: dict[int, Mark] = {}
    start = (0, 0)
    if newest is not None:
        wrong = _unlike(directory, newest)
        if wrong:
            found.warnings.append(
                f"the index snapshot is ahead of segments {wrong}: the whole log is replayed"
            )
            ahead = newest.states
            found.useless_snapshot = True
        else:
            found.states, found.index = newest.states, newest.index
            found.clock_ms = newest.end.clock_ms
            found.from_snapshot = found.index.count()
            marks = {mark.segment: mark for mark in newest.end.marks}
            found.marked = frozenset(marks)
            found.sizes = {mark.segment: mark.size for mark in newest.end.marks}
            found.crcs = {mark.segment: mark.crc for mark in newest.end.marks}
            start = newest.end.replay_from
    checked: set[int] = set()
    for number in numbers:
        if number < start[0] and number not in found.marked:
            # Compaction had written that it needs this one no more, and was stopped.
            segment_path(directory, number).unlink()
    for number, data, crc in _loaded(directory, [n for n in numbers if n >= start[0]], marks):
        offset = start[1] if number == start[0] else 0
        found.crcs[number] = crc
        _read_segment(found, directory, number, data, offset, number == numbers[-1], checked)
    _prune(found)
    _withdraw(found, checked)
    _withdraw_ahead(found, ahead)
    return found


def _unlike(directory: Path, newest: Snapshot) -> list[int]:
    """Segments whose bytes are not those that the snapshot rests on."""

    def differs(mark: Mark) -> bool:
        try:
            seen = files.checksum(segment_path(directory, mark.segment), mark.size)
        except FileNotFoundError:
            return True
        return seen != (mark.size, mark.crc)

    marks = newest.end.marks
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [
            m.segment for m, wrong in zip(marks, pool.map(differs, marks), strict=True) if wrong
        ]


def _loaded(
    directory: Path, numbers: list[int], marks: dict[int, Mark]
) -> Iterator[tuple[int, bytes, int]]:
    """(segment, its bytes, their CRC-32); the next one is on its way while one is replayed. What a
    mark vouches for was summed up already."""

    def load(number: int) -> tuple[bytes, int]:
        data = segment_path(directory, number).read_bytes()
        mark = marks.get(number)
        if mark is None:
            return data, crc32(data)
        return data, crc32(memoryview(data)[mark.size :], mark.crc)

    with ThreadPoolExecutor(1, thread_name_prefix="log-loader") as loader:
        ahead = [loader.submit(load, number) for number in numbers[:1]]
        for at, number in enumerate(numbers):
            loaded = ahead.pop()
            ahead += [loader.submit(load, later) for later in numbers[at + 1 : at + 2]]
            yield number, *loaded.result()


def _read_segment(
    found: Recovered,
    directory: Path,
    number: int,
    data: bytes,
    offset: int,
    last: bool,
    checked: set[int],
) -> None:
    """Replay one segment from `offset` on."""
    path = segment_path(directory, number)
    if last and len(data) < len(HEADER):
        # The crash came between the file's name and its first record.
        found.cut_bytes += len(data)
        del found.crcs[number]
        path.unlink()
        files.sync_directory(directory)
        return
    for item in scan(data, offset):
        match item:
            case Frame():
                _replay(found, number, item, checked)
            case Damage(start, end, torn=True) if last:
                found.cut_bytes += end - start
                if start < len(HEADER):
                    path.write_bytes(HEADER)
                files.cut(path, max(start, len(HEADER)))
                data = data[:start] if start >= len(HEADER) else HEADER
                found.crcs[number] = crc32(data)
            case Damage(start, end):
                found.damaged.setdefault(number, []).append((start, end))
                checked.clear()
    found.sizes[number] = len(data)


def _replay(found: Recovered, segment: int, frame: Frame, checked: set[int]) -> None:
    try:
        record = decode(frame.payload)
    except UnreadableRecord:
        found.damaged.setdefault(segment, []).append((frame.start, frame.end))
        checked.clear()
        return
    found.frames += 1
    found.cost += replay_cost(record)
    if isinstance(record, ClockRecord):
        found.clock_ms = max(found.clock_ms, record.cluster_ms)
        return
    locator = locate(segment, frame.start, frame.end - frame.start)
    for run in runs_stored(record):
        # Every put is indexed on sight and sorted out at the end: while older segments are
        # missing, the state before a checkpoint may take a held put for a dead one.
        found.index.put_run(run.partition, run.first, locator, run.meta, run.sizes)
    if isinstance(record, Moved):
        return
    state = found.states.get(record.partition)
    if state is None:
        state = found.states[record.partition] = PartitionState(record.partition)
    state.apply(record)
    if isinstance(record, CheckpointRecord | SealRecord):
        # A seal is the whole state as well, as the partition's owner knew it.
        checked.add(record.partition)


def _prune(found: Recovered) -> None:
    """Drop what is not needed, a block at a time."""
    for partition in found.index.partitions():
        state = found.states.get(partition)
        needed = state.bodies() if state is not None else DotSet()
        blocks = found.index.blocks(partition)
        for key, block in list(blocks.items()):
            base = key << BLOCK_BITS
            for _, first, last in runs_in(0, base, block.bits() & ~needed.chunk(base)):
                epoch, seq = unpack_dot(first)
                found.index.drop_spans(partition, ((epoch, seq, seq + last - first),))


def _withdraw(found: Recovered, checked: set[int]) -> None:
    """Withdraw what damage may have cost. `checked`: partitions with a checkpoint (or seal) after
    all damage, whose records before it are redundant (but for bodies, which are looked for).
    A damaged record may have been all that there was of a partition, unless others were
    checkpointed since: a round of checkpoints leaves out no partition."""
    everything = found.damaged and not checked
    for partition in range(PARTITIONS) if everything else sorted(found.states):
        state = found.states.setdefault(partition, PartitionState(partition))
        lost = missing_bodies(state, found.index)
        if lost or (found.damaged and partition not in checked):
            record = WithdrawRecord(partition, lost)
            state.apply(record)
            found.withdrawn.append(record)


def _withdraw_ahead(found: Recovered, ahead: dict[int, PartitionState]) -> None:
    """The snapshot was durable, so what it says was: a promise, an ack or a put that the segments
    do not have (any more) is no torn tail. A promise can be kept even so; for the rest, peers are
    asked."""
    for partition, known in sorted(ahead.items()):
        state = found.states.setdefault(partition, PartitionState(partition))
        behind = state.sealed < known.sealed or (
            state.sealed == known.sealed
            and any(
                state.records.context.within(span) != (span,)
                for span in known.records.context.spans()
            )
        )
        records: list[LogRecord] = []
        if state.promised < known.promised:
            records.append(PromiseRecord(partition, known.promised, known.ring, elected=True))
            behind = True
        if behind:
            records.append(WithdrawRecord(partition, ()))
        for record in records:
            state.apply(record)
        found.withdrawn += records


def missing_bodies(state: PartitionState, index: Index) -> Spans:
    """Dots that the state needs and the index does not have."""
    blocks = index.blocks(state.partition)
    lost: list[Span] = []
    for epoch, number, bits in state.bodies().numbered():
        block = blocks.get(pack_dot(epoch, number << BLOCK_BITS) >> BLOCK_BITS)
        absent = bits & ~block.bits() if block is not None else bits
        lost += runs_in(epoch, number << BLOCK_BITS, absent)
    return joined(lost)
