"""The nouns of the lock machine: locks, holds, places in a queue, tickets, clients.

One idea carries every lock type: a lock has a *capacity*, and each hold or wait on it a *weight*.

    plain lock   capacity WHOLE   exclusive weighs WHOLE, shared weighs 1
    semaphore    capacity limit   a request weighs its permits

Holders are compatible if their weights fit into the capacity together. A waiter may be granted if
it fits together with the holders *and every waiter before it*; that is FIFO, it lets neighbouring
sharers in together, and a later sharer cannot overtake a waiting exclusive. A conversion counts
only what it adds to the client's own hold, and stands before all plain waiters.

Records refer to each other by name, never by object, so they form no cycles and need no garbage
collector (`gc=False`): with 10^6 locks held a collection would otherwise stop the node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

import msgspec

from lock_manager.core.locks.commands import Ask, LockType

WHOLE = 1 << 40


class Hold(msgspec.Struct, gc=False, eq=False):
    """Invariant: due_ms is the sooner of expires_ms and reap_ms (0: neither)."""

    lock_name: str
    client_id: str
    weight: int
    token: int
    origin: int  # the token it began with; conversions keep it
    ttl_ms: int = 0  # 0: no lease
    expires_ms: int = 0  # cluster time; 0 without a lease
    # Answers that told, or may have told, the client of this hold. At 0 nobody knows of it, and it
    # is reaped at `reap_ms` unless a retry claims it.
    told: int = 1
    reap_ms: int = 0
    due_ms: int = 0
    timer_ms: int = 0  # kept by Timers

    @property
    def order(self) -> tuple[int, str]:
        return (self.token, self.lock_name)


class Waiter(msgspec.Struct, gc=False, eq=False):
    """One place in the queues of all its locks. Several requests of the client may share it."""

    waiter_id: int  # its first ticket
    client_id: str
    asks: tuple[Ask, ...]
    since_ms: int
    ttl_ms: int
    tickets: dict[int, None]  # an ordered set: its requests


class Ticket(msgspec.Struct, gc=False, eq=False):
    """One request that waits. Ends with the waiter's grant, its own deadline, or its connection."""

    ticket_id: int
    waiter_id: int
    request_key: str  # empty: the request had no id
    due_ms: int
    epoch: int  # leader count when its connection was last known
    timer_ms: int = 0

    @property
    def order(self) -> tuple[int, str]:
        return (self.ticket_id, "")


class Place(msgspec.Struct, gc=False, eq=False):
    """A waiter in one lock's queue."""

    waiter: Waiter
    weight: int


class Lock(msgspec.Struct, gc=False, eq=False):
    """Invariant: load == sum of the holders' weights <= capacity. Exists while it has a holder, a
    waiter or a delay.

    `holders` is the one hold itself, or a dict of several by client id in order of grant: most
    locks have one holder, and a dict costs more than all the rest of the lock.
    """

    name: str
    limit: int  # 0: a plain lock
    load: int = 0
    holders: Hold | dict[str, Hold] | None = None
    conversions: OrderedDict[int, Place] | None = None  # by waiter id; before `queue`
    queue: OrderedDict[int, Place] | None = None
    free_from_ms: int = 0  # lock delay: nobody new before this time
    # Timers' fields, for the delay.
    due_ms: int = 0
    timer_ms: int = 0

    @property
    def order(self) -> tuple[int, str]:
        return (0, self.name)

    @property
    def capacity(self) -> int:
        return self.limit or WHOLE

    def hold_of(self, client_id: str) -> Hold | None:
        holders = self.holders
        if holders is None:
            return None
        if isinstance(holders, Hold):
            return holders if holders.client_id == client_id else None
        return holders.get(client_id)

    def each_hold(self) -> Iterator[Hold]:
        holders = self.holders
        if holders is None:
            return iter(())
        if isinstance(holders, Hold):
            return iter((holders,))
        return iter(holders.values())

    def add(self, hold: Hold) -> None:
        holders = self.holders
        if holders is None:
            self.holders = hold
        elif isinstance(holders, Hold):
            self.holders = {holders.client_id: holders, hold.client_id: hold}
        else:
            holders[hold.client_id] = hold
        self.load += hold.weight

    def remove(self, hold: Hold) -> None:
        holders = self.holders
        if isinstance(holders, dict):
            del holders[hold.client_id]
            if len(holders) == 1:
                self.holders = next(iter(holders.values()))
        else:
            self.holders = None
        self.load -= hold.weight

    def places(self) -> Iterator[Place]:
        """Everybody who waits, in the order in which they are served."""
        if self.conversions:
            return chain(self.conversions.values(), self.queue.values() if self.queue else ())
        return iter(self.queue.values()) if self.queue else iter(())

    @property
    def waited_for(self) -> bool:
        return bool(self.queue or self.conversions)

    @property
    def idle(self) -> bool:
        return not (self.holders or self.waited_for or self.free_from_ms)

    def type_of(self, weight: int) -> LockType:
        if self.limit:
            return LockType.SEMAPHORE
        return LockType.EXCLUSIVE if weight == WHOLE else LockType.SHARED

    def added_by(self, place: Place) -> int:
        """What a place would add to the load: a conversion replaces the client's own hold."""
        hold = self.hold_of(place.waiter.client_id)
        return place.weight if hold is None else max(0, place.weight - hold.weight)


class Client(msgspec.Struct, gc=False, eq=False):
    """Everything one client has; exists while it has something."""

    client_id: str
    holds: Hold | dict[str, Hold] | None = None  # by lock name; one or several, as in Lock
    waits: dict[str, Waiter] | None = None  # by lock name
    lost: dict[str, int] | None = None  # lock name -> until when `keepalive` reports it

    def each_hold(self) -> Iterator[Hold]:
        holds = self.holds
        if holds is None:
            return iter(())
        if isinstance(holds, Hold):
            return iter((holds,))
        return iter(holds.values())

    def add(self, hold: Hold) -> None:
        holds = self.holds
        if holds is None:
            self.holds = hold
        elif isinstance(holds, Hold):
            self.holds = {holds.lock_name: holds, hold.lock_name: hold}
        else:
            holds[hold.lock_name] = hold

    def remove(self, hold: Hold) -> None:
        holds = self.holds
        if isinstance(holds, dict):
            del holds[hold.lock_name]
            if not holds:
                self.holds = None
        else:
            self.holds = None

    @property
    def idle(self) -> bool:
        return not (self.holds or self.waits or self.lost)


def weight_of(ask: Ask) -> int:
    lock_type = ask.lock_type
    if lock_type is LockType.EXCLUSIVE:
        return WHOLE
    return 1 if lock_type is LockType.SHARED else ask.permits
