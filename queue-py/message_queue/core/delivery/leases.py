"""The owner's deliveries as bytes: passed to the replicas, so that a failover redelivers little.

Soft state: never stored, may be lost or late. A successor that knows a lease honours it to its end,
and counts the attempts that it knows of; one that does not delivers the message again, as new.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, islice
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.lots import Lot
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.timers import Timers

MAX_LEASES = 20_000
"""What is beyond is redelivered early after a failover; it would cost more to tell than to do."""


def postpone(delivered: Iterable[Entry], lots: Iterable[Lot], timers: Timers, by_ms: int) -> None:
    """Cluster time jumped ahead of this owner's own: the leases that it granted end as much later,
    for no consumer's time has gone by. O(deliveries), and jumps are rare."""
    for lot in lots:
        lot.leased_ms += by_ms
        lot.due_ms += by_ms
        timers.add(lot.due_ms, lot.first)
    for entry in delivered:
        if entry.state is State.LEASED or entry.state is State.SETTLING:
            entry.leased_ms += by_ms
            entry.due_ms += by_ms
            timers.add(entry.due_ms, entry.dot)


class Lease(Struct, frozen=True, array_like=True):
    """The last delivery of a message that is still held, or of several that were delivered together
    and follow each other. Times are cluster time."""

    dot: int
    epoch: int
    attempt: int
    due_ms: int
    """When the lease ends; 0: it ended."""
    leased_ms: int
    unseen: int = 0
    count: Annotated[int, Meta(ge=1, le=1024)] = 1


_decoder = msgspec.msgpack.Decoder(list[Lease])
_encoder = msgspec.msgpack.Encoder()


def encode_leases(delivered: Iterable[Entry], lots: Iterable[Lot]) -> bytes:
    """What `decode_leases` reads."""
    told: list[tuple[int, ...]] = []
    messages = 0
    # As a `Lease` lies on the wire; there are many, and often.
    for lot in lots:
        messages += lot.count
        if messages > MAX_LEASES:
            break
        due_ms = 0 if lot.settling else lot.due_ms
        told.append((lot.first, lot.epoch, 1, due_ms, lot.leased_ms, 0, lot.count))
    told += [
        (
            e.dot,
            e.epoch,
            e.attempt,
            e.due_ms if e.state is State.LEASED else 0,
            e.leased_ms,
            e.unseen,
        )
        for e in islice(delivered, max(0, MAX_LEASES - messages))
    ]
    return _encoder.encode(told)


def decode_leases(raw: bytes) -> list[Lease]:
    """The leases, of so many messages at most as a node tells of; none if the bytes are none of
    ours (then messages are redelivered early)."""
    if not raw:
        return []
    try:
        leases = _decoder.decode(raw)
    except msgspec.MsgspecError:
        return []
    messages = accumulate([lease.count for lease in leases])
    return [lease for lease, upto in zip(leases, messages, strict=True) if upto <= MAX_LEASES]
