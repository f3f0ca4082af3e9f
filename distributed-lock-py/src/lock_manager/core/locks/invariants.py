"""What must be true of the lock machine after every batch, executable.

`check` costs as much as the whole state: tests, simulations and scenarios run it, a node does not.
"""

from __future__ import annotations

from lock_manager.core.locks.deadlock import find_cycle
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.state import Lock, weight_of


def check(machine: LockMachine, *, lagging: bool = False) -> None:
    """Raises AssertionError naming the first broken invariant. `lagging`: the last entry ended as
    many holds as one entry may, so that some may have outlived their time."""
    for name, lock in machine.table.locks.items():
        assert lock.name == name
        _check_exclusion(lock)
        _check_queue(machine, lock)
    _check_index(machine, lagging=lagging)
    _check_tickets(machine)
    _check_nobody_forgotten(machine)
    _check_no_deadlock(machine)


def _check_exclusion(lock: Lock) -> None:
    """Guarantee 1: one exclusive holder, or any number of shared, or permits within the limit."""
    holds = list(lock.each_hold())
    assert not lock.idle, f"{lock.name} exists for nothing"
    assert len({hold.client_id for hold in holds}) == len(holds)
    assert all(hold.weight > 0 and hold.lock_name == lock.name for hold in holds)
    assert lock.load == sum(hold.weight for hold in holds), f"{lock.name}: load is wrong"
    assert lock.load <= lock.capacity, f"{lock.name}: mutual exclusion is broken"
    if not lock.limit:
        exclusive = [hold for hold in holds if hold.weight > 1]
        assert len(holds) == 1 or not exclusive, f"{lock.name}: exclusive and shared at once"
    assert not (isinstance(lock.holders, dict) and len(holds) < 2)


def _check_queue(machine: LockMachine, lock: Lock) -> None:
    """A conversion stands on a hold, a plain waiter has none; both are known by their id."""
    for place in (lock.conversions or {}).values():
        assert lock.hold_of(place.waiter.client_id) is not None, f"{lock.name}: nothing to convert"
    for place in (lock.queue or {}).values():
        assert lock.hold_of(place.waiter.client_id) is None, f"{lock.name}: waits for what it has"
    for place in lock.places():
        waiter = place.waiter
        assert machine.table.waiters.get(waiter.waiter_id) is waiter
        ask = next(ask for ask in waiter.asks if ask.lock_name == lock.name)
        assert place.weight == weight_of(ask)
        assert ask.limit == lock.limit
        assert machine.table.waiter_of(waiter.client_id, lock.name) is waiter


def _check_index(machine: LockMachine, *, lagging: bool) -> None:
    """Holds are the same seen from locks and from clients; tokens were given out (guarantee 2)."""
    table = machine.table
    by_lock = {
        (hold.lock_name, hold.client_id): hold
        for lock in table.locks.values()
        for hold in lock.each_hold()
    }
    by_client = {
        (hold.lock_name, hold.client_id): hold
        for client in table.clients.values()
        for hold in client.each_hold()
    }
    assert by_lock.keys() == by_client.keys()
    assert all(by_client[key] is hold for key, hold in by_lock.items())
    for client in table.clients.values():
        assert not client.idle, f"{client.client_id} is kept for nothing"
        for name, waiter in (client.waits or {}).items():
            assert table.waiters[waiter.waiter_id] is waiter
            assert any(ask.lock_name == name for ask in waiter.asks)
    for hold in by_lock.values():
        assert 0 < hold.origin <= hold.token <= table.token
        due = [at for at in (hold.expires_ms, hold.reap_ms) if at]
        assert hold.due_ms == (min(due) if due else 0)
        assert lagging or not table.is_over(hold), f"{hold.lock_name}: a hold outlived its lease"
        assert bool(hold.ttl_ms) == bool(hold.expires_ms)
        assert bool(hold.reap_ms) == (hold.told == 0), "a grant nobody knows of is not reaped"


def _check_tickets(machine: LockMachine) -> None:
    """Every place has a ticket and every ticket a place; none outlived its wait (guarantee 9)."""
    waiting = {t for waiter in machine.table.waiters.values() for t in waiter.tickets}
    assert waiting == machine.tickets.keys()
    for number, ticket in machine.tickets.items():
        assert ticket.ticket_id == number < machine.next_ticket
        assert ticket.due_ms > machine.now_ms, "a waiter outlived its wait_ms"
        assert number in machine.table.waiters[ticket.waiter_id].tickets
        assert ticket.epoch <= machine.epoch
        if ticket.request_key:
            known = machine.requests.get(ticket.request_key)
            assert known is not None
            assert known.ticket == number
    epochs = [ticket.epoch for ticket in machine.tickets.values()]
    assert epochs == sorted(epochs), "tickets are not in the order of their last sign of life"


def _check_nobody_forgotten(machine: LockMachine) -> None:
    """Guarantee 6: whoever may be let in has been let in."""
    table = machine.table
    for lock in table.locks.values():
        ready = table.first_ready(lock)
        assert ready is None, f"{lock.name}: {ready.client_id} waits though it may enter"


def _check_no_deadlock(machine: LockMachine) -> None:
    """Guarantee 7: no deadlock survives its birth."""
    for waiter in machine.table.waiters.values():
        cycle = find_cycle(machine.table, waiter.client_id)
        assert not cycle, f"deadlock: {cycle}"
