"""The node's side of ring changes: who is dialled, what is kept and told, and how clients ask."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import msgspec

from message_queue.admission import Place, keep_ring
from message_queue.clocks import monotonic_ms
from message_queue.config import Address, ConfigError
from message_queue.core.messages import MAX_NODES, Member, Membership
from message_queue.core.operations import (
    Answer,
    ChangeRing,
    certain_refusal,
    refusal,
    unknown_outcome,
)
from message_queue.core.placement.membership import Declined, changing, departed, nodes
from message_queue.core.replication.drafts import NotOwner
from message_queue.core.replication.effects import Note
from message_queue.core.replication.governor import Changed, Join, Leave

if TYPE_CHECKING:
    from message_queue.node import Node

log = logging.getLogger(__name__)

IN_FORCE_WITHIN_S = 1.6
_HEARD_WITHIN_S = 0.5
"""A heartbeat brings it to this node sooner."""
_LOOK_AGAIN_S = 0.02
LAST_WORD_S = 1.0
"""A node that has left is still heard for so long: it has to be told."""
_json = msgspec.json.Encoder()


class RingKeeper:
    """One per node. `ring` is what the replication core knows to be committed."""

    def __init__(self, node: Node, place: Place, data_dir: Path) -> None:
        self._node = node
        self._place = place
        self._data_dir = data_dir
        self.departed = False
        """This node has left the ring: it serves nobody any more."""
        self._heard: dict[int, Member] = {}
        """As nodes announce themselves; the ring stores that with the next change."""
        self._kept = place.ring.version
        self._keeping = False

    @property
    def ring(self) -> Membership:
        return self._node.replicator.ring

    def urls(self) -> dict[int, str]:
        """Where to dial the others, by position."""
        config = self._node.config
        found = {p: f"{config.scheme}://{m.addr}" for p, m in nodes(self._place.ring).items()}
        found |= {p: self._dialled(p, url) for p, url in found.items()}
        found.pop(self._place.position, None)
        return found

    def _dialled(self, position: int, url: str) -> str:
        """``--peers`` says how to reach the founders, if it is the founders' list."""
        config = self._node.config
        founders = self._place.ring.founders
        if (
            position < founders == len(config.peers)
            and self._place.position < founders
            and config.peers[self._place.position] == config.addr
        ):
            return f"{config.scheme}://{config.peers[position]}"
        return url

    # ── what the core says ──────────────────────────────────────────────────────────────────────

    def heard(self, position: int, addr: str, node_id: str) -> None:
        """A peer announced itself."""
        self._heard[position] = Member(addr, node_id)

    def adopted(self, ring: Membership) -> None:
        """Another ring is in force."""
        node = self._node
        node.spawn(self._keep())
        members = nodes(ring)
        loop = asyncio.get_running_loop()
        for position in [p for p in node.addresses if p not in members]:
            del node.addresses[position]
            loop.call_later(LAST_WORD_S, self._drop, position)
        for position, member in members.items():
            if position not in node.addresses:
                node.addresses[position] = member.addr
                node.ids.setdefault(position, member.id)
                url = f"{node.config.scheme}://{member.addr}"
                node.links.add(position, self._dialled(position, url))
        if departed(ring, node.config.position):
            self.leave("the ring's change is finished")
        node.wake()

    def _drop(self, position: int) -> None:
        if departed(self.ring, position):
            self._node.links.remove(position)

    async def _keep(self) -> None:
        """Not on the way of anything: a node that forgets a ring is told it again. One at a time,
        or an older ring might replace a later one, and two writers spoil each other's file."""
        if self._keeping:
            return
        self._keeping = True
        try:
            while (ring := self.ring).version > self._kept:
                await asyncio.to_thread(keep_ring, self._data_dir, ring)
                self._kept = ring.version
        except OSError as e:
            log.error("cannot keep the ring's version %d: %s", ring.version, e.strerror or e)
        finally:
            self._keeping = False

    def has_left(self, position: int) -> bool:
        """That node was a member, and never will be one again."""
        return departed(self.ring, position)

    def may_be_new(self, position: int) -> bool:
        """A later ring than this node knows may have given that position."""
        return self.ring.next_position <= position < MAX_NODES

    def dismissed(self, position: int) -> None:
        """A peer does not talk to this node any more, because it has left."""
        self.leave(f"node {position} says so")

    def leave(self, why: str) -> None:
        """This node is no member any more."""
        if not self.departed:
            self.departed = True
            log.warning("this node has left the cluster (%s): it can be stopped", why)
            self._node.events.publish("departed", detail=why)
            self._node.wake()
            loop = asyncio.get_running_loop()
            loop.call_later(LAST_WORD_S, self._hang_up)

    def _hang_up(self) -> None:
        """Nobody talks to this node any more."""
        for position in nodes(self._place.ring) | nodes(self.ring):
            self._node.links.remove(position)

    def told(self, note: Note) -> None:
        """Progress, for the log and /events."""
        state = _STATES.get(note.name)
        if state is None:
            return
        shown = self.progress() or {}
        log.info("ring %d: %s %s", self.ring.version, state, note.detail)
        details = {("change" if key == "kind" else key): value for key, value in shown.items()}
        self._node.events.publish("ring_change", state=state, version=self.ring.version, **details)

    # ── what clients see and ask ────────────────────────────────────────────────────────────────

    def progress(self) -> dict[str, object] | None:
        """The change under way, as /ring and /events show it."""
        ring = self.ring
        if not changing(ring):
            return None
        moved, total = self._node.replicator.progress
        if ring.leaving is not None:
            position, member = ring.leaving
            kind = "leave"
        else:
            kind, position = "join", ring.joining if ring.joining is not None else -1
            member = dict(ring.members)[position]
        return {
            "kind": kind,
            "position": position,
            "addr": member.addr,
            "moved": moved,
            "partitions": total,
        }

    def described(self, owned: dict[int, int]) -> list[dict[str, object]]:
        """The nodes, as /ring lists them. ``owned``: position -> partitions."""
        ring, node = self.ring, self._node
        found: list[dict[str, object]] = []
        for position, member in sorted(nodes(ring).items()):
            state = "member"
            if position == ring.joining:
                state = "joining"
            elif ring.leaving is not None and position == ring.leaving[0]:
                state = "leaving"
            found.append(
                {
                    "position": position,
                    "id": node.ids.get(position) or member.id or None,
                    "addr": node.addresses.get(position, member.addr),
                    "state": state,
                    "owned": owned.get(position, 0),
                }
            )
        return found

    async def change(self, op: ChangeRing) -> Answer | None:
        """As the owner of the ring's partition; None if this node is not."""
        asked = Join(op.addr, op.id) if op.join else Leave(op.addr)
        node = self._node
        done = node.replicator.change_ring(asked, monotonic_ms(), self._heard)
        match done:
            case NotOwner():
                return None
            case Declined(status, error):
                details = {"change": self.progress()} if status == 409 else {}
                return refusal(status, error, 1 if status == 503 else 0, **details)
            case Changed(version, effects):
                node.apply(effects)
                if not await self._in_force(version):
                    return unknown_outcome("No quorum")
                return self._accepted(op)
            case _:
                assert_never(done)

    async def heard_of(self, answer: Answer, within_s: float = _HEARD_WITHIN_S) -> bool:
        """Wait for the ring that an accepted change was answered with: whoever was told of a change
        here finds it in this node's /ring."""
        version = msgspec.json.decode(answer.body, type=dict[str, object])["version"]
        return isinstance(version, int) and await self._in_force(version, within_s)

    async def _in_force(self, version: int, within_s: float = IN_FORCE_WITHIN_S) -> bool:
        """That version, or a later one, is known here to be committed."""
        until_s = asyncio.get_running_loop().time() + within_s
        while self.ring.version < version:
            if asyncio.get_running_loop().time() >= until_s:
                return False
            await self._node.changes(_LOOK_AGAIN_S)
        return True

    def _accepted(self, op: ChangeRing) -> Answer:
        ring = self.ring
        status, code, position = "left", 200, None
        for at, member in nodes(ring).items():
            if member.addr == op.addr:
                position = at
                if ring.leaving is not None and ring.leaving[0] == at:
                    status, code = "leaving", 202
                elif at == ring.joining:
                    status, code = "joining", 202
                else:
                    status = "member"
        body = {"status": status, "addr": op.addr, "position": position, "version": ring.version}
        return Answer(code, _json.encode(body))

    async def admit(self, addr: str, node_id: str) -> Place | Answer:
        """A node asks to be let in (`POST /peer/join`)."""
        try:
            addr = str(Address.parse(addr, "addr"))
        except ConfigError as e:
            return refusal(400, str(e), field="addr")
        answer = await self._node.router.ask(ChangeRing(True, addr, node_id))
        if answer.status not in (200, 202):
            return answer
        if not await self.heard_of(answer, IN_FORCE_WITHIN_S):
            return certain_refusal("The ring has not arrived here yet")
        for position, member in self.ring.members:
            if member.addr == addr:
                return Place(position, self._place.cluster, self.ring)
        return certain_refusal("It has left again")


_STATES = {
    "ring_change_started": "started",
    "ring_moved": "moved",
    "ring_change_finished": "finished",
}
