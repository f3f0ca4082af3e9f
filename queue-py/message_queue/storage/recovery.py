"""Start-up: replay the segments into partition states and the index.

A torn end of the last segment is cut: it is a write that was never reported. Damage anywhere else
is reported and stepped over; every good frame after it is read. What the damage cost cannot be
known, so every partition that it may have touched is withdrawn: the node counts in no majority of
it until it has copied it from its peers (`WithdrawRecord`), and the damaged segment goes to
`quarantine/` once its good part is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import (
    AppendRecord,
    CheckpointRecord,
    ClockRecord,
    CopyRecord,
    LogRecord,
    PromiseRecord,
    Put,
    SealRecord,
    Spans,
    WithdrawRecord,
)
from message_queue.core.placement.ring import PARTITIONS
from message_queue.core.replication.dots import joined
from message_queue.core.replication.state import PartitionState
from message_queue.storage import files
from message_queue.storage.framing import HEADER, Damage, Frame, scan
from message_queue.storage.index import Index, Place
from message_queue.storage.log import locate, segment_path, segments_in
from message_queue.storage.records import Moved, UnreadableRecord, decode


@dataclass
class Recovered:
    """What the log said."""

    states: dict[int, PartitionState] = field(default_factory=dict)
    index: Index = field(default_factory=Index)
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of every segment that stays."""
    totals: dict[int, int] = field(default_factory=dict)
    """Puts that were ever written to a segment."""
    clock_ms: int = 0
    frames: int = 0
    cut_bytes: int = 0
    damaged: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Segment -> unreadable stretches."""
    withdrawn: list[WithdrawRecord] = field(default_factory=list)
    """Already applied to the states; to be made durable before anything else."""


def recover(directory: Path) -> Recovered:
    """Read every segment of `directory` in order. Blocks. Raises OSError."""
    found = Recovered()
    numbers = segments_in(directory)
    checked: set[int] = set()
    for number in numbers:
        path = segment_path(directory, number)
        data = path.read_bytes()
        if number == numbers[-1] and len(data) < len(HEADER):
            # The crash came between the file's name and its first record.
            found.cut_bytes += len(data)
            path.unlink()
            files.sync_directory(directory)
            continue
        for item in scan(data):
            match item:
                case Frame():
                    _replay(found, number, item, checked)
                case Damage(start, end, torn=True) if number == numbers[-1]:
                    found.cut_bytes += end - start
                    if start < len(HEADER):
                        path.write_bytes(HEADER)
                    files.cut(path, max(start, len(HEADER)))
                    data = data[:start]
                case Damage(start, end):
                    found.damaged.setdefault(number, []).append((start, end))
                    checked.clear()
        found.sizes[number] = max(len(data), len(HEADER))
    _prune(found)
    _withdraw(found, checked)
    return found


def puts_in(record: LogRecord | Moved) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(partition, dot, meta, body) of every put that a record stores."""
    match record:
        case AppendRecord(partition, epoch, entries):
            for entry in entries:
                if isinstance(entry, Put):
                    yield partition, pack_dot(epoch, entry.seq), entry.meta, entry.body
        case CopyRecord(partition, _, copies) | Moved(partition, copies):
            for copy in copies:
                yield partition, pack_dot(copy.epoch, copy.seq), copy.meta, copy.body
        case PromiseRecord() | SealRecord() | WithdrawRecord() | ClockRecord() | CheckpointRecord():
            return
        case _:
            assert_never(record)


def _replay(found: Recovered, segment: int, frame: Frame, checked: set[int]) -> None:
    try:
        record = decode(frame.payload)
    except UnreadableRecord:
        found.damaged.setdefault(segment, []).append((frame.start, frame.end))
        checked.clear()
        return
    found.frames += 1
    if isinstance(record, ClockRecord):
        found.clock_ms = max(found.clock_ms, record.cluster_ms)
        return
    locator = locate(segment, frame.start, frame.end - frame.start)
    for partition, dot, meta, body in puts_in(record):
        # Every put is indexed on sight and sorted out at the end: while older segments are
        # missing, the state before a checkpoint may take a held put for a dead one.
        found.index.put(partition, dot, Place(locator, meta, len(body)))
        found.totals[segment] = found.totals.get(segment, 0) + 1
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
    for partition in found.index.partitions():
        state = found.states.get(partition)
        for dot, _ in list(found.index.items(partition)):
            if state is None or not state.has_body(*unpack_dot(dot)):
                found.index.drop(partition, dot)


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


def missing_bodies(state: PartitionState, index: Index) -> Spans:
    """Dots that the state needs and the index does not have."""
    return joined(
        (epoch, seq, seq)
        for epoch, seq in state.bodies().dots()
        if index.get(state.partition, pack_dot(epoch, seq)) is None
    )
