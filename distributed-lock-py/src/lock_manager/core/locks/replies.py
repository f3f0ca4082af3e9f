"""What the machine answers. The api turns these into HTTP; snapshots keep them for retries."""

from __future__ import annotations

import msgspec

from lock_manager.core.locks.commands import LockType


class HolderView(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One holder as clients see it; `expires_in_ms` None: held until released."""

    client_id: str
    lock_type: LockType
    fencing_token: int
    expires_in_ms: int | None
    permits: int = 0


class Granted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One lock of a grant. `origin` is the token of the client's first hold on it since it was
    free: it survives conversions and tells a retry whether that hold is still the same."""

    lock_name: str
    lock_type: LockType
    fencing_token: int
    origin: int
    permits: int = 0
    limit: int = 0


class Acquired(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    client_id: str
    locks: tuple[Granted, ...]
    fencing_token: int
    expires_in_ms: int | None = None  # the soonest of its locks; of a remembered answer: not kept


class Held(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A try found the lock taken, or not free yet (then there may be no holder)."""

    lock_name: str
    holders: tuple[HolderView, ...] = ()


class TimedOut(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    lock_name: str


class Deadlock(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """`cycle`: client ids, the requester first; each waits for the next, the last for the first."""

    cycle: tuple[str, ...]


class LeaseLost(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The grant asked about, or the hold that was to be converted, is gone."""

    lost: tuple[str, ...]


class KindMismatch(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """The name is in use as another kind (`limit` 0: a plain lock) or with another limit."""

    lock_name: str
    limit: int


class AlreadyWaiting(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The client already waits for this lock in another way."""

    lock_name: str


class RequestReused(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """The request id was used for another body."""

    request_id: str


class Released(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    lock_name: str
    client_id: str


class NotHeld(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    lock_name: str
    client_id: str


class ReleasedMany(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Answer to ReleaseAll and ForceRelease."""

    count: int


class Renewed(msgspec.Struct, frozen=True, array_like=True, tag=12, gc=False):
    """`lost`: leases that ended since the client's last acquire (the others were renewed)."""

    locks: int
    lost: tuple[str, ...] = ()


class Malformed(msgspec.Struct, frozen=True, array_like=True, tag=13, gc=False):
    """A command that no correct api proposes; it changed nothing."""

    what: str


class TooManyRequests(msgspec.Struct, frozen=True, array_like=True, tag=15, gc=False):
    """No more request ids can be remembered; the request changed nothing."""


class Done(msgspec.Struct, frozen=True, array_like=True, tag=14, gc=False):
    """Answer to a command that only the leader itself sends."""


Reply = (
    Acquired
    | Held
    | TimedOut
    | Deadlock
    | LeaseLost
    | KindMismatch
    | AlreadyWaiting
    | RequestReused
    | Released
    | NotHeld
    | ReleasedMany
    | Renewed
    | Malformed
    | TooManyRequests
    | Done
)


class Queued(msgspec.Struct, frozen=True, gc=False):
    """No answer yet: a `Resolution` will name this ticket."""

    ticket: int


class Resolution(msgspec.Struct, frozen=True, gc=False):
    """The answer to everybody who waits on one of these tickets (all of one place in a queue)."""

    tickets: tuple[int, ...]
    reply: Reply


class Expired(msgspec.Struct, frozen=True, gc=False):
    """A hold ended by itself. `reaped`: not its lease; nobody could be told of the grant."""

    lock_name: str
    client_id: str
    fencing_token: int
    reaped: bool


class Outcomes(msgspec.Struct):
    """`answers` has one element for each command of the batch, in order."""

    answers: list[Reply | Queued]
    resolutions: list[Resolution]
    expired: list[Expired]
