"""Who may speak for which position: names and stores, bound at first contact (guarantee 10).

A position in --peers is a Raft identity. The first node that answers at a position binds its
`--id` and its store's random id to it, here durably and, as soon as there is a leader, in the
replicated configuration (which overrides what this node saw itself). A node that comes back with
another store has lost its disk: what it acknowledged and whom it voted for is gone, so it must not
be counted. It is refused until it was removed and added again, as a learner that catches up before
it votes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from lock_manager.core.raft import Configuration, Member

PROTOCOL = 1


class PeerIdentity(msgspec.Struct, frozen=True):
    """Who answered at a position when it was met first."""

    position: int
    node_id: str
    store_id: str


class Hello(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The first frame in both directions of a link: who speaks."""

    protocol: int
    position: int
    node_id: str
    store_id: str


class PeerBook:
    """This node's knowledge of the others. `bind` stores a binding durably, in order with Raft's
    writes."""

    def __init__(
        self,
        me: Hello,
        bound: Mapping[int, PeerIdentity],
        bind: Callable[[PeerIdentity], None],
    ) -> None:
        self._me = me
        self._bound = dict(bound)
        self._bind = bind
        self._configuration: Configuration | None = None

    def follow(self, configuration: Configuration) -> None:
        """Another configuration is in force. A member that was not in the one before may come with
        a new store: what was bound to its position is forgotten."""
        before = self._configuration
        self._configuration = configuration
        if before is None:
            return
        for member in configuration.members:
            known = self._bound.get(member.node_id)
            if before.get(member.node_id) is None and known is not None:
                self._remember(PeerIdentity(member.node_id, "", ""))

    def judge(self, hello: Hello) -> str | None:
        """Why the node that says `hello` is not who it should be; None if it is. Binds a new
        one."""
        position = hello.position
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this node {PROTOCOL}"
        if position == self._me.position:
            return f"it claims this node's own position {position}"
        if hello.node_id == self._me.node_id or not hello.node_id or not hello.store_id:
            return f"it calls itself {hello.node_id!r}"
        seen = self._bound.get(position)
        expected = self.expected(position)
        if expected is None:
            return f"position {position} is not a member of this cluster"
        if expected.node_id not in ("", hello.node_id):
            return f"position {position} is node {expected.node_id!r}, not {hello.node_id!r}"
        if expected.store_id not in ("", hello.store_id):
            return (
                f"node {hello.node_id!r} comes with another store than before: its disk was lost; "
                "remove it and add it again"
            )
        for other in self._bound.values():
            if other.position != position and other.node_id == hello.node_id:
                return f"node {hello.node_id!r} is at position {other.position}, not {position}"
        found = PeerIdentity(position, hello.node_id, hello.store_id)
        if seen != found:
            self._remember(found)
        return None

    def expected(self, position: int) -> PeerIdentity | None:
        """Who is at a position, empty strings for what is not known yet; None: not a member, and
        never met as one."""
        seen = self._bound.get(position)
        member = self._configuration.get(position) if self._configuration is not None else None
        if member is None:
            waits_to_be_added = self._configuration is None or not self._configuration.members
            return seen or (PeerIdentity(position, "", "") if waits_to_be_added else None)
        return PeerIdentity(
            position,
            member.name or (seen.node_id if seen is not None else ""),
            member.store_id or (seen.store_id if seen is not None else ""),
        )

    def unrecorded(self) -> Member | None:
        """A member whose name or store the configuration does not say though it was met (this node
        included), as it should be: the leader proposes it as an update."""
        for member in self._configuration.members if self._configuration is not None else ():
            if member.name and member.store_id:
                continue
            if member.node_id == self._me.position:
                node_id, store_id = self._me.node_id, self._me.store_id
            elif (seen := self._bound.get(member.node_id)) is not None and seen.store_id:
                node_id, store_id = seen.node_id, seen.store_id
            else:
                continue
            return msgspec.structs.replace(member, name=node_id, store_id=store_id)
        return None

    def _remember(self, peer: PeerIdentity) -> None:
        self._bound[peer.position] = peer
        self._bind(peer)
