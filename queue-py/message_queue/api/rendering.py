"""Messages as JSON, built by hand: bodies and headers are JSON already and go out byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, repeat

import msgspec

from message_queue.core.delivery.model import Entry
from message_queue.core.ids import delivery_text, id_bytes, ids_of
from message_queue.core.operations import MAX_RUNS

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


class Slice(msgspec.Struct, frozen=True, gc=False):
    """Messages with consecutive dots that differ in nothing but their bodies."""

    first: int
    queue: str
    epoch: int
    attempt: int
    seen: int
    """The attempt that consumers are told of."""
    wall_ms: int
    headers: bytes | None
    origin: bytes | None
    bodies: Sequence[bytes]


def slice_of(entry: Entry, body: bytes) -> Slice:
    """A single message."""
    return Slice(
        entry.dot, entry.queue, entry.epoch, entry.attempt, entry.seen, entry.wall_ms,
        entry.headers, entry.origin, (body,),
    )  # fmt: skip


def message(partition: int, entry: Entry, body: bytes, receipt: bool) -> bytes:
    """A message as `/consume` (with receipt) and `/peek` (without) show it."""
    return b'{"id":"%b","queue":%b,"body":%b%b' % (
        id_bytes(partition, entry.dot), _json.encode(entry.queue), body, _tail(entry, receipt),
    )  # fmt: skip


def messages(partition: int, slices: Sequence[Slice], receipt: bool) -> bytes:
    """Several of them. What neighbours have in common is rendered once."""
    parts: list[bytes] = []
    before: Slice | None = None
    middle = tail = sep = b""
    for its in slices:
        if before is None or not _alike(its, before):
            middle = b'","queue":%b,"body":' % _json.encode(its.queue)
            tail = _tail(its, receipt)
            sep = tail + b',{"id":"'
        if before is not None:
            parts.append(b',{"id":"')
        before = its
        ids = ids_of(partition, its.first, len(its.bodies))
        parts += chain.from_iterable(zip(ids, repeat(middle), its.bodies, repeat(sep)))
        parts[-1] = tail
    if not parts:
        return b'{"messages":[]}'
    return b'{"messages":[{"id":"%b]}' % b"".join(parts)


def _alike(its: Slice, before: Slice) -> bool:
    return (
        its.attempt == before.attempt
        and its.seen == before.seen
        and its.wall_ms == before.wall_ms
        and its.epoch == before.epoch
        and its.headers == before.headers
        and its.origin == before.origin
        and its.queue == before.queue
    )


def delivery_receipt(partition: int, slices: Sequence[Slice]) -> str:
    """What all of several messages may be acked with; empty: too many pieces, or one message."""
    runs: list[tuple[int, int, int, int]] = []
    upto = 0
    for its in slices:
        if runs and its.first == upto and runs[-1][2:] == (its.epoch, its.attempt):
            first, count, *_ = runs[-1]
            runs[-1] = first, count + len(its.bodies), its.epoch, its.attempt
        else:
            if len(runs) == MAX_RUNS:
                return ""
            runs.append((its.first, len(its.bodies), its.epoch, its.attempt))
        upto = its.first + len(its.bodies)
    if len(runs) == 1 and runs[0][1] == 1:
        return ""
    return delivery_text(partition, runs)


def _tail(entry: Entry | Slice, receipt: bool) -> bytes:
    """What comes after the body."""
    parts = [b',"headers":%b,"attempt":%d' % (entry.headers or b"{}", entry.seen)]
    if receipt:
        parts.append(b',"receipt":"%d.%d"' % (entry.epoch, entry.attempt))
    parts.append(b',"enqueued_at":"%b"' % timestamp(entry.wall_ms).encode())
    if entry.origin is not None:
        parts.append(b"," + entry.origin)
    parts.append(b"}")
    return b"".join(parts)
