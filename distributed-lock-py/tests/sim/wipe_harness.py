"""Disks that are lost: a node that comes back empty is nobody until it was removed and added again.

Messages carry their sender's store id, and each node judges them by its `PeerBook`, as links do
when they greet. The operator wipes a disk, then removes and adds its node, while everything else
goes on failing.
"""

from __future__ import annotations

from typing import Any

import msgspec
from raft_node import RaftNode, number, small_limits
from register_harness import RegisterHarness, RegisterMachine, scenario

from lock_manager.core.peer_book import PROTOCOL, Hello, PeerBook, PeerIdentity
from lock_manager.core.raft import (
    ConfigurationChanged,
    Member,
    Message,
    Note,
    Refused,
    Restored,
    Role,
)
from testkit.sim import Faults, Host, World


class Signed(msgspec.Struct, frozen=True):
    """A message on a link whose greeting gave this store id."""

    store_id: str
    message: Message


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Signed).decode


class IdentifiedNode(RaftNode):
    """A node that knows its peers by name and store."""

    def __init__(self, host: Host, lives: dict[int, int], *arguments: Any, **settings: Any) -> None:
        super().__init__(host, *arguments, **settings)
        self._lives = lives
        self.hello: Hello
        self.book: PeerBook

    def _prepare(self, restored: Restored) -> None:
        before = self.checker.disks.get(self._me)
        empty = restored == Restored() and self.host.disk.get("store") is None
        if before is not None and empty and before.restored != Restored():
            self._lives[self._me] += 1
            self.checker.wiped(self._me)
            self.host.cover("wiped disks")
        self.hello = hello_of(self._me, self._lives[self._me])
        self.host.disk.put("store", self.hello.store_id)
        bound = {peer.position: peer for _, peer in self.host.disk.items("peer:")}
        self.book = PeerBook(self.hello, bound, self._bind)

    def _bind(self, peer: PeerIdentity) -> None:
        self.host.disk.put(f"peer:{peer.position}", peer)

    def start(self, disk: Any) -> None:
        super().start(disk)
        self.book.follow(self.core.configuration)

    def on_message(self, source: str, message: Signed) -> None:  # type: ignore[override]
        position = number(source)
        greeting = msgspec.structs.replace(hello_of(position, 0), store_id=message.store_id)
        if self.book.judge(greeting) is not None:
            self.host.cover("strangers refused")
            return
        super().on_message(source, message.message)

    def _send(self, message: Message) -> None:
        self.host.send(f"n{message.to}", Signed(self.hello.store_id, message))

    def on_timer(self, name: str) -> None:
        if self.core.role is Role.LEADER and (member := self.book.unrecorded()) is not None:
            self.core.update(member)
        super().on_timer(name)

    def _note(self, note: Note) -> None:
        super()._note(note)
        if isinstance(note, ConfigurationChanged):
            self.book.follow(note.configuration)

    @property
    def knows_everybody(self) -> bool:
        """Every member's store is in the configuration, and that is committed."""
        core = self.core
        return core.commit_index >= core.configuration_index and all(
            member.store_id for member in core.configuration.members
        )


def hello_of(position: int, life: int) -> Hello:
    return Hello(
        protocol=PROTOCOL,
        position=position,
        node_id=f"node{position}",
        store_id=f"store {position}, life {life}",
    )


class WipeHarness(RegisterHarness):
    """One disk is lost, at any moment after the nodes have met."""

    operator_every_ms = 60.0

    def __init__(self, world: World[Any]) -> None:
        super().__init__(world)
        self.lives = dict.fromkeys(self.voters, 0)
        self.to_replace: int | None = None
        self.removed = False
        self.wipes = 0

    def build(self, host: Host) -> RaftNode:
        return IdentifiedNode(
            host,
            self.lives,
            small_limits(host, self.members),
            self.checker,
            RegisterMachine(),
            snapshot_every=host.rng.choice([0, 7, 25]),
        )

    async def operator(self) -> None:
        world = self.world
        for _ in range(400):
            await world.sleep_ms(world.rng.uniform(0.3, 1.7) * self.operator_every_ms)
            nodes = world.nodes
            if self.to_replace is None:
                met = len(nodes) == len(world.names) and all(
                    node.knows_everybody for node in nodes.values()
                )
                if met and self.wipes < 2 and world.rng.random() < 0.3:
                    await self.lose_a_disk()
                continue
            leader = self.probable_leader()
            if leader is not None:
                world.tell(leader, self.replace)

    async def lose_a_disk(self) -> None:
        world = self.world
        name = world.rng.choice(world.names)
        self.wipes += 1
        self.to_replace, self.removed = number(name), False
        world.wipe(name)
        await world.sleep_ms(world.rng.uniform(0, 500))
        world.start(name)
        await world.sleep_ms(world.rng.uniform(0, 600))

    def replace(self, node: IdentifiedNode) -> None:
        """Removes the node whose disk is lost; once that is committed, adds it with its new
        store."""
        core, other = node.core, self.to_replace
        if other is None or core.role is not Role.LEADER:
            return
        present = core.configuration.get(other)
        fresh = hello_of(other, self.lives[other]).store_id
        if present is None:
            refused = core.add(Member(node_id=other))
        elif present.store_id != fresh and not (self.removed and not present.store_id):
            refused = core.remove(other)
            self.removed = self.removed or not isinstance(refused, Refused)
        elif present.voter and core.commit_index >= core.configuration_index:
            self.to_replace = None
            self.world.coverage.hit("disks replaced")
            return
        else:
            return
        self.world.coverage.hit(f"replacing: {getattr(refused, 'reason', 'taken')}")
        node.flush()

    def finish(self) -> None:
        # Whoever is not added again yet is refused everywhere, and is not judged.
        self.outcasts = {self.to_replace} if self.to_replace is not None else set()
        super().finish()


WIPE = scenario(
    "wipe",
    WipeHarness,
    Faults(
        crash=3,
        partition=2,
        one_way=1,
        every_ms=(100, 900),
        down_ms=(20, 500),
        cut_ms=(20, 600),
        max_down=1,
    ),
    duration_ms=3_500,
    settle_ms=5_000,
    wire=lambda signed: _decode(_encode(signed)),
)
