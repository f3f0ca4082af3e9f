"""What a frame's payload is: a record of the replication core, or storage's own note of a move.

The first byte says which. A move is a put that compaction copied to the log's head: it changes
where a body lies, never what is held.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, NamedTuple, assert_never

import msgspec
from msgspec import Struct

from message_queue.core.ids import pack_dot
from message_queue.core.messages import (
    AppendRecord,
    CheckpointRecord,
    ClockRecord,
    Copy,
    CopyRecord,
    DismissRecord,
    LogRecord,
    PartitionId,
    PromiseRecord,
    Put,
    Puts,
    SealRecord,
    WithdrawRecord,
    record_decoder,
)
from message_queue.core.runs import count, sizes_of, well_formed_run

_CORE: Final = b"\x00"
_MOVED: Final = b"\x01"
RUN_PUTS: Final = 32
"""So many puts of a run are replayed in the time of one entry."""
_encoder = msgspec.msgpack.Encoder()


class Moved(Struct, frozen=True, array_like=True):
    """Puts that lie here now."""

    partition: PartitionId
    copies: tuple[Copy, ...]


_moved_decoder: Final = msgspec.msgpack.Decoder(Moved)


class UnreadableRecord(Exception):
    """A frame with a good CRC whose payload this version does not understand."""


class Run(NamedTuple):
    """Puts with consecutive dots that share a meta, as a record stores them."""

    partition: int
    first: int
    """The first one's dot."""
    meta: bytes
    sizes: array[int]
    """Bytes of each body."""
    bodies: bytes
    """One after the other."""


def runs_in(record: LogRecord | Moved) -> Iterator[Run]:
    """Every put that a record stores."""
    match record:
        case AppendRecord(partition, epoch, entries):
            for entry in entries:
                if isinstance(entry, Puts):
                    dot = pack_dot(epoch, entry.seq)
                    yield Run(partition, dot, entry.meta, sizes_of(entry), entry.bodies)
                elif isinstance(entry, Put):
                    size = array("I", (len(entry.body),))
                    yield Run(partition, pack_dot(epoch, entry.seq), entry.meta, size, entry.body)
        case CopyRecord(partition, _, copies) | Moved(partition, copies):
            for copy in copies:
                size = array("I", (len(copy.body),))
                yield Run(partition, pack_dot(copy.epoch, copy.seq), copy.meta, size, copy.body)
        case PromiseRecord() | SealRecord() | WithdrawRecord() | ClockRecord() | CheckpointRecord():
            return
        case DismissRecord():
            return
        case _:
            assert_never(record)


def replay_cost(record: LogRecord | Moved) -> int:
    """What a start pays to replay a record, about 20 us each: as many as it has entries, and more
    where those are runs."""
    match record:
        case AppendRecord(_, _, entries):
            return len(entries) + sum(count(entry) for entry in entries) // RUN_PUTS
        case CopyRecord(_, _, copies) | Moved(_, copies):
            return len(copies)
        case _:
            return 1


def encode(record: LogRecord | Moved) -> bytes:
    """The payload that stores a record."""
    return (_MOVED if isinstance(record, Moved) else _CORE) + _encoder.encode(record)


def decode(payload: bytes | memoryview) -> LogRecord | Moved:
    """What `encode` stored. Raises UnreadableRecord."""
    kind, rest = payload[:1], memoryview(payload)[1:]
    try:
        if kind == _CORE:
            record = record_decoder.decode(rest)
            if isinstance(record, AppendRecord):
                for entry in record.entries:
                    if isinstance(entry, Puts) and not well_formed_run(entry):
                        raise UnreadableRecord("a run whose sizes do not add up")
            return record
        if kind == _MOVED:
            return _moved_decoder.decode(rest)
    except msgspec.MsgspecError as e:
        raise UnreadableRecord(str(e)) from e
    raise UnreadableRecord(f"unknown kind {kind!r}")


class Bodies:
    """The puts of one record, found by their dots. O(log runs) each."""

    __slots__ = ("_ends", "_firsts", "_runs")

    def __init__(self, record: LogRecord | Moved) -> None:
        self._runs = sorted(runs_in(record), key=_first)
        self._firsts = [run.first for run in self._runs]
        self._ends: list[list[int] | None] = [None] * len(self._runs)
        """Where each body of a run ends, once somebody asked."""

    def find(self, dot: int) -> tuple[bytes, bytes]:
        """(meta, body). KeyError when it is not here."""
        at = bisect_right(self._firsts, dot) - 1
        if at < 0:
            raise KeyError(dot)
        run = self._runs[at]
        offset = dot - run.first
        if offset >= len(run.sizes):
            raise KeyError(dot)
        if len(run.sizes) == 1:
            return run.meta, run.bodies
        ends = self._ends[at]
        if ends is None:
            ends = self._ends[at] = list(accumulate(run.sizes))
        end = ends[offset]
        return run.meta, run.bodies[end - run.sizes[offset] : end]

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self._runs) > 1 or any(len(run.sizes) > 1 for run in self._runs)


def _first(run: Run) -> int:
    return run.first
