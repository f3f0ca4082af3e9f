"""What may be asked about the machine without changing it: the tables behind GET."""

from __future__ import annotations

from itertools import islice

import msgspec

from lock_manager.core.locks.commands import LockType
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import HolderView
from lock_manager.core.locks.state import Lock, Place


class WaiterView(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    client_id: str
    lock_type: LockType
    position: int  # 1: next
    waiting_ms: int
    permits: int = 0


class LockView(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    lock_name: str
    holders: list[HolderView]
    waiters: list[WaiterView]
    limit: int = 0  # of a semaphore


class Edge(msgspec.Struct, frozen=True, gc=False):
    """`waiter` cannot go on before `blocker` lets go of `lock_name` (or of its place there)."""

    waiter: str
    blocker: str
    lock_name: str


def lock(machine: LockMachine, lock_name: str, now_ms: int) -> LockView:
    """One lock at cluster time `now_ms`; a name that nobody uses is a free lock."""
    found = machine.table.locks.get(lock_name)
    return _view(machine, found, now_ms) if found else LockView(lock_name, [], [])


def locks(machine: LockMachine, now_ms: int, most: int) -> tuple[list[LockView], bool]:
    """The first `most` locks that are held or waited for, and whether that is all of them."""
    used = (lock for lock in machine.table.locks.values() if lock.holders or lock.waited_for)
    shown = [_view(machine, lock, now_ms) for lock in islice(used, most)]
    return shown, next(used, None) is None


def wait_graph(machine: LockMachine, most: int) -> tuple[list[Edge], bool]:
    """Who waits for whom, at most `most` edges, and whether that is all of them."""
    edges: list[Edge] = []
    for waiter in machine.table.waiters.values():
        for ask in waiter.asks:
            found = machine.table.locks[ask.lock_name]
            for blocker in _blockers(found, waiter.waiter_id):
                if len(edges) == most:
                    return edges, False
                edges.append(Edge(waiter.client_id, blocker, ask.lock_name))
    return edges, True


def validate(machine: LockMachine, lock_name: str, fencing_token: int) -> bool:
    """Whether that token is of a present hold on the lock."""
    table = machine.table
    found = table.locks.get(lock_name)
    return found is not None and any(
        hold.token == fencing_token and not table.is_over(hold) for hold in found.each_hold()
    )


def _view(machine: LockMachine, lock: Lock, now_ms: int) -> LockView:
    waiters = [
        WaiterView(
            place.waiter.client_id,
            lock.type_of(place.weight),
            position,
            max(0, now_ms - place.waiter.since_ms),
            place.weight if lock.limit else 0,
        )
        for position, place in enumerate(lock.places(), 1)
    ]
    return LockView(lock.name, list(machine.table.holders(lock, now_ms)), waiters, lock.limit)


def _blockers(lock: Lock, waiter_id: int) -> list[str]:
    """Holders and earlier waiters that the waiter does not fit beside; nobody if it fits."""
    room = lock.capacity - lock.load
    ahead: list[Place] = []
    for place in lock.places():
        if place.waiter.waiter_id == waiter_id:
            if lock.added_by(place) <= max(room, 0):
                return []
            me = place.waiter.client_id
            holders = [hold for hold in lock.each_hold() if hold.client_id != me]
            others = [(h.client_id, h.weight) for h in holders]
            others += [(p.waiter.client_id, p.weight) for p in ahead]
            return [other for other, w in others if lock.limit or w + place.weight > lock.capacity]
        room -= lock.added_by(place)
        ahead.append(place)
    return []
