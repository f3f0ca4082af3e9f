"""Clients that produce, consume and ack, and a judge outside: what must hold after every step, and
the end."""

from __future__ import annotations

from typing import Any

from sim_node import VISIBILITY_MS, SimNode

from message_queue.core.invariants import Ledger, check_node, check_owners, check_state
from message_queue.core.messages import (
    Membership,
)
from message_queue.core.replication.config import NEVER_MS
from message_queue.core.replication.contract import (
    ReplicationConfig,
)
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from testkit.checkers import total_queue
from testkit.sim import (
    TIMED_OUT,
    Harness,
    Host,
    World,
)

DRIFT = 0.002
CLOCK_SLACK_MS = 25
"""Cluster time may jump ahead by so much untold, and drift."""


class QueueHarness(Harness[SimNode]):
    """Clients, invariants and the final judgement."""

    partitions = 2
    causes: frozenset[str] | None = None
    """What may explain a second delivery; None: they bear no receipts here, and are counted."""
    window_bytes = 2_000
    genesis_ms = NEVER_MS

    @property
    def all_partitions(self) -> tuple[int, ...]:
        return tuple(range(self.partitions))

    def __init__(self, world: World[SimNode]) -> None:
        super().__init__(world)
        n = len(world.names)
        copies = min(3, n) if n != 5 else 5
        self.preference = tuple(
            tuple((p + i) % n for i in range(copies)) for p in range(self.partitions)
        )
        self.shadows: dict[str, dict[int, PartitionState]] = {
            name: {p: PartitionState(p) for p in self.all_partitions} for name in world.names
        }
        self.ledger = Ledger()
        self.rotten: dict[tuple[str, int], list[PartitionState]] = {}
        self.delivered: set[tuple[int, int, int]] = set()
        self.stopped = False
        self.stopped_at = (0.0, 0)

    def build(self, host: Host) -> SimNode:
        return SimNode(host, self)

    def position_of(self, name: str) -> int:
        return self.world.names.index(name)

    def name_of(self, position: int, *, gone: bool = False) -> str | None:
        return self.world.names[position]

    def config(self, node: SimNode) -> ReplicationConfig:
        return ReplicationConfig(
            node=node.position,
            nodes=len(self.world.names),
            incarnation=node.incarnation,
            preference=self.preference,
            fresh=node.fresh,
            genesis_ms=self.genesis_ms,
            seed=node.host.rng.getrandbits(63),
            wall_ms=node.host.wall_ms(),
            window_bytes=self.window_bytes,
            pauses=True,
        )

    def adopted(self, node: SimNode, ring: Membership) -> None:
        """A node knows of a committed ring."""

    def deciders(self, core: Replicator, partition: int) -> tuple[tuple[int, ...], ...]:
        """The replica sets of which each needs a majority."""
        return (self.preference[partition],)

    def durable(self, partition: int) -> dict[int, list[PartitionState]]:
        names = self.world.names
        return {
            node: [
                self.shadows[names[node]][partition],
                *self.rotten.get((names[node], partition), []),
            ]
            for node in self.preference[partition]
        }

    def begin(self) -> None:
        for c in range(3):
            self.world.spawn(self.client(f"c{c}"))

    def check(self, name: str) -> None:
        node = self.world.nodes.get(name)
        if node is not None and node.core is not None:
            check_node(node.core)
            for partition, seat in node.core.seats.items():
                if node.core.may_serve(partition, node.host.now_ms()):
                    self.ledger.check_held(partition, seat.state)
        if self.world.events % 16 == 0:
            if node is not None and node.core is not None:
                for partition, seat in node.core.seats.items():
                    check_state(seat.state)
                    for dot in seat.state.held.dots():
                        assert (partition, *dot) in node.bodies, "held without a body"
            check_owners(
                (other.core, other.host.now_ms())
                for other in self.world.nodes.values()
                if other.core is not None
            )

    async def ask(self, action: Any, deadline_ms: float) -> Any:
        """Follows the owner until an answer or the deadline; ("moved", …) if nobody took it."""
        world = self.world
        target = world.rng.choice(world.names)
        answer: Any = ("moved", None)
        while world.clock.now_ms < deadline_ms:
            reply = world.promise(timeout_ms=max(deadline_ms - world.clock.now_ms, 1))
            world.tell(target, lambda node, reply=reply: action(node, reply))
            answer = await reply
            if not (isinstance(answer, tuple) and answer[0] == "moved"):
                return answer
            owner = answer[1]
            known = self.name_of(owner) if owner is not None else None
            target = known if known is not None else world.rng.choice(world.names)
            await world.sleep_ms(5 if owner is not None else 25)
        return answer

    async def client(self, me: str) -> None:
        world, rng = self.world, self.world.rng
        count = 0
        while not self.stopped:
            partition = rng.randrange(self.partitions)
            deadline_ms = world.clock.now_ms + 1_500
            if rng.random() < 0.45:
                bodies = tuple(f"{me}/{count + i}" for i in range(rng.choice((1, 1, 3))))
                count += len(bodies)
                await self.produce(me, partition, bodies, deadline_ms)
            else:
                for message in await self.consume(me, partition, deadline_ms):
                    if rng.random() < 0.85:  # else: a consumer that dies
                        await self.settle(me, partition, message["id"], deadline_ms + 1_500)
            await world.sleep_ms(rng.uniform(0, 30))

    async def produce(
        self, me: str, partition: int, bodies: tuple[str, ...], deadline_ms: float
    ) -> None:
        history, batch = self.world.history, {"batch": True}
        operation = history.invoke(me, "produce", key=f"q{partition}", argument=list(bodies))
        answer = await self.ask(
            lambda node, reply: node.produce(partition, bodies, reply), deadline_ms
        )
        if isinstance(answer, list):
            history.ok(operation, answer, batch)
        elif isinstance(answer, tuple):
            history.fail(operation, info=batch)
        else:
            self.world.coverage.hit("produce_unknown")
            history.unknown(operation, batch)

    async def consume(self, me: str, partition: int, deadline_ms: float) -> list[dict[str, Any]]:
        history = self.world.history
        operation = history.invoke(
            me, "consume", key=f"q{partition}", argument={"visibility_ms": VISIBILITY_MS}
        )
        answer = await self.ask(lambda node, reply: node.consume(partition, 2, reply), deadline_ms)
        if isinstance(answer, list):
            history.ok(operation, answer)
            return answer
        if answer is TIMED_OUT:
            history.unknown(operation)
        else:
            history.fail(operation)
        return []

    async def settle(self, me: str, partition: int, message_id: str, deadline_ms: float) -> None:
        world, history = self.world, self.world.history
        _, epoch, seq = (int(part) for part in message_id.split("-"))
        operation = history.invoke(me, "ack", key=f"q{partition}", argument=message_id)
        answer = await self.ask(
            lambda node, reply: node.ack(partition, (epoch, seq), reply), deadline_ms
        )
        if answer == "acknowledged":
            history.ok(operation, answer)
        elif isinstance(answer, tuple):
            history.fail(operation)
        else:
            world.coverage.hit("ack_unknown")
            history.unknown(operation)

    def finish(self) -> None:
        """Everything healed: one owner each, all replicas equal, and the history adds up."""
        leftovers: list[str] = []
        for partition, nodes in enumerate(self.preference):
            cores = [self.world.nodes[self.world.names[node]].core for node in nodes]
            assert all(core is not None for core in cores)
            owners = [
                node
                for node, core in zip(nodes, cores, strict=True)
                if core is not None
                and core.may_serve(
                    partition, self.world.nodes[self.world.names[node]].host.now_ms()
                )
            ]
            assert len(owners) == 1, f"partition {partition}: owners {owners} after healing"
            state = cores[nodes.index(owners[0])].state(partition)
            for node, core in zip(nodes, cores, strict=True):
                other = core.state(partition)
                assert other.held == state.held, f"partition {partition}: node {node} differs"
                assert other.sealed == state.sealed
            self.ledger.gained(partition, state)
            leftovers.extend(self.leftovers(partition, state))
        self.judge(leftovers)

    def judge(self, leftovers: list[str]) -> None:
        """The history adds up, with these messages still stored, and time went on as it should."""
        self.check_time()
        verdict = total_queue.check(
            self.world.history, leftovers=leftovers, causes=self.causes, slack_ms=CLOCK_SLACK_MS
        )
        verdict.require()
        for cause in total_queue.CAUSES & verdict.counts.keys():
            self.world.coverage.hit(f"again: {cause}", verdict.counts[cause])
        self.world.coverage.hit(
            "acked", sum(op.kind == "ack" and op.status == "ok" for op in self.world.history)
        )
        self.world.coverage.hit(
            "produced", sum(op.kind == "produce" and op.status == "ok" for op in self.world.history)
        )

    def belongs(self, node: SimNode) -> bool:
        """It is heard by the others."""
        return True

    def times(self) -> tuple[float, int]:
        """Now, and the latest cluster time."""
        nodes = [node for node in self.world.nodes.values() if node.core and self.belongs(node)]
        known = [node.core.cluster_ms(node.host.now_ms()) for node in nodes if node.core]
        return self.world.clock.now_ms, max(known, default=0)

    def check_time(self) -> None:
        """From when all was healed and the clients stopped: no faster than any clock, no slower."""
        (began_ms, before_ms), (ended_ms, after_ms) = self.stopped_at, self.times()
        if before_ms:
            went_ms = ended_ms - began_ms
            off_ms = after_ms - before_ms - went_ms
            assert abs(off_ms) <= went_ms * DRIFT + 2, f"{off_ms} ms wrong after {went_ms} ms"

    def leftovers(self, partition: int, state: PartitionState) -> list[str]:
        """The ids of the messages still stored."""
        return [f"{partition}-{epoch}-{seq}" for epoch, seq in state.held.dots()]

    def stop_clients(self) -> None:
        self.stopped = True
        self.stopped_at = self.times()


class Stopping(QueueHarness):
    """Clients stop some time before the end, so that everything in flight is settled."""

    stop_after_ms = 4_500.0

    def begin(self) -> None:
        super().begin()
        self.world.clock.call_later(self.stop_after_ms, self.stop_clients)
