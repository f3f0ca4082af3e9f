"""Is a decoded message plausible? Peers are authenticated, not trusted: a bug or an intruder there
must not corrupt what is here, nor make this node allocate without bound.
"""

from __future__ import annotations

from typing import assert_never

from message_queue.core.messages import (
    Ack,
    Append,
    Attest,
    Canvass,
    CanvassAnswer,
    Claim,
    Copies,
    Dismiss,
    Farewell,
    Heartbeat,
    HeartbeatAnswer,
    Inquire,
    Membership,
    PeerMessage,
    Promise,
    Pull,
    Put,
    Puts,
    Refusal,
    RingNews,
    Seal,
    Set,
    Settled,
    Soft,
    Stored,
    View,
    Yield,
    owner_of,
)
from message_queue.core.placement.membership import MAX_MEMBERS
from message_queue.core.replication.dots import CHUNK, mask, well_formed, well_formed_chunks
from message_queue.core.replication.intervals import Intervals
from message_queue.core.runs import count, well_formed_run


def plausible_view(view: View, below: int) -> bool:
    """Well-formed, no dot of an epoch above ``below``, and nothing held that is not covered."""
    if not well_formed(view.context) or not well_formed_chunks(view.held):
        return False
    if view.context and view.context[-1][0] > below:
        return False
    context = Intervals(view.context)
    for epoch, number, raw in view.held:
        base = number * CHUNK
        bare = int.from_bytes(raw, "little")
        for _, first, last in context.within((epoch, base, base + CHUNK - 1)):
            bare &= ~mask(first - base, last - base)
        if bare:
            return False
    if not _plausible_replicas(view.replicas, view.before):
        return False
    return all(setting.epoch <= below for setting in view.settings)


def _plausible_replicas(replicas: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Distinct nodes, a few; nobody hands over to nobody."""
    if before and not replicas:
        return False
    return all(len(s) <= MAX_MEMBERS and len(set(s)) == len(s) for s in (replicas, before))


def plausible_ring(ring: Membership) -> bool:
    """A ring that ``placement.membership`` could have made."""
    positions = [position for position, _ in ring.members]
    leaving = ring.leaving
    return (
        0 < len(positions) <= MAX_MEMBERS
        and positions == sorted(set(positions))
        and positions[-1] < ring.next_position
        and 1 <= ring.founders <= ring.next_position
        and (ring.joining is None or (ring.joining in positions and leaving is None))
        and (leaving is None or (leaving[0] not in positions and leaving[0] < ring.next_position))
        and len(positions) > (ring.joining is not None)
    )


def _plausible_append(message: Append) -> bool:
    entries = message.entries
    if not entries:
        return False
    seq = entries[0].seq
    for entry in entries:
        if entry.seq != seq or seq < 1:
            return False
        match entry:
            case Ack(_, targets):
                if not well_formed(targets):
                    return False
                if targets and (targets[-1][0], targets[-1][2]) >= (message.epoch, seq):
                    return False
            case Puts():
                if not well_formed_run(entry):
                    return False
            case Put() | Set() | Settled():
                pass
            case _:
                assert_never(entry)
        seq += count(entry)
    return True


def plausible(sender: int, message: PeerMessage) -> bool:
    """False: ignore the message. ``sender`` is the authenticated node."""
    match message:
        case Heartbeat(_, _, _, owned, claimed):
            return all(owner_of(epoch) == sender and epoch > 0 for _, epoch in (*owned, *claimed))
        case HeartbeatAnswer() | Canvass() | Refusal() | Stored() | Farewell():
            return True
        case CanvassAnswer(_, _, _, _, _, sealed, replicas, before):
            return _plausible_replicas(replicas, before) and (sealed > 0 or not replicas)
        case Inquire() | Attest():
            return True
        case Claim(_, epoch):
            return epoch > 0 and owner_of(epoch) == sender
        case Promise(_, epoch, _, view):
            return plausible_view(view, epoch)
        case Pull(_, _, wanted):
            return well_formed(wanted)
        case Copies(_, _, copies, missing):
            return well_formed(missing) and all(c.seq > 0 and c.epoch > 0 for c in copies)
        case Seal(_, epoch, _, view):
            return epoch > 0 and owner_of(epoch) == sender and plausible_view(view, epoch)
        case Append(_, epoch):
            return epoch > 0 and owner_of(epoch) == sender and _plausible_append(message)
        case Yield(_, epoch, _, _, target):
            return owner_of(epoch) == sender and _plausible_replicas(target, ())
        case Soft(_, epoch):
            return owner_of(epoch) == sender
        case Dismiss(_, epoch, _, replicas):
            return owner_of(epoch) == sender and bool(replicas) and sender in replicas
        case RingNews(ring):
            return plausible_ring(ring)
        case _:
            assert_never(message)
