"""The whole machine as bytes and back. `restore(encode(m))` behaves like `m` for ever after.

To encode a million locks takes seconds, and so does reading them, so both go in small steps. A
`SnapshotWriter` works while the machine goes on. It sees the state of the moment when it was made:
what may change meanwhile is either copied then (what is never much), or encoded just before it
changes (locks). A `SnapshotReader` makes a new machine beside the present one.

Rows name each other as the state does. What can be derived is not written: clients' indexes,
loads, timers. Rows are ordered, because order is state here: holders by grant, queues by turn,
tickets by their last sign of life.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from lock_manager.core.locks.commands import Ask
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.requests import Row
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
    locks: list[memoryview]  # each a list of _LockRow
    waiters: list[_WaiterRow]
    tickets: list[_TicketRow]
    requests: list[memoryview]  # each a list of (forget at, key, Remembered)
    sweeps: list[tuple[int, int]]
    lost: list[tuple[int, str, str]]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Snapshot)
_lock_rows = msgspec.msgpack.Decoder(list[_LockRow])
_request_rows = msgspec.msgpack.Decoder(list[Row])

STEP_ROWS = 500


class SnapshotWriter:
    """`while writer.step(): ...` and then `writer.data()`; between steps the machine may go on.

    One at a time for a machine. `index` is the last entry that the snapshot contains.
    """

    def __init__(self, machine: LockMachine) -> None:
        table = machine.table
        self.index = machine.applied_index
        self._machine = machine
        self._locks = list(table.locks.values())
        self._before: dict[Lock, _LockRow] = {}  # as they were when they were about to change
        self._answered, self._requests = machine.requests.freeze()
        self._lock_chunks: list[bytes] = []
        waiting = [t.request_key for t in machine.tickets.values() if t.request_key]
        self._request_chunks = [_encoder.encode(machine.requests.waiting(waiting))]
        self._rest = _Snapshot(
            FORMAT,
            machine.applied_index,
            table.now_ms,
            table.token,
            machine.next_ticket,
            machine.epoch,
            [],  # locks: _lock_chunks
            [
                _WaiterRow(w.waiter_id, w.client_id, w.asks, w.since_ms, w.ttl_ms, list(w.tickets))
                for w in table.waiters.values()
            ],
            [
                _TicketRow(t.ticket_id, t.waiter_id, t.request_key, t.due_ms, t.epoch)
                for t in machine.tickets.values()
            ],
            [],  # requests: _request_chunks
            list(machine.sweeps),
            [row for row in machine.lost if _still_lost(machine, row)],
        )
        self._at = 0
        # Leases as they were before their first renewal: a client may renew masses of them at once,
        # and encoding all of their locks then would take most of a second.
        self._leases: dict[Hold, tuple[int, int]] = {}
        table.before_change = self._preserve
        table.before_renewal = self._preserve_lease

    def _preserve(self, lock: Lock) -> None:
        if lock not in self._before:
            self._before[lock] = _lock_row(lock, self._leases)

    def _preserve_lease(self, hold: Hold) -> None:
        if hold not in self._leases:
            self._leases[hold] = (hold.ttl_ms, hold.expires_ms)

    def step(self) -> bool:
        """Encode some rows; False when there are no more."""
        at, self._at = self._at, self._at + STEP_ROWS
        if at < len(self._locks):
            before, leases = self._before, self._leases
            rows = [
                before.get(lock) or _lock_row(lock, leases) for lock in self._locks[at : self._at]
            ]
            self._lock_chunks.append(_encoder.encode(rows))
            return True
        at -= -(-len(self._locks) // STEP_ROWS) * STEP_ROWS
        if at < len(self._answered):
            remembered = self._requests
            rows_too = [
                (until, key, remembered[key]) for until, key in self._answered[at : at + STEP_ROWS]
            ]
            self._request_chunks.append(_encoder.encode(rows_too))
            return True
        self.close()
        return False

    def close(self) -> None:
        """Stop watching the machine (also to give up)."""
        table = self._machine.table
        table.before_change = table.before_renewal = None

    def data(self) -> bytes:
        """The snapshot, after the last step."""
        return b"".join(self.parts())

    def parts(self) -> list[bytes]:
        """The same in pieces: joined, they are `_Snapshot` in MessagePack. To copy all of it takes
        long enough to be done elsewhere."""
        parts = [_array_header(len(_Snapshot.__struct_fields__))]
        chunked = {"locks": self._lock_chunks, "requests": self._request_chunks}
        for name in _Snapshot.__struct_fields__:
            if name in chunked:
                parts.append(_array_header(len(chunked[name])))
                for chunk in chunked[name]:
                    parts += (b"\xc6" + len(chunk).to_bytes(4, "big"), chunk)  # bin 32
            else:
                parts.append(_encoder.encode(getattr(self._rest, name)))
        return parts


def _array_header(length: int) -> bytes:
    """MessagePack's array 32."""
    return b"\xdd" + length.to_bytes(4, "big")


def encode(machine: LockMachine) -> bytes:
    """The whole snapshot at once."""
    writer = SnapshotWriter(machine)
    while writer.step():
        pass
    return writer.data()


