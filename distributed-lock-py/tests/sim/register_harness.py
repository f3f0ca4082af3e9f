"""Raft alone under every fault: a replicated register that clients write, swap and read.

The smallest machine that shows every lie of the log below it: a lost or doubled or reordered
entry, a stale read. The lock machine has its own harness beside this one.
"""

from __future__ import annotations

from typing import Any

import msgspec
from raft_node import LOST, NOT_LEADER, UNKNOWN, RaftNode, number, small_limits

from lock_manager.core.invariants import RaftChecker, check_logs_match
from lock_manager.core.raft import Configuration, Entry, Member, Message, Role
from testkit.checkers import linearizable
from testkit.sim import (
    PERFECT,
    ROUGH,
    TIMED_OUT,
    DiskSettings,
    Faults,
    Harness,
    Host,
    LinkSettings,
    Scenario,
    World,
)

KEYS = ("a", "b")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


def through_the_wire(message: Message) -> Message:
    return _decode(_encode(message))


class RegisterMachine:
    """Keys with integer values: ("write", key, value) or ("cas", key, (expected, value))."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def apply(self, entry: Entry) -> Any:
        kind, key, argument = msgspec.msgpack.decode(entry.payload)
        if kind == "cas":
            expected, value = argument
            if self.values.get(key) != expected:
                return False
            self.values[key] = value
            return True
        self.values[key] = argument
        return None

    def snapshot(self) -> bytes:
        return _encode(self.values)

    def restore(self, data: bytes) -> None:
        self.values = msgspec.msgpack.decode(data)


class RegisterHarness(Harness[RaftNode]):
    """Clients on a cluster whose every node, disk and link may fail."""

    voters = (1, 2, 3)
    operator_every_ms = 0.0  # membership changes and transfers, when positive

    def __init__(self, world: World[RaftNode]) -> None:
        super().__init__(world)
        self.outcasts: set[int] = set()  # members that nobody listens to
        self.checker = RaftChecker()
        self.members = Configuration(tuple(Member(node_id=node) for node in self.voters))

    def build(self, host: Host) -> RaftNode:
        bootstrap = self.members if number(host.name) in self.voters else Configuration()
        return RaftNode(
            host,
            small_limits(host, bootstrap),
            self.checker,
            RegisterMachine(),
            snapshot_every=host.rng.choice([0, 7, 25]),
            keep_entries=host.rng.choice([0, 5]),
        )

    def begin(self) -> None:
        for client in range(3):
            self.world.spawn(self.client(f"c{client}"))
        if self.operator_every_ms:
            self.world.spawn(self.operator())

    # ------------------------------------------------------------------------------------- clients

    async def client(self, me: str) -> None:
        world = self.world
        rng, history = world.rng, world.history
        target = rng.choice(world.names)
        for step in range(60):
            key = rng.choice(KEYS)
            value = step * 10 + int(me[1:]) + 1
            kind = rng.choice(["write", "write", "cas", "read", "read"])
            argument: Any = value
            if kind == "cas":
                argument = (rng.choice([None, value - 10, rng.randrange(1, 300)]), value)
            operation = history.invoke(me, kind, key, None if kind == "read" else argument)
            reply = world.promise(timeout_ms=700)
            if kind == "read":
                world.tell(
                    target,
                    lambda node, key=key, reply=reply: node.read(
                        lambda: node.machine.values.get(key), reply.resolve
                    ),
                )
            else:
                payload = _encode((kind, key, argument))
                world.tell(
                    target,
                    lambda node, payload=payload, reply=reply: node.propose(payload, reply.resolve),
                )
            answer = await reply
            if answer is NOT_LEADER or answer is LOST:
                history.fail(operation)
                world.coverage.hit(f"answers: {answer}")
            elif answer is TIMED_OUT or answer is UNKNOWN:
                history.unknown(operation)
                world.coverage.hit("unknown outcomes")
            else:
                history.ok(operation, answer)
                world.coverage.hit("operations")
            if answer in (NOT_LEADER, LOST, UNKNOWN) or answer is TIMED_OUT:
                target = self.probable_leader() or rng.choice(world.names)
                await world.sleep_ms(rng.uniform(1, 30))
            elif rng.random() < 0.1:
                target = rng.choice(world.names)
            await world.sleep_ms(rng.uniform(0, 25))

    def probable_leader(self) -> str | None:
        """One of those who believe that they lead (there may be several, and they may be wrong)."""
        leaders = [
            name
            for name in sorted(self.world.nodes)
            if self.world.nodes[name].core.role is Role.LEADER
        ]
        return self.world.rng.choice(leaders) if leaders else None

    async def operator(self) -> None:
        """Transfers leadership, adds and removes nodes, at any moment."""
        world = self.world
        rng = world.rng
        for _ in range(30):
            await world.sleep_ms(rng.uniform(0.3, 1.7) * self.operator_every_ms)
            leader = self.probable_leader()
            if leader is None:
                continue
            other = number(rng.choice(world.names))
            action = rng.choice(["transfer", "add", "add", "remove"])
            world.tell(leader, lambda node, a=action, o=other: self.operate(node, a, o))

    def operate(self, node: RaftNode, action: str, other: int) -> None:
        core = node.core
        match action:
            case "transfer":
                refused = core.transfer(other, node.host.now_ms())
            case "add":
                refused = core.add(Member(node_id=other, voter=self.world.rng.random() < 0.8))
            case _:
                if len(core.configuration.voters) <= 2:
                    return
                refused = core.remove(other)
        self.world.coverage.hit(f"{action}: {getattr(refused, 'reason', 'taken')}")
        node.flush()

    # --------------------------------------------------------------------------------------- judge

    def finish(self) -> None:
        nodes = self.world.nodes
        check_logs_match({number(name): node.core for name, node in nodes.items()})
        leaders = [node for node in nodes.values() if node.core.role is Role.LEADER]
        assert leaders, "nobody leads though all is well"
        leader = max(leaders, key=lambda node: node.core.term)
        for member in leader.core.configuration.members:
            if member.node_id in self.outcasts:
                continue
            node = nodes[f"n{member.node_id}"]
            assert node.core.leader_id == leader.core.leader_id, f"n{member.node_id} strays"
            assert node.core.commit_index == leader.core.commit_index, (
                f"n{member.node_id} lags behind: {node.core.commit_index}"
            )
            assert node.machine.snapshot() == leader.machine.snapshot(), "machines differ"
        linearizable.check(self.world.history, linearizable.Register()).require()


class MembershipHarness(RegisterHarness):
    """Five nodes, three of them members at first; an operator who does not wait."""

    operator_every_ms = 150.0


def scenario(name: str, harness: type[Harness[Any]], faults: Faults, **more: Any) -> Scenario:
    """On three nodes unless `more` says so; the links of all kinds, a disk of whole
    transactions."""
    return Scenario(
        name,
        harness=harness,
        faults=faults,
        links=(PERFECT, LinkSettings(), ROUGH),
        disk=DiskSettings(atomic=True),
        **{"nodes": ("n1", "n2", "n3"), **more},
    )


EVERYTHING = Faults(
    crash=4,
    stop=1,
    pause=2,
    partition=2,
    isolate=2,
    one_way=2,
    power_cut=1,
    sync_failure=1,
    drift_ppm=2_000,
    every_ms=(30, 600),
    down_ms=(20, 900),
    pause_ms=(20, 900),
    cut_ms=(20, 1_200),
)
FIVE_NODES = ("n1", "n2", "n3", "n4", "n5")

RAFT = scenario(
    "raft", RegisterHarness, EVERYTHING, duration_ms=2_500, settle_ms=3_000, wire=through_the_wire
)

MEMBERSHIP = scenario(
    "membership",
    MembershipHarness,
    Faults(
        crash=3,
        partition=2,
        isolate=1,
        one_way=1,
        power_cut=1,
        every_ms=(50, 900),
        down_ms=(20, 700),
        cut_ms=(20, 900),
        max_down=1,
    ),
    nodes=FIVE_NODES,
    duration_ms=3_000,
    settle_ms=3_500,
)

FIVE = scenario(
    "five",
    type("FiveHarness", (RegisterHarness,), {"voters": (1, 2, 3, 4, 5)}),
    EVERYTHING,
    nodes=FIVE_NODES,
    duration_ms=2_500,
    settle_ms=3_000,
)
