"""What a frame's payload is: a record of the replication core, or storage's own note of a move.

The first byte says which. A move is a put that compaction copied to the log's head: it changes
where a body lies, never what is held.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from message_queue.core.messages import Copy, LogRecord, PartitionId, record_decoder

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
