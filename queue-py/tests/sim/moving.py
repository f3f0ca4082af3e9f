"""Rings that change while everything else goes wrong: nodes join, leave, are told to go back,
die in the middle, and lose their disks. ``harness.py`` has the rest.

Three nodes found the cluster; two more stand by. An operator asks whoever it meets to let nodes in
and out. Names are machines; a position is given to one at its admission, and never again.
"""

from __future__ import annotations

from typing import Any

from sim_judge import QueueHarness, Stopping
from sim_node import SimNode, wire

from message_queue.core.messages import RING_PARTITION, Member, Membership
from message_queue.core.placement.membership import (
    Declined,
    changing,
    departed,
    nodes,
    placement,
)
from message_queue.core.replication.contract import ReplicationConfig
from message_queue.core.replication.drafts import NotOwner
from message_queue.core.replication.effects import Effects
from message_queue.core.replication.governor import Changed, Join, Leave
from message_queue.core.replication.replicator import Replicator
from testkit.sim import PERFECT, ROUGH, Disk, Faults, Host, LinkSettings, Scenario, World

FOUNDERS = 3
NOBODY = -1


class MovingNode(SimNode):
    """A node that may have to be admitted first."""

    harness: Moving

    def __init__(self, host: Host, harness: QueueHarness) -> None:
        super().__init__(host, harness)
        self.ring: Membership | None = None

    def start(self, disk: Disk) -> None:
        index = self.harness.world.names.index(self.host.name)
        founder = index if self.host.name not in self.harness.joiners else NOBODY
        self.position = disk.get("position", founder)
        self.ring = disk.get("ring")
        super().start(disk)

    def boot(self) -> None:
        if self.position == NOBODY:
            self.host.set_timer("ask", 50)
            return
        self.harness.seated(self.host.name, self.position)
        super().boot()

    def on_timer(self, name: str) -> None:
        if name == "ask":
            self.harness.world.spawn(self.harness.admission(self))
        else:
            super().on_timer(name)

    def admitted(self, position: int, ring: Membership) -> None:
        """Some member knows this node by that position."""
        if self.core is not None or self.position != NOBODY:
            return
        self.position, self.ring = position, ring
        self.host.disk.put("position", position)
        self.host.disk.put("ring", ring)
        self.host.disk.flush()
        self.host.disk.sync("boot")

    def change(self, asked: Join | Leave, reply: Any) -> None:
        if self.core is None:
            reply.resolve(("moved", None))
            return
        answer = self.core.change_ring(asked, self.host.now_ms())
        match answer:
            case NotOwner(owner):
                reply.resolve(("moved", owner))
            case Declined():
                reply.resolve(answer)
            case Changed(version, effects):
                reply.resolve(version)
                self.run(effects)

    def run(self, fx: Effects) -> None:
        super().run(fx)
        for gained in fx.gained:
            if self.harness.latest is not None and changing(self.harness.latest):
                self.host.cover("elected_during_a_change")
                if gained.partition == RING_PARTITION:
                    self.host.cover("coordinator_elected_during_a_change")
        for note in fx.notes:
            self.harness.noted(self.host.name, note.name)


