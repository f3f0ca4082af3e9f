"""What must hold of delivery after every step. Executable; run by tests and the simulation."""

from __future__ import annotations

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.turns import CHUNK_BITS
from message_queue.core.ids import pack_dot


def check(machine: PartitionDelivery) -> None:
    """Raise AssertionError naming the first invariant that does not hold. O(messages)."""
    timers: dict[int, int] = {}
    for due_ms, dot in machine.timers():
        timers[dot] = min(due_ms, timers.get(dot, due_ms))
    for dot, entry in machine.entries.items():
        # A held message is somewhere.
        assert entry.dot == dot
        assert entry.state is not State.GONE
        # What waits for a moment has a timer no later than that moment.
        if entry.state in (State.DELAYED, State.LEASED):
            assert timers.get(dot, entry.due_ms + 1) <= entry.due_ms, "no timer"
        # Who was leased has a receipt of this epoch or an earlier one.
        assert 0 <= entry.epoch <= machine.epoch
        # No more deliveries reached nobody than there were.
        assert 0 <= entry.unseen <= entry.attempt
    delivered = {dot for dot, entry in machine.entries.items() if entry.attempt}
    leased = {dot for dot, entry in machine.entries.items() if entry.state is State.LEASED}
    assert delivered | leased <= set(machine.delivered) <= set(machine.entries), "untold deliveries"
    in_lots: set[int] = set()
    for lot in machine.lots:
        dots = set(range(lot.first, lot.last + 1))
        # A message is in one place.
        assert not dots & (in_lots | set(machine.entries)), "in two lots, or in a lot and by itself"
        assert lot.first >> CHUNK_BITS == lot.last >> CHUNK_BITS
        assert len(lot.sizes) == lot.count > 0
        assert lot.body_bytes == sum(lot.sizes)
        assert lot.bodies is None or [len(body) for body in lot.bodies] == list(lot.sizes)
        assert 0 < lot.epoch <= machine.epoch
        if not lot.settling:
            assert timers.get(lot.first, lot.due_ms + 1) <= lot.due_ms, "no timer for a lot"
        in_lots |= dots
    assert len(in_lots) == machine.lots.messages
    assert machine.lots.count == sum(1 for _ in machine.lots)
    all_waiting = {pack_dot(*dot) for dot in machine.ending.dots()}
    for view in machine.views():
        counted = [0] * len(State)
        for entry in view.members:
            counted[entry.state] += 1
        for lot in view.lots:
            counted[State.SETTLING if lot.settling else State.LEASED] += lot.count
        # The counters are the truth.
        assert counted == view.counts, f"{view.name}: {view.counts} counted {counted}"
        size = sum(e.body_bytes for e in view.members) + sum(lot.body_bytes for lot in view.lots)
        assert view.bytes == size
        # The backlog counts what it has, and nothing of it is in play.
        waiting = [dot for _, dot in view.backlog.dots()]
        assert len(waiting) == view.backlog.count
        assert not set(waiting) & (set(machine.entries) | in_lots), "in play and in the backlog"
        all_waiting |= set(waiting)
        sizes = [card.body_bytes for dot in waiting if (card := machine.card(dot)) is not None]
        assert len(sizes) < len(waiting) or sum(sizes) == view.backlog.bytes, "backlog's bytes"
        # Nobody waits while something is ready for him.
        ready = view.line_head is not None
        served = ready or bool(waiting)
        assert machine.paused or not (served and view.waiters), "a waiter beside a ready message"
        assert ready == bool(counted[State.READY]), "a ready message outside the line"
        # At most one member of a group is in play, and it is the first.
        for name, head in view.heads.items():
            members = [e for e in view.members if e.group == name]
            assert head in members
            first = min(e.dot for e in members)
            assert head.dot == first, "a group's head is not its first member"
            in_play = [e for e in members if e.state not in (State.BEHIND, State.SETTLING)]
            assert in_play in ([], [head])
    resident = [e.body_bytes for e in machine.entries.values() if e.body is not None]
    resident += [lot.body_bytes for lot in machine.lots if lot.bodies is not None]
    assert machine.resident_bytes == sum(resident), "memory that is not counted"
    # A body that waits in memory is that of a message that waits (or ends, purged).
    assert set(machine.parcels.dots()) <= all_waiting, "a body outlives its message"
