"""What a key holds, and what one operation makes of it.

`evaluate` is the only place where a value changes. The home calls it for an operation that came
with a request, an owner calls it on its own line: both must get the same answer.
"""

from hashlib import blake2b
from typing import Literal

import msgspec


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One key's state in main memory.

    Invariant: `version` grows by exactly one with each change, a delete included, and a deleted
    key keeps its version (a tombstone), so that no version ever means two values.
    """

    value: bytes | None  # JSON text; None: absent or deleted
    version: int  # 0: never written
    expires_ms: int = 0  # wall clock of the node that wrote it; 0: never


ABSENT = Record(None, 0)


class Write(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Set the value whatever it was."""

    value: bytes
    ttl_ms: int = 0  # 0: for ever


class Cas(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Set the value if the version is still `expected_version` (0: if the key is absent)."""

    expected_version: int
    value: bytes
    ttl_ms: int = 0  # 0: for ever


class Delete(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget the value."""


class Incr(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Add to an integer; an absent key counts as 0."""

    by: int


class Claim(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Set the value if there is none, and tell in any case what it is now. It leaves no copy."""

    value: bytes
    ttl_ms: int


Operation = Write | Cas | Delete | Incr | Claim


class Once(msgspec.Struct, frozen=True, array_like=True):
    """A client's own name for one change, which it may ask for again, of any node."""

    name: str
    print: str  # of the key and the operation: the same name must mean the same change

    @classmethod
    def of(cls, name: str, key: str, operation: Operation) -> "Once":
        digest = blake2b(msgspec.msgpack.encode((key, operation)), digest_size=16)
        return cls(name, digest.hexdigest())


# "taken" answers a claim; "reused" and "full" say why a named change was not done.
Status = Literal["done", "mismatch", "absent", "not_integer", "taken", "reused", "full"]


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What one operation did; kept with its operation id so that a retry gets the same answer."""

    status: Status
    version: int  # after the operation; of a deleted or absent key: 0
    value: bytes | None = None  # only where the client cannot know it (incr, claim)


# JSON readers that keep integers in doubles lose them beyond this; refusing beats rounding.
MAX_INTEGER = 2**63 - 1


def evaluate(operation: Operation, record: Record, wall_ms: float) -> tuple[Outcome, Record | None]:
    """Apply `operation` to `record`; the second part is None when nothing changes."""
    version = record.version + 1
    match operation:
        case Write(value, ttl_ms):
            expires_ms = int(wall_ms) + ttl_ms if ttl_ms else 0
            return Outcome("done", version), Record(value, version, expires_ms)
        case Cas(expected_version, value, ttl_ms):
            current = record.version if record.value is not None else 0
            if current != expected_version:
                return Outcome("mismatch", current), None
            expires_ms = int(wall_ms) + ttl_ms if ttl_ms else 0
            return Outcome("done", version), Record(value, version, expires_ms)
        case Delete():
            if record.value is None:
                return Outcome("absent", 0), None
            return Outcome("done", 0), Record(None, version)
        case Incr(by):
            total = _integer(record.value)
            if total is None or abs(total + by) > MAX_INTEGER:
                return Outcome("not_integer", record.version), None
            value = b"%d" % (total + by)
            return Outcome("done", version, value), Record(value, version, record.expires_ms)
        case Claim(value, ttl_ms):
            if record.value is not None:
                return Outcome("taken", record.version, record.value), None
            return Outcome("done", version, value), Record(value, version, int(wall_ms) + ttl_ms)


def _integer(value: bytes | None) -> int | None:
    if value is None:
        return 0
    digits = value.removeprefix(b"-")
    return int(value) if digits.isdigit() and len(digits) <= 19 else None


def expired(record: Record, wall_ms: float) -> bool:
    """Has this value's time run out? (Only the home may act on it: it logs a delete first.)"""
    return record.value is not None and 0 < record.expires_ms <= wall_ms
