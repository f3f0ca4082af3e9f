"""How a record lies in a segment: length, CRC-32, payload. Pure: bytes in, bytes out.

```
segment  = header frame*
header   = b"MQLOG\\x00\\x00\\x01"                          8 bytes
frame    = length:u32le  crc:u32le  b"\\xd6Q"  payload     length counts the mark and the payload
```

The CRC covers the length too, so a flipped length is found like any other flip. The two-byte mark
is what makes a damaged segment readable past the damage: a reader that lost its place looks for
the next mark whose frame has a good CRC, instead of trusting a length that may be the damaged
part.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

HEADER = b"MQLOG\x00\x00\x01"
MARK = b"\xd6Q"
_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
OVERHEAD = _HEAD.size + len(MARK)
"""Bytes that a frame adds to its payload."""

MAX_PAYLOAD = 64 * 1024 * 1024
"""A longer length field is damage, not data: no request body reaches this size."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A good frame: where it starts in the segment, where it ends, and its payload."""

    start: int
    end: int
    payload: bytes | memoryview
    """Of the kind that was looked at: a view is no copy."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) hold no good frame. `torn` when nothing good follows them."""

    start: int
    end: int
    torn: bool


def frame(payload: bytes) -> bytes:
    """The bytes that store one payload. Raises ValueError when it is empty or too long."""
    if not 0 < len(payload) <= MAX_PAYLOAD:
        raise ValueError(f"a payload has 1 to {MAX_PAYLOAD} bytes, this one {len(payload)}")
    length = _LENGTH.pack(len(payload) + len(MARK))
    crc = crc32(payload, crc32(MARK, crc32(length)))
    return b"%b%b%b%b" % (length, _LENGTH.pack(crc), MARK, payload)


def frame_at(data: bytes | memoryview, start: int) -> Frame | None:
    """The good frame that starts at `start`, or None (damage, or the end of the data)."""
    body = start + _HEAD.size
    if body + len(MARK) > len(data):
        return None
    length, crc = _HEAD.unpack_from(data, start)
    if not len(MARK) < length <= MAX_PAYLOAD + len(MARK) or body + length > len(data):
        return None
    if bytes(data[body : body + len(MARK)]) != MARK:
        return None
    if crc32(data[body : body + length], crc32(data[start : start + 4])) != crc:
        return None
    return Frame(start, body + length, data[body + len(MARK) : body + length])


def scan(data: bytes, position: int = 0) -> Iterator[Frame | Damage]:
    """Every good frame of a segment in order, with the damaged stretches between them.

    `data` is the whole segment, header included; `position` the end of a frame to go on from, 0 for
    all. A damaged header costs nothing but a report: the frames after it are found by their marks.
    The last item is a `Damage` with `torn` set when the segment ends in bytes that are no frame (a
    write that the crash cut short).
    """
    if not position and data[: len(HEADER)] == HEADER:
        position = len(HEADER)
    if not position:
        found = _next_good(data, 0)
        if found is None:
            yield Damage(0, len(data), torn=True)
            return
        yield Damage(0, found.start, torn=False)
        position = found.start
    view = memoryview(data)
    while position < len(data):
        good = frame_at(view, position)
        if good is None:
            good = _next_good(data, position + 1)
            if good is None:
                yield Damage(position, len(data), torn=True)
                return
            yield Damage(position, good.start, torn=False)
        yield good
        position = good.end


def _next_good(data: bytes, start: int) -> Frame | None:
    """The first good frame that begins at `start` or later."""
    view = memoryview(data)
    at = data.find(MARK, start + _HEAD.size)
    while at >= 0:
        good = frame_at(view, at - _HEAD.size)
        if good is not None:
            return good
        at = data.find(MARK, at + 1)
    return None
