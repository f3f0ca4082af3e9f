"""The ring's own partition: its owner takes changes in, one at a time, and ends them.

``RING_PARTITION`` is replicated on all members like any partition, so a change is committed by a
majority of the members before it, and survives what messages survive. Everybody else hears of a
committed ring by gossip: heartbeats carry its version, and who knows a later one sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct

from message_queue.core.messages import RING_PARTITION, Member, Membership, RingNews
from message_queue.core.placement.membership import (
    Declined,
    admit,
    changing,
    departed,
    dismiss,
    finish,
    named,
    nodes,
)
from message_queue.core.replication.desk import Desk
from message_queue.core.replication.drafts import NotOwner, SetDraft
from message_queue.core.replication.effects import Effects
from message_queue.core.replication.offices import Offices
from message_queue.core.replication.peers import Peer
from message_queue.core.replication.seat import Seat
from message_queue.core.replication.validation import plausible_ring

RING_KEY = "ring"
_decoder = msgspec.msgpack.Decoder(Membership)
_encoder = msgspec.msgpack.Encoder()


class Join(Struct, frozen=True):
    """Make that address a member. ``id``: if the node itself asks."""

    addr: str
    id: str = ""


class Leave(Struct, frozen=True):
    """Make that member hand over all it has, and be none."""

    addr: str


class Changed(Struct, frozen=True):
    """The ring is (or, when that version is in force, will be) as asked."""

    version: int
    effects: Effects


RingAnswer = Changed | Declined | NotOwner


class Governor:
    """Invariant: ``desk.ring`` is committed, and its version only grows."""

    __slots__ = ("_desk", "_offices", "_owned_by", "_peers", "_pending", "_seats")

    def __init__(
        self,
        desk: Desk,
        seats: dict[int, Seat],
        peers: dict[int, Peer],
        offices: Offices,
        owned_by: Callable[[int], int | None],
    ) -> None:
        """``owned_by``: partition -> the node that owns it, as known here."""
        self._desk = desk
        self._seats = seats
        self._peers = peers
        self._offices = offices
        self._owned_by = owned_by
        self._pending: tuple[int, int, Membership] | None = None
        """(epoch, seq, ring) proposed and not committed."""

    # -- what clients ask ------------------------------------------------------------------------

    def change(
        self, asked: Join | Leave, now_ms: int, heard: Mapping[int, Member]
    ) -> Declined | Membership:
        """The ring that was asked for; the present one if it is so already. Proposed, not yet
        committed. The caller checked that this node owns the ring's partition. ``heard``: nodes as
        they announce themselves."""
        ring = named(self._desk.ring, heard)
        if isinstance(asked, Join):
            wanted = admit(ring, asked.addr, asked.id)
        else:
            wanted = dismiss(ring, asked.addr)
        if isinstance(wanted, Declined) or wanted is ring:
            return wanted
        if self._pending is not None:
            return Declined(409, "Another ring change is in progress")
        if not changing(ring) and any(self._owned_by(p) is None for p in self._desk.preference):
            return Declined(503, "Not every partition has an owner")
        if wanted.leaving is not None and not changing(ring) and not self._viable(wanted, now_ms):
            return Declined(409, "Too few of the remaining nodes are up")
        self._propose(wanted, now_ms)
        return wanted

    def _viable(self, ring: Membership, now_ms: int) -> bool:
        """Each partition would have a majority that is up."""
        up = {n for n in dict(ring.members) if n == self._desk.me or self._offices.is_up(n, now_ms)}
        placed = self._desk.config.placed(ring)
        return all(sum(n in up for n in r) > len(r) // 2 for r in placed.values())

    def _propose(self, ring: Membership, now_ms: int) -> None:
        tenure = self._seats[RING_PARTITION].tenure
        if tenure is not None:
            seq = tenure.propose((SetDraft(RING_KEY, _encoder.encode(ring)),), now_ms)
            self._pending = (tenure.epoch, seq, ring)

    # -- what becomes of it ----------------------------------------------------------------------

    def tick(self, serving: bool, now_ms: int) -> None:
        """``serving``: this node may act for the ring's partition. Ends a change that is done."""
        desk = self._desk
        if not serving or self._pending is not None or not changing(desk.ring):
            return
        version = desk.ring.version
        if all(desk.in_place.get(p) == version for p in desk.preference):
            self._propose(finish(desk.ring), now_ms)

    def after(self, fx: Effects) -> None:
        """Looks at what a step did to the ring's partition."""
        for done in fx.committed:
            if done.partition == RING_PARTITION and self._pending is not None:
                epoch, seq, ring = self._pending
                if epoch == done.epoch and seq <= done.upto:
                    self._pending = None
                    self.adopt(ring)
        for lost in fx.lost:
            if lost.partition == RING_PARTITION:
                self._pending = None
        for gained in fx.gained:
            if gained.partition == RING_PARTITION:
                self._pending = None
                # What an owner begins with is on a majority: it is committed.
                state = self._seats[RING_PARTITION].state
                stored = state.records.settings.get(RING_KEY)
                if stored is not None and stored.value:
                    self._restore(stored.value)

    def _restore(self, stored: bytes) -> None:
        """A ring that came with somebody's seal: believed if it can be one."""
        try:
            ring = _decoder.decode(stored)
        except msgspec.MsgspecError as e:
            self._desk.note("implausible", RING_PARTITION, 0, f"stored ring: {e}")
            return
        if plausible_ring(ring):
            self.adopt(ring)
        else:
            self._desk.note("implausible", RING_PARTITION, ring.version, "stored ring")

    def adopt(self, ring: Membership) -> None:
        """A committed ring, from wherever."""
        desk = self._desk
        old = desk.ring
        if ring.version <= old.version:
            return
        everybody = nodes(ring)
        for node in [n for n in self._peers if n not in everybody]:
            desk.send(node, RingNews(ring))  # its last word: it has left
            del self._peers[node]
        for node in everybody:
            if node != desk.me and node not in self._peers:
                self._peers[node] = Peer()
        desk.adopt(ring)
        desk.fx.ring = ring
        if changing(ring):
            kind = "joins" if ring.joining is not None else "leaves"
            position = ring.joining if ring.leaving is None else ring.leaving[0]
            detail = f"node {position} {kind}, {len(desk.moved)} partitions move"
            desk.note("ring_change_started", RING_PARTITION, ring.version, detail)
        else:
            desk.note("ring_change_finished", RING_PARTITION, ring.version)
        if departed(ring, desk.me):
            self._offices.leaving = True
            desk.note("departed", RING_PARTITION, ring.version)