class Moving(Stopping):
    """The operator, and a judge who knows which rings were committed."""

    partitions = 3
    stop_after_ms = 5_500.0

    @property
    def all_partitions(self) -> tuple[int, ...]:
        return (*range(self.partitions), RING_PARTITION)

    def __init__(self, world: World[SimNode]) -> None:
        self.seats: dict[int, str] = dict(enumerate(world.names[:FOUNDERS]))
        super().__init__(world)
        self.rings: dict[int, Membership] = {}
        self.joiners = set(world.names[FOUNDERS:])
        """Machines whose command line says --join."""
        self.founding = Membership(
            1,
            FOUNDERS,
            1 + world.seed % 7,
            self.copies(world.seed),
            tuple((p, Member(world.names[p])) for p in range(FOUNDERS)),
            next_position=FOUNDERS,
        )
        self.latest: Membership | None = None

    def copies(self, seed: int) -> int:
        return 1 if seed % 11 == 0 else 3

    def build(self, host: Host) -> SimNode:
        return MovingNode(host, self)

    def begin(self) -> None:
        super().begin()
        self.world.spawn(self.operator())

    # -- who is who ------------------------------------------------------------------------------

    def seated(self, name: str, position: int) -> None:
        assert self.seats.setdefault(position, name) == name, f"position {position} given twice"

    def position_of(self, name: str) -> int:
        node = self.world.nodes.get(name)
        if node is not None:
            return node.position
        positions = [p for p, n in self.seats.items() if n == name]
        return positions[-1] if positions else NOBODY

    def name_of(self, position: int, *, gone: bool = False) -> str | None:
        name = self.seats.get(position)
        if gone or name is None:
            return name
        node = self.world.nodes.get(name)
        return name if node is not None and node.position == position else None

    def belongs(self, node: SimNode) -> bool:
        return node.position in nodes(self.latest or self.founding)

    def config(self, node: SimNode) -> ReplicationConfig:
        assert isinstance(node, MovingNode)
        return ReplicationConfig(
            node=node.position,
            nodes=FOUNDERS,
            incarnation=node.incarnation,
            membership=node.ring or self.founding,
            place=self.place,
            fresh=node.fresh,
            seed=node.host.rng.getrandbits(63),
            wall_ms=node.host.wall_ms(),
            window_bytes=self.window_bytes,
            pauses=True,
        )

    def place(self, ring: Membership) -> dict[int, tuple[int, ...]]:
        """A few of the partitions, and the ring's own."""
        found = placement(ring)
        return {p: found[p] for p in self.all_partitions}

    def deciders(self, core: Replicator, partition: int) -> tuple[tuple[int, ...], ...]:
        tenure = core.seats[partition].tenure
        return () if tenure is None else tenure.quorum.groups

    def durable(self, partition: int) -> dict[int, list[Any]]:
        return {p: [self.shadows[name][partition]] for p, name in self.seats.items()}

    def adopted(self, node: SimNode, ring: Membership) -> None:
        assert self.rings.setdefault(ring.version, ring) == ring, "two rings of one version"
        node.host.disk.put("ring", ring)
        node.host.disk.flush()
        if self.latest is None or ring.version > self.latest.version:
            before, self.latest = self.latest or self.founding, ring
            if changing(ring):
                kind = "join" if ring.joining is not None else "leave"
                if changing(before):
                    kind = f"{kind}_turned_round"
                node.host.cover(f"{kind}_started")
            else:
                node.host.cover("join_finished" if before.joining is not None else "leave_finished")

    def noted(self, name: str, what: str) -> None:
        """A node said so. An owner is about to hand a partition to other replicas: sometimes that
        kills it."""
        rng = self.world.rng
        if what == "moving" and not self.stopped and rng.random() < 0.1:
            self.world.coverage.hit("owner_killed_in_a_move")
            self.world.clock.call_later(rng.uniform(0, 30), self.kill, name)

    def kill(self, name: str) -> None:
        self.world.crash(name)
        self.world.clock.call_later(self.world.rng.uniform(50, 800), self.world.start, name)

    # -- the operator, and nodes that want in ----------------------------------------------------

    async def operator(self) -> None:
        world, rng = self.world, self.world.rng
        while not self.stopped:
            await world.sleep_ms(rng.uniform(50, 500))
            ring = self.latest or self.founding
            members = [m.addr for _, m in ring.members]
            waiting = [n for n in world.names if n not in {m.addr for m in nodes(ring).values()}]
            asked: Join | Leave
            if changing(ring) and rng.random() < 0.8:
                continue
            if waiting and (len(members) <= FOUNDERS or rng.random() < 0.5):
                asked = Join(rng.choice(waiting))
                if not await self.renew(asked.addr):
                    continue
            else:
                asked = Leave(rng.choice(members))
            await self.ask(
                lambda node, reply, asked=asked: node.change(asked, reply),
                world.clock.now_ms + 500,
            )

    async def renew(self, name: str) -> bool:
        """A machine that left comes back as another node, with an empty disk. False: not now."""
        world = self.world
        position = self.position_of(name)
        ring = self.latest or self.founding
        if position == NOBODY or not departed(ring, position):
            return True
        if changing(ring):
            return False
        world.coverage.hit("machine_reused")
        world.crash(name)
        await world.sleep_ms(400)
        world.wipe(name)
        self.joiners.add(name)
        world.start(name)
        return True

    async def admission(self, node: MovingNode) -> None:
        """The joiner asks all whether it is in the ring by now. Only who may change the ring is
        believed: a node that has left knows rings in which this machine was somebody else."""
        name = node.host.name
        reply = self.world.promise(timeout_ms=100)

        def look(other: SimNode) -> None:
            core = other.core
            if core is None or not core.may_serve(RING_PARTITION, other.host.now_ms()):
                return
            ring = core.ring
            for position, member in ring.members:
                if member.addr == name:
                    reply.resolve((position, ring))

        for other in self.world.names:
            self.world.tell(other, look)
        found = await reply
        if isinstance(found, tuple):
            self.world.tell(name, lambda up: up.admitted(*found) if up is node else None)
        elif node.host.alive:
            node.host.set_timer("ask", 50)

    # -- clients and the end ---------------------------------------------------------------------

    def finish(self) -> None:
        """The change under way has ended; members agree; who is no replica holds nothing."""
        ring = self.latest or self.founding
        assert not changing(ring), f"the change is stuck: {ring}"
        members = dict(ring.members)
        cores = {}
        for position, member in members.items():
            core = self.world.nodes[member.addr].core
            assert core is not None
            assert core.ring == ring, f"{member.addr} missed version {ring.version}"
            cores[position] = core
        leftovers: list[str] = []
        for partition, replicas in self.place(ring).items():
            owners = [
                p
                for p, core in cores.items()
                if core.may_serve(partition, self.world.nodes[members[p].addr].host.now_ms())
            ]
            assert len(owners) == 1, f"partition {partition}: owners {owners} after healing"
            state = cores[owners[0]].state(partition)
            assert set(state.replicas or replicas) == set(replicas), "not where the ring wants it"
            assert owners[0] in replicas
            for position, core in cores.items():
                other = core.state(partition)
                if position in replicas:
                    assert other.held == state.held, f"partition {partition}: {position} differs"
                    assert other.sealed == state.sealed
                else:
                    assert not other.held, f"{position} still holds partition {partition}"
            self.ledger.gained(partition, state)
            if partition != RING_PARTITION:
                leftovers.extend(self.leftovers(partition, state))
        self.judge(leftovers)


