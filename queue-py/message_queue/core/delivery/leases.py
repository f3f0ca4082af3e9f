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

MAX_LEASES = 20_000
"""What is beyond is redelivered early after a failover; it would cost more to tell than to do."""


class Lease(Struct, frozen=True, array_like=True):
    """The last delivery of a message that is still held. Times are cluster time."""

    dot: int
    epoch: int
    attempt: int
    due_ms: int
    """When the lease ends; 0: it ended."""
    leased_ms: int


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
