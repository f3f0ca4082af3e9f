"""What a put's `meta` says: small, kept in memory on every replica, opaque to the replication."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from message_queue.core.delivery.model import Entry
from message_queue.core.operations import NewMessage

DEDUPE_WINDOW_MS = 5 * 60 * 1000


class MessageMeta(Struct, frozen=True, array_like=True, tag=1):
    """A message but for its body. Times as in `Entry`."""

    queue: str
    enqueued_ms: int
    wall_ms: int
    headers: bytes | None = None
    group: str | None = None
    priority: int = 0
    ready_at_ms: int = 0
    expires_ms: int = 0
    origin: bytes | None = None


class DedupeMark(Struct, frozen=True, array_like=True, tag=2):
    """Remembers that a `dedupe_id` was used, after its message is long acked. It is a put of its
    own, stored in one batch with its message and acked when the window closes: so the window
    survives whatever messages survive, with no machinery of its own."""

    queue: str
    dedupe_id: str
    back: int
    """The message's seq is the mark's minus this."""
    until_ms: int
    moved: bool = False
    """A move's, not a client's: the same text means something else."""


class Plain(NamedTuple):
    """A message of which nothing else matters until it is delivered: no group, no delay, no
    lifetime of its own."""

    queue: str
    priority: int
    enqueued_ms: int


Meta = MessageMeta | DedupeMark
PRIORITY_BITS: Final = 4
SHORT_BYTES: Final = 128
UNREADABLE_BYTES: Final = 256
"""Kept of a meta that nobody can read, to report it."""
_decoder: Final[msgspec.msgpack.Decoder[Meta]] = msgspec.msgpack.Decoder(Meta)
_encoder: Final = msgspec.msgpack.Encoder()


def encode(meta: Meta) -> bytes:
    """For `PutDraft.meta`."""
    return _encoder.encode(meta)


def decode(raw: bytes) -> Meta:
    """What `encode` gave. Raises msgspec.MsgspecError."""
    return _decoder.decode(raw)


def digest(raw: bytes) -> Plain | bytes:
    """What a node keeps in memory of a stored put: a million of them must fit. Of a message that is
    not plain: its meta without headers and past, which stay on disk beside the body."""
    # Plain messages that were stored together have one and the same meta.
    return _digest_short(raw) if len(raw) <= SHORT_BYTES else _digest(raw)


def _digest(raw: bytes) -> Plain | bytes:
    try:
        meta = _decoder.decode(raw)
    except msgspec.MsgspecError:
        return raw[:UNREADABLE_BYTES]
    if not isinstance(meta, MessageMeta):
        return raw
    if waits_for_nothing(meta):
        return Plain(meta.queue, min(max(meta.priority, 0), 9), max(0, meta.enqueued_ms))
    if meta.headers is None and meta.origin is None:
        return raw
    return _encoder.encode(msgspec.structs.replace(meta, headers=None, origin=None))


_digest_short = lru_cache(maxsize=256)(_digest)


def waits_for_nothing(meta: MessageMeta) -> bool:
    """Whether it is `Plain`."""
    return meta.group is None and not (meta.ready_at_ms or meta.expires_ms)


def alike(one: NewMessage, other: NewMessage) -> bool:
    """Whether two messages that are sent together have the same meta."""
    return (
        one.headers == other.headers
        and one.priority == other.priority
        and one.delay_ms == other.delay_ms
        and one.ttl_ms == other.ttl_ms
        and one.group_id == other.group_id
        and one.origin == other.origin
    )


def meta_of(queue: str, message: NewMessage, now_ms: int, wall_ms: int) -> MessageMeta:
    """The meta of a message that is enqueued now."""
    return MessageMeta(
        queue=queue,
        enqueued_ms=now_ms,
        wall_ms=wall_ms,
        headers=message.headers,
        group=message.group_id,
        priority=message.priority,
        ready_at_ms=now_ms + message.delay_ms if message.delay_ms else 0,
        expires_ms=now_ms + message.ttl_ms if message.ttl_ms else 0,
        origin=message.origin,
    )


def complete(entry: Entry, raw: bytes) -> None:
    """An entry whose body was read from disk learns the rest of its meta with it. Raises
    msgspec.MsgspecError."""
    meta = _decoder.decode(raw)
    if isinstance(meta, MessageMeta):
        entry.wall_ms, entry.headers, entry.origin = meta.wall_ms, meta.headers, meta.origin


def entry_of(dot: int, meta: MessageMeta, body: bytes | None, body_bytes: int) -> Entry:
    """The owner's view of a stored message."""
    return Entry(
        dot=dot,
        queue=meta.queue,
        body=body,
        body_bytes=body_bytes,
        enqueued_ms=meta.enqueued_ms,
        wall_ms=meta.wall_ms,
        headers=meta.headers,
        origin=meta.origin,
        group=meta.group,
        priority=min(max(meta.priority, 0), 9),
        ready_at_ms=meta.ready_at_ms,
        expires_ms=meta.expires_ms,
    )