MOVES = Scenario(
    "moves",
    nodes=("n1", "n2", "n3", "n4", "n5"),
    harness=Moving,
    duration_ms=5_000,
    settle_ms=9_000,
    faults=Faults(
        crash=4, pause=2, partition=1, isolate=2, one_way=1, power_cut=1, sync_failure=1, stop=1,
        drift_ppm=2_000, max_down=1, every_ms=(300, 2_000), down_ms=(20, 800), pause_ms=(20, 1_200),
        cut_ms=(20, 800),
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)  # fmt: skip


class Redundant(Moving):
    """What has one copy is lost with its disk."""

    def copies(self, seed: int) -> int:
        return 3


MOVES_WIPES = Scenario(
    "moves_wipes",
    nodes=("n1", "n2", "n3", "n4", "n5"),
    harness=Redundant,
    duration_ms=5_000,
    settle_ms=9_000,
    faults=Faults(crash=2, pause=1, wipe=3, max_wipes=1, max_down=1, every_ms=(200, 1_500)),
    links=(PERFECT, LinkSettings()),
    wire=wire,
)

CALM_MOVES = Scenario(
    "calm_moves",
    nodes=("n1", "n2", "n3", "n4", "n5"),
    harness=Moving,
    duration_ms=5_000,
    settle_ms=5_000,
    wire=wire,
)
