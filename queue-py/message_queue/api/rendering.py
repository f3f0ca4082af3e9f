"""Messages as JSON, built by hand: bodies and headers are JSON already and go out byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache

import msgspec

from message_queue.core.delivery.model import Entry
from message_queue.core.ids import id_bytes

_json = msgspec.json.Encoder()


@lru_cache(maxsize=1024)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def timestamp(wall_ms: int) -> str:
    """ISO 8601 with milliseconds; a clock that was off by millennia reads as the epoch."""
    seconds, ms = divmod(wall_ms, 1000)
    if not 0 <= seconds < 253402300800:
        return "1970-01-01T00:00:00.000Z"
    return f"{_second(seconds)}.{ms:03d}Z"


def message(partition: int, entry: Entry, body: bytes, receipt: bool) -> bytes:
    """A message as `/consume` (with receipt) and `/peek` (without) show it."""
    return b"".join(_parts(partition, [entry], [body], receipt))


def messages(
    partition: int, entries: Sequence[Entry], bodies: Sequence[bytes], receipt: bool
) -> bytes:
    """Several of them. What neighbours have in common is rendered once."""
    return b'{"messages":[%b]}' % b"".join(_parts(partition, entries, bodies, receipt))


def _parts(
    partition: int, entries: Sequence[Entry], bodies: Sequence[bytes], receipt: bool
) -> list[bytes]:
    parts: list[bytes] = []
    before: Entry | None = None
    middle = tail = b""
    for entry, body in zip(entries, bodies, strict=True):
        if (
            before is None
            or entry.queue != before.queue
            or entry.attempt != before.attempt
            or entry.unseen != before.unseen
            or entry.epoch != before.epoch
            or entry.wall_ms != before.wall_ms
            or entry.headers != before.headers
            or entry.origin != before.origin
        ):
            middle = b'","queue":%b,"body":' % _json.encode(entry.queue)
            tail = _tail(entry, receipt)
            before = entry
        parts += (b',{"id":"', id_bytes(partition, entry.dot), middle, body, tail)
    if parts:
        parts[0] = b'{"id":"'
    return parts


def _tail(entry: Entry, receipt: bool) -> bytes:
    """What comes after the body."""
    parts = [b',"headers":%b,"attempt":%d' % (entry.headers or b"{}", entry.seen)]
    if receipt:
        parts.append(b',"receipt":"%d.%d"' % (entry.epoch, entry.attempt))
    parts.append(b',"enqueued_at":"%b"' % timestamp(entry.wall_ms).encode())
    if entry.origin is not None:
        parts.append(b"," + entry.origin)
    parts.append(b"}")
    return b"".join(parts)
