"""The nouns of delivery: a message as its owner sees it, settings, what a step decided."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from message_queue.core.delivery.lifecycle import State
from message_queue.core.placement.ring import stable_hash

MAX_LEASE_MS = 12 * 3600 * 1000
"""A delivery may be extended to this long in total, as in SQS."""
DEFAULT_VISIBILITY_MS = 30_000
DEFAULT_MAX_DELIVERIES = 5
DEAD_SUFFIX = ".dead"
MAX_NAME_BYTES = 256
PRIORITIES = 10


class Settings(msgspec.Struct, frozen=True, omit_defaults=False):
    """What `PUT /queues/{q}` sets. None: no limit. A message is dead-lettered when it has both a
    number of deliveries and a place to go to."""

    visibility_ms: int = DEFAULT_VISIBILITY_MS
    max_deliveries: int | None = DEFAULT_MAX_DELIVERIES
    dead_letter: str | None = None
    retention_ms: int | None = None
    max_length: int | None = None


def default_settings(queue: str) -> Settings:
    """Settings of a queue that nobody configured. A dead letter queue keeps what it holds."""
    if queue.endswith(DEAD_SUFFIX):
        return Settings(max_deliveries=None)
    return Settings(dead_letter=dead_letter_queue(queue))


def dead_letter_queue(queue: str) -> str:
    """`<queue>.dead`; of a name too long for that, its beginning and a hash of the whole."""
    name = queue + DEAD_SUFFIX
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    tail = f"~{stable_hash(queue):016x}{DEAD_SUFFIX}"
    kept = queue.encode()[: MAX_NAME_BYTES - len(tail)].decode(errors="ignore")
    return kept + tail


class Entry(msgspec.Struct, eq=False, gc=False):
    """One held message. Mutable, owned by exactly one `PartitionDelivery`.

    `dot` orders messages: it packs the epoch and the sequence number under which the record was
    stored. `body` and `headers` are JSON texts; `body` is None while it lies only on disk.
    Times are cluster time in milliseconds.
    """

    dot: int
    queue: str
    body: bytes | None
    body_bytes: int
    enqueued_ms: int
    wall_ms: int = 0
    """The owner's wall clock when it was enqueued: for people, decides nothing."""
    headers: bytes | None = None
    origin: bytes | None = None
    """JSON members that tell a dead letter's past."""
    group: str | None = None
    priority: int = 0
    ready_at_ms: int = 0
    expires_ms: int = 0
    """0: never (the queue's retention may still end it)."""

    state: State = State.GONE
    attempt: int = 0
    """How often it was delivered."""
    unseen: int = 0
    """Deliveries of these that reached nobody: they do not count, but no other bears their number.
    Invariant: unseen <= attempt."""
    epoch: int = 0
    """Of the owner that made the last delivery; with `attempt` it is the receipt."""
    leased_ms: int = 0
    due_ms: int = 0
    """When the present delay or lease ends. Meaningful in DELAYED, LEASED and SETTLING."""

    @property
    def seen(self) -> int:
        """The attempt that consumers are told of, and `max_deliveries` is held against."""
        return self.attempt - self.unseen


class Receipt(msgspec.Struct, frozen=True, order=True):
    """Names one delivery of a message. Order: a greater receipt is a later delivery."""

    epoch: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.attempt}"


NEVER_GIVEN = Receipt(-1, -1)
"""Overtaken by whatever was or will be delivered."""


def parse_receipt(text: str) -> Receipt:
    """The receipt that `str` gave; `NEVER_GIVEN` when the text is none of ours."""
    epoch, dot, attempt = text.partition(".")
    if not (dot and len(text) <= 40 and epoch.isdecimal() and attempt.isdecimal()):
        return NEVER_GIVEN
    if not (epoch.isascii() and attempt.isascii()):
        return NEVER_GIVEN
    return Receipt(int(epoch), int(attempt))


class Verdict(StrEnum):
    """What became of an ack, nack or extend."""

    DONE = "done"
    UNKNOWN = "unknown"
    """Not held. Whether it ever was is the replication's to say."""
    SETTLING = "settling"
    """Its end is already under way: wait for that one."""
    OVERTAKEN = "overtaken"
    """A later delivery of it exists; this receipt settles nothing."""
    NOT_LEASED = "not leased"
    TOO_LONG = "too long"
    """The extension would pass `MAX_LEASE_MS` in total."""


class Ended(StrEnum):
    """Why the machine itself ends a message."""

    EXPIRED = "expired"
    EXHAUSTED = "max_deliveries"


class Ending(msgspec.Struct, frozen=True):
    """A message that the machine decided to end; already SETTLING. The node makes it durable
    (for EXHAUSTED: stores it in the dead letter queue first), then calls `gone`."""

    entry: Entry
    reason: Ended


class Counts(msgspec.Struct, frozen=True):
    """What `GET /queues/{q}` shows."""

    ready: int
    in_flight: int
    delayed: int
    bytes: int
    oldest_ms: int | None
    waiters: int
