"""The whole machine as bytes and back. `restore(encode(m))` behaves like `m` for ever after.

Rows name each other as the state does. What can be derived is not written: clients' indexes,
loads, timers. Rows are ordered, because order is state here: holders by grant, queues by turn,
tickets by their last sign of life.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from lock_manager.core.locks.commands import Ask
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.requests import Remembered
from lock_manager.core.locks.state import Hold, Lock, Place, Ticket, Waiter, weight_of

FORMAT = 1


class SnapshotError(ValueError):
    """These bytes are not a snapshot of a lock machine, or of a version that is not known."""


class _HoldRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    client_id: str
    weight: int
    token: int
    origin: int
    ttl_ms: int
    expires_ms: int
    told: int
    reap_ms: int


class _LockRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    name: str
    limit: int
    free_from_ms: int
    holds: list[_HoldRow]
    conversions: list[int]  # waiter ids
    queue: list[int]


class _WaiterRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    waiter_id: int
    client_id: str
    asks: tuple[Ask, ...]
    since_ms: int
    ttl_ms: int
    tickets: list[int]


class _TicketRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    ticket_id: int
    waiter_id: int
    request_key: str
    due_ms: int
    epoch: int


class _Snapshot(msgspec.Struct, frozen=True, array_like=True):
    format: int
    applied_index: int
    now_ms: int
    token: int
    next_ticket: int
    epoch: int
    locks: list[_LockRow]
    waiters: list[_WaiterRow]
    tickets: list[_TicketRow]
    requests: list[tuple[int, str, Remembered]]
    sweeps: list[tuple[int, int]]
    lost: list[tuple[int, str, str]]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Snapshot)


def encode(machine: LockMachine) -> bytes:
    table = machine.table
    return _encoder.encode(
        _Snapshot(
            FORMAT,
            machine.applied_index,
            table.now_ms,
            table.token,
            machine.next_ticket,
            machine.epoch,
            [_lock_row(lock) for lock in table.locks.values()],
            [
                _WaiterRow(w.waiter_id, w.client_id, w.asks, w.since_ms, w.ttl_ms, list(w.tickets))
                for w in table.waiters.values()
            ],
            [
                _TicketRow(t.ticket_id, t.waiter_id, t.request_key, t.due_ms, t.epoch)
                for t in machine.tickets.values()
            ],
            machine.requests.export(),
            list(machine.sweeps),
            [row for row in machine.lost if _still_lost(machine, row)],
        )
    )


def restore(data: bytes) -> LockMachine:
    """Raises SnapshotError if `data` cannot be one; a node with such a store must not start."""
    try:
        rows = _decoder.decode(data)
        if rows.format != FORMAT:
            raise SnapshotError(f"snapshot of format {rows.format}, expected {FORMAT}")
        return _rebuild(rows)
    except (msgspec.DecodeError, KeyError) as e:
        raise SnapshotError(f"not a snapshot of the lock machine: {e}") from e


def _lock_row(lock: Lock) -> _LockRow:
    holds = [
        _HoldRow(
            h.client_id, h.weight, h.token, h.origin, h.ttl_ms, h.expires_ms, h.told, h.reap_ms
        )
        for h in lock.each_hold()
    ]
    conversions, queue = list(lock.conversions or ()), list(lock.queue or ())
    return _LockRow(lock.name, lock.limit, lock.free_from_ms, holds, conversions, queue)


def _still_lost(machine: LockMachine, row: tuple[int, str, str]) -> bool:
    until, client_id, lock_name = row
    client = machine.table.clients.get(client_id)
    return client is not None and (client.lost or {}).get(lock_name) == until


def _rebuild(rows: _Snapshot) -> LockMachine:
    machine = LockMachine()
    table = machine.table
    machine.applied_index = rows.applied_index
    machine.next_ticket, machine.epoch = rows.next_ticket, rows.epoch
    table.now_ms, table.token = rows.now_ms, rows.token
    for w in rows.waiters:
        table.waiters[w.waiter_id] = Waiter(
            w.waiter_id, w.client_id, w.asks, w.since_ms, w.ttl_ms, dict.fromkeys(w.tickets)
        )
    for row in rows.locks:
        _rebuild_lock(machine, row)
    for waiter in table.waiters.values():
        client = table.client(waiter.client_id)
        client.waits = client.waits or {}
        client.waits.update({ask.lock_name: waiter for ask in waiter.asks})
    for t in rows.tickets:
        ticket = Ticket(t.ticket_id, t.waiter_id, t.request_key, t.due_ms, t.epoch)
        machine.tickets[t.ticket_id] = ticket
        machine.deadlines.watch(ticket)
    machine.requests.load(rows.requests)
    machine.sweeps.extend(rows.sweeps)
    for until, client_id, lock_name in rows.lost:
        client = table.client(client_id)
        client.lost = client.lost or {}
        client.lost[lock_name] = until
        machine.lost.append((until, client_id, lock_name))
    return machine


def _rebuild_lock(machine: LockMachine, row: _LockRow) -> None:
    table = machine.table
    lock = table.locks[row.name] = Lock(row.name, row.limit, free_from_ms=row.free_from_ms)
    for h in row.holds:
        client = table.client(h.client_id)
        hold = Hold(
            lock.name,
            client.client_id,
            h.weight,
            h.token,
            h.origin,
            h.ttl_ms,
            h.expires_ms,
            h.told,
            h.reap_ms,
        )
        lock.add(hold)
        client.add(hold)
        if hold.expires_ms or hold.reap_ms:
            table.schedule(hold)
    lock.conversions = _rebuild_places(machine, lock, row.conversions)
    lock.queue = _rebuild_places(machine, lock, row.queue)
    if lock.free_from_ms:
        lock.due_ms = lock.free_from_ms
        table.delays.watch(lock)


def _rebuild_places(
    machine: LockMachine, lock: Lock, waiter_ids: list[int]
) -> OrderedDict[int, Place] | None:
    places: OrderedDict[int, Place] = OrderedDict()
    for waiter_id in waiter_ids:
        waiter = machine.table.waiters[waiter_id]
        ask = next(ask for ask in waiter.asks if ask.lock_name == lock.name)
        places[waiter_id] = Place(waiter, weight_of(ask))
    return places or None