class SnapshotReader:
    """`while reader.step(): ...` and then `reader.machine`, which is of no use before."""

    def __init__(self, data: bytes) -> None:
        """Raises SnapshotError, as `step` does, if `data` cannot be one."""
        self.machine = LockMachine()
        self._steps = self._rebuild(data)

    def step(self) -> bool:
        """Rebuild some rows; False when all are there."""
        try:
            return next(self._steps, False)
        except (msgspec.DecodeError, KeyError) as e:
            raise SnapshotError(f"not a snapshot of the lock machine: {e}") from e

    def _rebuild(self, data: bytes) -> Iterator[bool]:
        rows = _decoder.decode(data)
        if rows.format != FORMAT:
            raise SnapshotError(f"snapshot of format {rows.format}, expected {FORMAT}")
        machine, table = self.machine, self.machine.table
        machine.applied_index = rows.applied_index
        machine.next_ticket, machine.epoch = rows.next_ticket, rows.epoch
        table.now_ms, table.token = rows.now_ms, rows.token
        for w in rows.waiters:
            table.waiters[w.waiter_id] = Waiter(
                w.waiter_id, w.client_id, w.asks, w.since_ms, w.ttl_ms, dict.fromkeys(w.tickets)
            )
        for chunk in rows.locks:
            rebuilt = [_rebuild_lock(machine, row) for row in _lock_rows.decode(chunk)]
            yield True
            # In a step of their own: if one client holds everything, its index outgrows its room
            # with the same row as that of the locks, and to move either takes 25 ms at a million.
            for lock in rebuilt:
                for hold in lock.each_hold():
                    table.clients[hold.client_id].add(hold)
            yield True
        for waiter in table.waiters.values():
            client = table.client(waiter.client_id)
            client.waits = client.waits or {}
            client.waits.update({ask.lock_name: waiter for ask in waiter.asks})
        for t in rows.tickets:
            ticket = Ticket(t.ticket_id, t.waiter_id, t.request_key, t.due_ms, t.epoch)
            machine.tickets[t.ticket_id] = ticket
            machine.deadlines.watch(ticket)
        for chunk in rows.requests:
            machine.requests.load(_request_rows.decode(chunk))
            yield True
        machine.sweeps.extend(rows.sweeps)
        for until, client_id, lock_name in rows.lost:
            client = table.client(client_id)
            client.lost = client.lost or {}
            client.lost[lock_name] = until
            machine.lost.append((until, client_id, lock_name))


def restore(data: bytes) -> LockMachine:
    """The whole machine at once. Raises SnapshotError if `data` cannot be one; a node with such a
    store must not start."""
    reader = SnapshotReader(data)
    while reader.step():
        pass
    return reader.machine


def scrap(machine: LockMachine) -> Iterator[None]:
    """Take a machine that nobody needs any more to pieces: to free a million locks at once would
    stop the process for a third of a second."""
    table = machine.table
    while table.locks:
        for _ in range(min(STEP_ROWS, len(table.locks))):
            _, lock = table.locks.popitem()
            for hold in lock.each_hold():
                table.clients[hold.client_id].remove(hold)
        yield
    while table.ends.scrap(STEP_ROWS):
        yield


def _lock_row(lock: Lock, leases: Mapping[Hold, tuple[int, int]]) -> _LockRow:
    """`leases`: those that were renewed meanwhile, as (ttl_ms, expires_ms) before that."""
    holds = [
        _HoldRow(
            h.client_id,
            h.weight,
            h.token,
            h.origin,
            *(leases.get(h) or (h.ttl_ms, h.expires_ms)),
            h.told,
            h.reap_ms,
        )
        for h in lock.each_hold()
    ]
    conversions, queue = list(lock.conversions or ()), list(lock.queue or ())
    return _LockRow(lock.name, lock.limit, lock.free_from_ms, holds, conversions, queue)


def _still_lost(machine: LockMachine, row: tuple[int, str, str]) -> bool:
    until, client_id, lock_name = row
    client = machine.table.clients.get(client_id)
    return client is not None and (client.lost or {}).get(lock_name) == until


def _rebuild_lock(machine: LockMachine, row: _LockRow) -> Lock:
    """All of a lock, but for its holds' places in their clients' indices."""
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
        if hold.expires_ms or hold.reap_ms:
            table.schedule(hold)
    lock.conversions = _rebuild_places(machine, lock, row.conversions)
    lock.queue = _rebuild_places(machine, lock, row.queue)
    if lock.free_from_ms:
        lock.due_ms = lock.free_from_ms
        table.delays.watch(lock)
    return lock


def _rebuild_places(
    machine: LockMachine, lock: Lock, waiter_ids: list[int]
) -> OrderedDict[int, Place] | None:
    places: OrderedDict[int, Place] = OrderedDict()
    for waiter_id in waiter_ids:
        waiter = machine.table.waiters[waiter_id]
        asks = {ask.lock_name: ask for ask in waiter.asks}
        places[waiter_id] = Place(waiter, weight_of(asks[lock.name]))
    return places or None
