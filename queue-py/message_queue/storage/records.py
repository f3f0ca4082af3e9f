"""What a frame's payload is: a record of the replication core, or storage's own note of a move.

The first byte says which. A move is a put that compaction copied to the log's head: it changes
where a body lies, never what is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

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
    SealRecord,
    WithdrawRecord,
    record_decoder,
)

_CORE: Final = b"\x00"
_MOVED: Final = b"\x01"
_encoder = msgspec.msgpack.Encoder()


class Moved(Struct, frozen=True, array_like=True):
    """Puts that lie here now."""

    partition: PartitionId
    copies: tuple[Copy, ...]


_moved_decoder: Final = msgspec.msgpack.Decoder(Moved)


class UnreadableRecord(Exception):
    """A frame with a good CRC whose payload this version does not understand."""


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
        case DismissRecord():
            return
        case _:
            assert_never(record)


def encode(record: LogRecord | Moved) -> bytes:
    """The payload that stores a record."""
    return (_MOVED if isinstance(record, Moved) else _CORE) + _encoder.encode(record)


def decode(payload: bytes) -> LogRecord | Moved:
    """What `encode` stored. Raises UnreadableRecord."""
    kind, rest = payload[:1], memoryview(payload)[1:]
    try:
        if kind == _CORE:
            return record_decoder.decode(rest)
        if kind == _MOVED:
            return _moved_decoder.decode(rest)
    except msgspec.MsgspecError as e:
        raise UnreadableRecord(str(e)) from e
    raise UnreadableRecord(f"unknown kind {kind!r}")
