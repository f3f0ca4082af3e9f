"""The owner's leases as bytes: passed to the replicas, so that a failover redelivers little.

Soft state: never stored, may be lost or late. A successor that knows a lease honours it to its end;
one that does not delivers the message again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec
from msgspec import Struct

from message_queue.core.delivery.model import Entry

MAX_LEASES = 20_000
"""What is beyond is redelivered early after a failover; it would cost more to tell than to do."""


class Lease(Struct, frozen=True, array_like=True):
    """One message in flight. Times are cluster time."""

    dot: int
    epoch: int
    attempt: int
    due_ms: int
    leased_ms: int


_decoder = msgspec.msgpack.Decoder(list[Lease])
_encoder = msgspec.msgpack.Encoder()


def encode_leases(leased: Iterable[Entry]) -> bytes:
    """What `decode_leases` reads."""
    return _encoder.encode(
        [
            Lease(e.dot, e.epoch, e.attempt, e.due_ms, e.leased_ms)
            for e in islice(leased, MAX_LEASES)
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
