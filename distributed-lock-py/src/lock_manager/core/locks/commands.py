"""What the log carries: one `Batch` an entry, each with the commands that gathered while the last
one was in flight.

A command holds everything that applying it needs and a node could see differently: the time stamp
and the lock delay stand in the batch, ids and durations in the command. Applying never looks at a
clock, a flag or a random number.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec


class LockType(StrEnum):
    EXCLUSIVE = "exclusive"
    SHARED = "shared"
    SEMAPHORE = "semaphore"


class Ask(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One lock that an acquire wants. `permits` and `limit` are for semaphores only (else 0)."""

    lock_name: str
    lock_type: LockType = LockType.EXCLUSIVE
    permits: int = 0
    limit: int = 0


class Acquire(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Take all of `asks` or none. `wait_ms` 0: do not queue. `ttl_ms` 0: held until released.

    `request_id` empty: a retry is not recognised by id. `fingerprint` is that of the whole request
    body, so that the same id with another body can be told apart.
    """

    client_id: str
    asks: tuple[Ask, ...]
    wait_ms: int = 0
    ttl_ms: int = 0
    request_id: str = ""
    fingerprint: bytes = b""


class Release(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """`fencing_token` 0: whatever hold the client has; else only that very one."""

    client_id: str
    lock_name: str
    fencing_token: int = 0
    request_id: str = ""
    fingerprint: bytes = b""


class ReleaseAll(msgspec.Struct, frozen=True, array_like=True, tag=3):
    client_id: str


class Keepalive(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Count all leases of the client anew; `ttl_ms` 0: each by its own length."""

    client_id: str
    ttl_ms: int = 0


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The leader saw the connection close on which this ticket waits."""

    ticket: int


class Undelivered(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The leader could not tell the client of this grant (once per grant or claim)."""

    client_id: str
    fencing_tokens: dict[str, int]  # lock name -> the token that was to be told


class ForceRelease(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """An operator frees a lock from `client_id`, or from every holder if that is empty."""

    lock_name: str
    reason: str
    client_id: str = ""


class LeaderStarted(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """First command of a term: connections of whoever waits went to another leader."""


Command = (
    Acquire | Release | ReleaseAll | Keepalive | Cancel | Undelivered | ForceRelease | LeaderStarted
)


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One log entry. Without commands it is a stamp: it only lets cluster time pass."""

    at_ms: int  # cluster time at the leader; the machine's time never goes back
    commands: list[Command] = []
    lock_delay_ms: int = 0  # for leases that expire while this batch is applied


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Batch)


def encode_batch(batch: Batch) -> bytes:
    return _encoder.encode(batch)


def decode_batch(payload: bytes) -> Batch:
    """Raises msgspec.DecodeError (ValidationError) for anything that is not a batch."""
    return _decoder.decode(payload)


def why_malformed(asks: tuple[Ask, ...]) -> str:
    """Why no correct api would have proposed these; empty if all is well."""
    if len(asks) == 1 and asks[0].lock_type is not LockType.SEMAPHORE and not asks[0].limit:
        return ""
    if not asks or len({ask.lock_name for ask in asks}) < len(asks):
        return "each lock must be asked for once"
    for ask in asks:
        semaphore = ask.lock_type is LockType.SEMAPHORE
        if semaphore != (ask.limit > 0) or not (0 < ask.permits <= ask.limit or not semaphore):
            return "permits and limit do not fit the lock type"
    return ""


def fingerprint(command: Acquire | Release) -> bytes:
    """Eight bytes that stand for a request's body; collisions only matter within one request id."""
    return hashlib.blake2b(_encoder.encode(command), digest_size=8).digest()
