"""The ring as a versioned configuration: who may be asked to change it to what.

```
 stable ──admit──▶ joining ──finish──▶ stable          one change at a time; a change
    │                 │ ▲                              may be turned round midway:
    │               dismiss, admit                     leave of the joiner, join of
    │                 ▼ │                              the leaver
    └────dismiss──▶ leaving ──finish──▶ stable
```

Every arrow is a new version, committed by a majority of the members of the version before it (in
``RING_PARTITION``). The ring only says where partitions *shall* be; who may decide for one is
written in its own seal (``replication.quorum``), so no ring, late or early, can split a partition.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from message_queue.core.messages import MAX_NODES, RING_PARTITION, Member, Membership
from message_queue.core.placement.ring import Ring

MAX_MEMBERS = 64
"""At a time; MAX_NODES bounds the positions ever given."""


class Declined(Struct, frozen=True):
    """The ring stays as it is; ``status`` and ``error`` as clients get them."""

    status: int
    error: str


def founding(
    addresses: tuple[str, ...], virtual_nodes: int, copies: int, first_id: tuple[int, str] = (0, "")
) -> Membership:
    """Version 1: the members that ``--peers`` names. ``first_id``: this node's position and id."""
    members = tuple(
        (position, Member(addr, first_id[1] if position == first_id[0] else ""))
        for position, addr in enumerate(addresses)
    )
    return Membership(
        1, len(addresses), virtual_nodes, copies, members, next_position=len(addresses)
    )


def nodes(ring: Membership) -> dict[int, Member]:
    """Everybody who takes part, a leaving node included."""
    found = dict(ring.members)
    if ring.leaving is not None:
        found[ring.leaving[0]] = ring.leaving[1]
    return found


def named(ring: Membership, heard: Mapping[int, Member]) -> Membership:
    """The same ring with nodes as they announce themselves; itself if that is nothing new."""
    members = tuple((p, heard.get(p, member)) for p, member in ring.members)
    leaving = ring.leaving
    if leaving is not None:
        leaving = (leaving[0], heard.get(leaving[0], leaving[1]))
    if members == ring.members and leaving == ring.leaving:
        return ring
    return replace(ring, members=members, leaving=leaving)


def departed(ring: Membership, position: int) -> bool:
    """That node was one, and has left for ever. (A joiner that has no position yet is at -1.)"""
    return 0 <= position < ring.next_position and position not in nodes(ring)


def changing(ring: Membership) -> bool:
    """A change is under way."""
    return ring.joining is not None or ring.leaving is not None


def admit(ring: Membership, addr: str, node_id: str = "") -> Membership | Declined:
    """The ring with that node as a member; the same ring if it is one, or about to be."""
    for position, member in ring.members:
        if member.addr == addr:
            if node_id and member.id and member.id != node_id:
                return Declined(409, "Address belongs to another node")
            return ring
        if node_id and member.id == node_id and position != ring.joining:
            return Declined(409, "Id belongs to another node")
    if ring.leaving is not None and ring.leaving[1].addr == addr:
        position, member = ring.leaving
        members = tuple(sorted((*ring.members, (position, member)), key=lambda item: item[0]))
        return replace(
            ring, version=ring.version + 1, members=members, joining=position, leaving=None
        )
    if changing(ring):
        return Declined(409, "Another ring change is in progress")
    if ring.next_position >= MAX_NODES or len(ring.members) >= MAX_MEMBERS:
        return Declined(409, "The ring has no position left")
    position = ring.next_position
    return replace(
        ring,
        version=ring.version + 1,
        members=(*ring.members, (position, Member(addr, node_id))),
        joining=position,
        next_position=position + 1,
    )


def dismiss(ring: Membership, addr: str) -> Membership | Declined:
    """The ring without that node; the same ring if it is leaving already."""
    if ring.leaving is not None and ring.leaving[1].addr == addr:
        return ring
    found = [(position, member) for position, member in ring.members if member.addr == addr]
    if not found:
        return Declined(404, "No such node")
    position, member = found[0]
    if changing(ring) and ring.joining != position:
        return Declined(409, "Another ring change is in progress")
    rest = tuple(item for item in ring.members if item[0] != position)
    if ring.joining != position and len(rest) < ring.copies // 2 + 1:
        return Declined(409, "Too few nodes would be left")
    return replace(
        ring,
        version=ring.version + 1,
        members=rest,
        joining=None,
        leaving=(position, member),
    )


def finish(ring: Membership) -> Membership:
    """All partitions are where the ring wants them: the change is over."""
    return replace(ring, version=ring.version + 1, joining=None, leaving=None)


def placement(ring: Membership) -> dict[int, tuple[int, ...]]:
    """Partition -> its replicas, best owner first; the ring's own partition is everywhere."""
    positions = [position for position, _ in ring.members]
    placed = Ring(positions, ring.virtual_nodes, ring.copies, ring.version)
    found = dict(enumerate(placed.preference))
    found[RING_PARTITION] = tuple(positions)
    return found


def before(ring: Membership) -> Membership:
    """The members as they were before the change under way."""
    members = dict(ring.members)
    if ring.joining is not None:
        del members[ring.joining]
    if ring.leaving is not None:
        members[ring.leaving[0]] = ring.leaving[1]
    return replace(ring, members=tuple(sorted(members.items(), key=lambda item: item[0])))
