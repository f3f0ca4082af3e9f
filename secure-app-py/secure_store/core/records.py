"""The replicated log: what both nodes keep in the same order, each record bound to the one before.

`hash` covers the cluster, the epoch, the sequence number, the previous hash and the payload, so a
position `(epoch, seq, hash)` names one whole history: two nodes that agree on a position agree on
everything before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

HASH_BYTES = 32


class Position(msgspec.Struct, frozen=True, array_like=True):
    """The end of a history: its last record's epoch, number and hash. `seq` 0 is the empty one."""

    epoch: int = 0
    seq: int = 0
    hash: bytes = bytes(HASH_BYTES)


ORIGIN = Position()


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One decided-or-to-be change. `payload` is opaque here (see changes.py)."""

    epoch: int
    seq: int
    prev_hash: bytes
    hash: bytes
    payload: bytes

    @property
    def position(self) -> Position:
        """The history that ends with this record."""
        return Position(self.epoch, self.seq, self.hash)


def record_hash(cluster_id: str, epoch: int, seq: int, prev_hash: bytes, payload: bytes) -> bytes:
    """SHA-256 over everything that makes the record what it is; each part's length is fixed or
    given."""
    name = cluster_id.encode()
    head = b"secure-store/record/1\0%d\0" % len(name) + name
    numbers = epoch.to_bytes(8, "big") + seq.to_bytes(8, "big")
    return hashlib.sha256(head + numbers + prev_hash + payload).digest()


def extend(cluster_id: str, last: Position, epoch: int, payload: bytes) -> Record:
    """The record that follows `last` in `epoch`."""
    seq = last.seq + 1
    digest = record_hash(cluster_id, epoch, seq, last.hash, payload)
    return Record(epoch, seq, last.hash, digest, payload)


def follows(cluster_id: str, last: Position, records: Iterable[Record]) -> bool:
    """Whether `records` continue the history `last` without a gap, an epoch going back, or a
    lie."""
    for r in records:
        if r.seq != last.seq + 1 or r.epoch < last.epoch or r.prev_hash != last.hash:
            return False
        if r.hash != record_hash(cluster_id, r.epoch, r.seq, r.prev_hash, r.payload):
            return False
        last = r.position
    return True
