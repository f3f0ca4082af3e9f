"""The owner's deliveries as bytes: passed to the replicas, so that a failover redelivers little.

Soft state: never stored, may be lost or late. A successor that knows a lease honours it to its end,
and counts the attempts that it knows of; one that does not delivers the message again, as new.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec
from msgspec import Struct

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import Entry
from message_queue.core.delivery.timers import Timers

MAX_LEASES = 20_000
"""What is beyond is redelivered early after a failover; it would cost more to tell than to do."""


def postpone(delivered: Iterable[Entry], timers: Timers, by_ms: int) -> None:
    """Cluster time jumped ahead of this owner's own: the leases that it granted end as much later,
    for no consumer's time has gone by. O(deliveries), and jumps are rare."""
    for entry in delivered:
        if entry.state is State.LEASED or entry.state is State.SETTLING:
            entry.leased_ms += by_ms
            entry.due_ms += by_ms
            timers.add(entry.due_ms, entry.dot)


class Lease(Struct, frozen=True, array_like=True):
    """The last delivery of a message that is still held. Times are cluster time."""

    dot: int
    epoch: int
    attempt: int
    due_ms: int
    """When the lease ends; 0: it ended."""
    leased_ms: int
    unseen: int = 0


_decoder = msgspec.msgpack.Decoder(list[Lease])
_encoder = msgspec.msgpack.Encoder()


def encode_leases(delivered: Iterable[Entry]) -> bytes:
    """What `decode_leases` reads."""
    return _encoder.encode(
        [
            # As a `Lease` lies on the wire; there are many, and often.
            (
                e.dot,
                e.epoch,
                e.attempt,
                e.due_ms if e.state is State.LEASED else 0,
                e.leased_ms,
                e.unseen,
            )
            for e in islice(delivered, MAX_LEASES)
        ]
    )


def decode_leases(raw: bytes) -> list[Lease]:
    """The leases; none if the bytes are none of ours (then messages are redelivered early)."""
    if not raw:
        return []
    try:
        return _decoder.decode(raw)
    except msgspec.MsgspecError:
        return []
