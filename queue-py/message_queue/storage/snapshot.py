"""A snapshot of states and index, so that a start need not read the log from its beginning.

```
snapshot = magic  frame(State)*  frame(Page)*  frame(End)      frames as in a segment
```

It is written while the node works on, so it is no picture of one moment: the log is replayed over
it from `replay_from`, the log's durable end when it was begun. All records may be replayed over a
state that knows them already. `End` names every segment with its size and CRC at a moment when all
that the snapshot says was durable. So a start that finds those bytes has verified every record
behind the snapshot; one that does not knows that the snapshot is *ahead* of its segments: then
they are replayed from the beginning, and what only the snapshot knows is withdrawn.

A snapshot that is damaged itself is worth nothing and costs nothing but time.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.messages import CheckpointRecord, Count, PartitionId
from message_queue.core.replication.dots import well_formed, well_formed_chunks
from message_queue.core.replication.state import PartitionState
from message_queue.storage import files
from message_queue.storage.framing import frame, frame_at
from message_queue.storage.index import BLOCK, BLOCK_BITS, Block, Index
from message_queue.storage.log import Mark

MAGIC: Final = b"MQIDX\x00\x00\x01"
NAME: Final = "index.snapshot"
PAGE_BLOCKS: Final = 16
_TYPES: Final = "HQIIIQ"


class State(Struct, frozen=True, array_like=True, tag=1):
    """A partition, as a checkpoint in the log would say it."""

    checkpoint: CheckpointRecord


class Row(Struct, frozen=True, array_like=True):
    """A block of the index: its columns as they lie in memory."""

    partition: PartitionId
    epoch: Count
    number: Count
    """Which 1,024 seqs of the epoch."""
    columns: tuple[bytes, bytes, bytes, bytes, bytes, bytes]
    extras: dict[int, bytes]


class Page(Struct, frozen=True, array_like=True, tag=2):
    """Some blocks, with the queue names that they use."""

    rows: tuple[Row, ...]
    names: dict[int, str]


class End(Struct, frozen=True, array_like=True, tag=3):
    """Nothing is missing: so many frames came before."""

    frames: int
    byteorder: str
    replay_from: tuple[int, int]
    """(segment, offset)"""
    marks: tuple[Mark, ...]
    clock_ms: int


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[State | Page | End]] = msgspec.msgpack.Decoder(
    State | Page | End
)


class SnapshotUnreadable(Exception):
    """It is damaged, of another version or of another machine."""


class Snapshot(Struct):
    """What a snapshot says."""

    states: dict[int, PartitionState]
    index: Index
    end: End


def path_in(directory: Path) -> Path:
    """The snapshot's file; there is at most one."""
    return directory / NAME


def encode(part: State | Page | End) -> bytes:
    """A frame of the file."""
    return frame(_encoder.encode(part))


def pages(index: Index) -> Iterator[Page]:
    """All blocks, some at a time: each page is right at the moment when it is asked for."""
    for partition in index.partitions():
        keys = list(index.blocks(partition))
        for start in range(0, len(keys), PAGE_BLOCKS):
            rows: list[Row] = []
            names: dict[int, str] = {}
            for key in keys[start : start + PAGE_BLOCKS]:
                block = index.blocks(partition).get(key)
                if block is None:
                    continue
                if len(block.rows) > block.live:
                    block.trim()
                columns = [column.tobytes() for column in block.columns()]
                extras = dict(block.extras or {})
                epoch, first = unpack_dot(key << BLOCK_BITS)
                number = first >> BLOCK_BITS
                rows.append(Row(partition, epoch, number, tuple(columns), extras))  # type: ignore[arg-type]  # six
                names |= index.names_in(block)
            yield Page(tuple(rows), names)


def read(path: Path) -> Snapshot | None:
    """The snapshot, None if there is none. Raises SnapshotUnreadable and OSError. Blocks."""
    try:
        with path.open("rb", buffering=0) as file:
            return parse(files.read_fully(file, path.stat().st_size))
    except FileNotFoundError:
        return None


def parse(data: bytes) -> Snapshot:
    """What a snapshot's bytes say. Raises SnapshotUnreadable."""
    if data[: len(MAGIC)] != MAGIC:
        raise SnapshotUnreadable("it does not begin as one")
    found = Snapshot({}, Index(), End(0, "", (0, 0), (), 0))
    view = memoryview(data)
    at, frames = len(MAGIC), 0
    while at < len(data):
        good = frame_at(view, at)
        if good is None:
            raise SnapshotUnreadable(f"damaged at byte {at}")
        at = good.end
        try:
            part = _decoder.decode(good.payload)
            match part:
                case State(checkpoint):
                    found.states[checkpoint.partition] = _state(checkpoint)
                case Page(rows, names):
                    for row in rows:
                        key = pack_dot(row.epoch, row.number << BLOCK_BITS) >> BLOCK_BITS
                        found.index.adopt(row.partition, key, _block(row), names)
                case End():
                    if part.frames != frames or at != len(data):
                        raise SnapshotUnreadable(f"{frames} parts before its end")
                    if part.byteorder != sys.byteorder:
                        raise SnapshotUnreadable("written by another kind of machine")
                    found.end = part
                    return found
        except (msgspec.MsgspecError, ValueError, KeyError) as e:
            raise SnapshotUnreadable(f"at byte {at}: {e}") from e
        frames += 1
    raise SnapshotUnreadable("it has no end")


def _state(checkpoint: CheckpointRecord) -> PartitionState:
    view = checkpoint.view
    if not (well_formed(view.context) and well_formed_chunks(view.held)):
        raise ValueError("a state that is none")
    state = PartitionState(checkpoint.partition)
    state.apply(checkpoint)
    return state


def _block(row: Row) -> Block:
    """Raises ValueError when the columns do not fit together."""
    block = Block()
    columns = []
    for kind, raw in zip(_TYPES, row.columns, strict=True):
        column: array[int] = array(kind)
        column.frombytes(raw)
        columns.append(column)
    (block.rows, block.frames, block.lengths, block.sizes, block.kinds, block.times) = columns
    count = len(block.rows)
    if any(len(column) != count for column in columns) or not 0 < count <= BLOCK:
        raise ValueError("columns of different lengths")
    rows = block.rows
    end = rows[0] + count
    whole = end <= BLOCK and rows == array("H", range(rows[0], end))
    if rows[-1] >= BLOCK or not (whole or list(rows) == sorted(set(rows))):
        raise ValueError("rows out of order")
    bare = (
        {number for number, kind in zip(rows, block.kinds, strict=True) if not kind}
        if (0 in block.kinds)
        else set()
    )
    if 0 in block.lengths or row.extras.keys() != bare:
        raise ValueError("rows without a place or an extra")
    block.extras = row.extras or None
    block.live = count
    return block
