"""What nodes say to each other. Each is a frozen record; the union `Message` is closed.

The network may lose, repeat, delay and reorder any of them. Three things make that harmless:
`number` (see numbers.py) orders everything that one home decided; `request` names one attempt of
one node to get a line (increasing per node, over its restarts); `operation_id` names one change
that a client asked for (increasing per node, over its restarts), which happens once however often
it is asked for. Every message travels with its sender's incarnation (a durable start counter,
which is also its epoch as a home).
"""

from typing import Literal

import msgspec

from mesi_cache.core.records import Once, Operation, Outcome


class GetS(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Cache to home: I want to read this key."""

    key: str
    request: int


class GetM(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Cache to home: do this operation and make me the owner.

    The home evaluates the operation inside the transaction, so the grantee's one operation is done
    before the line can be taken away again, even if the grant never arrives.

    `epoch` is the home's, as the sender knows it; a home of another epoch does nothing but say so.
    Operations that changed nothing are remembered only in memory, so a copy of this message that
    was delayed over a restart must not be taken for a new one.
    """

    key: str
    request: int
    epoch: int
    operation_id: int
    floor: int  # the sender no longer waits for any of its operations below this
    operation: Operation
    once: Once | None = None  # the client's own name for it


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Home to cache: the answer to `request`. State I grants no copy (absent, nothing changed)."""

    key: str
    request: int
    number: int
    state: Literal["S", "E", "M", "I"]
    value: bytes | None
    version: int
    lease_ms: int  # counted by the cache from the first attempt of `request`
    expires_ms: int = 0  # of the record, absolute, only to be handed back
    ttl_left_ms: int = 0  # 0: no deadline
    outcome: Outcome | None = None  # of the operation, if the request was a GetM


class Inv(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Home to sharer: forget what you were granted below `number`."""

    key: str
    number: int
    origin: str  # the name of the member whose write causes it, for the log line


class InvAck(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I hold nothing granted below `number`, and shall never install such a grant."""

    key: str
    number: int


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Home to owner: give up ownership. `keep`: a shared copy may stay.

    It asks for no value: the home has every acknowledged one in its log.
    """

    key: str
    number: int
    keep: bool
    origin: str


class FetchAck(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I own nothing granted below `number`; `kept`: I hold a shared copy, now under `number`."""

    key: str
    number: int
    kept: bool


class Put(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Cache to home: I forgot the line that I held in `state` (PutM, PutE, PutS) under `number`."""

    key: str
    number: int
    state: Literal["M", "E", "S"]


class PutAck(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Home to cache: your Put of `number` is dealt with."""

    key: str
    number: int


class Backup(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Owner to home: log this change of the line that I own under `number`."""

    key: str
    number: int
    operation_id: int
    floor: int
    value: bytes | None  # None: deleted
    version: int
    expires_ms: int
    outcome: Outcome


class BackupAck(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Logged (now or earlier). The outcome is the one of the time when it happened."""

    key: str
    number: int
    operation_id: int
    outcome: Outcome


class BackupRefused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Not logged, and never will be under `number`: that grant is over."""

    key: str
    number: int
    operation_id: int


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Cache to home: may all my copies live longer? One per pair of nodes, not per line."""

    request: int


class RenewAck(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Yes, once you have applied `pending`; `complete` is False if there was more than fits."""

    request: int
    lease_ms: int
    pending: tuple[Inv | Fetch, ...]
    complete: bool


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Says nothing but the sender's incarnation, which every message carries."""


ToHome = GetS | GetM | InvAck | FetchAck | Put | Backup | Renew
ToCache = Grant | Inv | Fetch | PutAck | BackupAck | BackupRefused | RenewAck
Message = ToHome | ToCache | Hello
