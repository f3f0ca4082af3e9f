"""The replication core in a simulated cluster: persist, send and answer as ``node.py`` does, with a
delivery machine of ten lines, clients that produce, consume and ack, and a judge outside.

``make sim SERVICE=queue SEED=7`` replays a run.
"""

from __future__ import annotations

from typing import Any

import msgspec

from message_queue.core.invariants import Ledger, check_node, check_owners, check_state
from message_queue.core.messages import (
    Ack,
    AppendRecord,
    ClockRecord,
    Copy,
    CopyRecord,
    Frame,
    LogRecord,
    Membership,
    Put,
    WithdrawRecord,
    frame_decoder,
    owner_of,
)
from message_queue.core.replication.config import NEVER_MS
from message_queue.core.replication.contract import (
    Accepted,
    AckDraft,
    NotOwner,
    PutDraft,
    ReplicationConfig,
)
from message_queue.core.replication.effects import Committed, Effects, Gained, Lost
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import one_by_one
from testkit.checkers import total_queue
from testkit.sim import (
    PERFECT,
    ROUGH,
    TIMED_OUT,
    Damaged,
    Disk,
    Faults,
    Harness,
    Host,
    LinkSettings,
    Scenario,
    World,
)

TICK_MS = 25
VISIBILITY_MS = 400
DRIFT = 0.002
CLOCK_SLACK_MS = 25
"""Cluster time may jump ahead by so much untold, and drift."""
encoder = msgspec.msgpack.Encoder()


def wire(frame: Frame) -> Frame:
    """Every frame crosses the real codec."""
    return frame_decoder.decode(encoder.encode(frame))


class SimNode:
    """``node.py`` in miniature."""

    def __init__(self, host: Host, harness: QueueHarness) -> None:
        self.host = host
        self.harness = harness
        self.position = harness.position_of(host.name)
        self.core: Replicator | None = None
        self.bodies: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}
        self.batches: list[tuple[int, list[LogRecord]]] = []
        self.syncing = False
        self.incarnation = 0
        self.fresh = False
        self.ready: dict[int, dict[tuple[int, int], float]] = {}
        self.waiting: dict[int, list[tuple[int, int, Any, Any]]] = {}
        self.marks: dict[tuple[int, int], int] = {}

    # -- start -----------------------------------------------------------------------------------

    def start(self, disk: Disk) -> None:
        stored = disk.get("incarnation", 0)
        self.fresh = stored == 0
        self.incarnation = max(stored + 1, self.host.wall_ms())
        disk.put("incarnation", self.incarnation)
        disk.flush()
        disk.sync("boot")

    def boot(self) -> None:
        """The incarnation is durable: replay the log and begin."""
        disk = self.host.disk
        log = disk.log("log")
        states: dict[int, PartitionState] = {}
        clock_ms = 0
        damaged = 0
        for at, record in enumerate(log):
            if isinstance(record, Damaged):
                if at == len(log) - 1:
                    disk.truncate(at, "log")  # a torn tail: nothing that was told to anybody
                    self.host.cover("torn_tails")
                else:
                    damaged += 1
                continue
            if isinstance(record, ClockRecord):
                clock_ms = max(clock_ms, record.cluster_ms)
                continue
            state = states.setdefault(record.partition, PartitionState(record.partition))
            self.keep_bodies(record)
            state.apply(record)
        if damaged:
            self.withdraw(states, damaged)
        for key in list(self.bodies):
            if key[0] not in states or not states[key[0]].has_body(key[1], key[2]):
                del self.bodies[key]
        harness = self.harness
        harness.shadows[self.host.name] = {
            p: twin(states.get(p) or PartitionState(p)) for p in harness.all_partitions
        }
        self.core = Replicator(harness.config(self), states, clock_ms, self.host.now_ms())
        self.host.set_timer("tick", TICK_MS)

    def withdraw(self, states: dict[int, PartitionState], damaged: int) -> None:
        """As storage does: what can't be read is no longer known, and whose it was is unknown."""
        self.host.cover("damaged_records", damaged)
        for partition in self.harness.all_partitions:
            state = states.setdefault(partition, PartitionState(partition))
            lost = tuple(
                (epoch, seq, seq)
                for epoch, seq in state.bodies().dots()
                if (partition, epoch, seq) not in self.bodies
            )
            record = WithdrawRecord(partition, lost)
            self.host.disk.append(record, "log")
            state.apply(record)

    # -- the order of things -----------------------------------------------------------------------

    def run(self, fx: Effects) -> None:
        assert self.core is not None
        disk = self.host.disk
        if fx.jumped_ms:
            self.host.cover("cluster_time_jumped")
            self.jumped(fx.jumped_ms)
        if fx.persist:
            for record in fx.persist:
                disk.append(record, "log")
                self.keep_bodies(record)
                if isinstance(record, AppendRecord) and owner_of(record.epoch) == self.position:
                    self.harness.ledger.proposed(record.partition, record.epoch, record.entries)
            disk.flush()
            self.batches.append((fx.batch, list(fx.persist)))
            self.sync()
        frames: dict[int, list[Any]] = {}
        for to, message in fx.send:
            frames.setdefault(to, []).append(message)
        for to, messages in frames.items():
            name = self.harness.name_of(to)
            if name is not None:
                self.host.send(name, Frame(self.position, self.incarnation, tuple(messages)))
        for note in fx.notes:
            self.host.cover(note.name)
            self.host.log(note.name, note.partition, note.epoch, note.detail)
        for done in fx.committed:
            first = self.marks[done.partition, done.epoch] + 1
            self.marks[done.partition, done.epoch] = done.upto
            self.harness.ledger.committed(
                done.partition,
                done.epoch,
                first,
                done.upto,
                self.harness.durable(done.partition),
                self.harness.deciders(self.core, done.partition),
            )
            self.committed(done, first)
        for lost in fx.lost:
            self.lost(lost)
        for gained in fx.gained:
            state = self.core.state(gained.partition)
            if self.core.may_serve(gained.partition, self.host.now_ms()):
                # Not one that was paused while it was elected, and is long deposed.
                self.harness.ledger.gained(gained.partition, state)
            self.marks[gained.partition, gained.epoch] = 0
            for dot in state.held.dots():
                assert (gained.partition, *dot) in self.bodies, "held without a body"
            self.gained(gained)
        for partition, spans in fx.forget:
            self.forget(partition, spans)
        for partition in fx.pausing:
            self.run(self.core.paused(partition, None, self.host.now_ms()))
        if fx.ring is not None:
            self.harness.adopted(self, fx.ring)
        for read in fx.reads:
            found, size = [], 0
            for epoch, first, last in read.wanted:
                for seq in range(first, last + 1):
                    put = self.bodies.get((read.partition, epoch, seq))
                    if put is not None and size < 200:
                        found.append(Copy(epoch, seq, *put))
                        size += len(put[1])
            self.host.cover("copies_read", len(found))
            self.run(self.core.bodies_read(read, tuple(found), (), self.host.now_ms()))

    def jumped(self, by_ms: int) -> None:
        """Cluster time did."""

    # -- the delivery machine: whoever comes, in the order stored --------------------------------

    def gained(self, gained: Gained) -> None:
        assert self.core is not None
        held = self.core.state(gained.partition).held
        self.ready[gained.partition] = dict.fromkeys(held.dots(), 0.0)

    def committed(self, done: Committed, first: int) -> None:
        assert self.core is not None
        ready = self.ready[done.partition]
        for seq in range(first, done.upto + 1):
            if self.core.state(done.partition).held.has(done.epoch, seq):
                ready.setdefault((done.epoch, seq), 0.0)
        left = []
        for epoch, upto, answer, reply in self.waiting.pop(done.partition, []):
            if epoch == done.epoch and upto <= done.upto:
                reply.resolve(answer)
            else:
                left.append((epoch, upto, answer, reply))
        self.waiting[done.partition] = left

    def lost(self, lost: Lost) -> None:
        self.ready.pop(lost.partition, None)
        for _, _, _, reply in self.waiting.pop(lost.partition, []):
            self.host.cover("clean_in_doubt" if lost.clean else "in_doubt")
            reply.resolve("unknown")

    # -- storage ---------------------------------------------------------------------------------

    def keep_bodies(self, record: LogRecord) -> None:
        match record:
            case AppendRecord(partition, epoch, entries):
                for entry in one_by_one(entries):
                    if isinstance(entry, Put):
                        self.bodies[partition, epoch, entry.seq] = (entry.meta, entry.body)
            case CopyRecord(partition, _, copies):
                for copy in copies:
                    self.bodies[partition, copy.epoch, copy.seq] = (copy.meta, copy.body)
            case _:
                pass

    def forget(self, partition: int, spans: Any) -> None:
        for epoch, first, last in spans:
            for seq in range(first, last + 1):
                self.bodies.pop((partition, epoch, seq), None)

    def sync(self) -> None:
        if not self.syncing and self.batches:
            self.syncing = True
            self.host.disk.sync(self.batches[-1][0])

    def on_sync_done(self, token: Any) -> None:
        if token == "boot":
            self.boot()
            return
        assert self.core is not None
        self.syncing = False
        shadows = self.harness.shadows[self.host.name]
        while self.batches and self.batches[0][0] <= token:
            for record in self.batches.pop(0)[1]:
                if not isinstance(record, ClockRecord):
                    before = shadows[record.partition].promised
                    shadows[record.partition].apply(record)
                    assert shadows[record.partition].promised >= before, "a promise was taken back"
        self.run(self.core.durable(token, self.host.now_ms()))
        self.sync()

    def on_message(self, source: str, frame: Frame) -> None:
        if self.core is not None:
            assert self.harness.name_of(frame.sender, gone=True) == source
            self.run(
                self.core.receive_all(
                    frame.sender, frame.incarnation, frame.messages, self.host.now_ms()
                )
            )

    def on_timer(self, name: str) -> None:
        assert self.core is not None
        self.run(self.core.tick(self.host.now_ms()))
        self.host.set_timer("tick", TICK_MS)

    def on_peer_disconnected(self, peer: str) -> None:
        if self.core is not None:
            position = self.harness.position_of(peer)
            self.run(self.core.peer_disconnected(position, self.host.now_ms()))

    def on_stop(self) -> None:
        """SIGTERM: the core hands over; what the moment allows goes out before the end."""
        if self.core is not None:
            self.run(self.core.yield_all(self.host.now_ms()))

    # -- clients -----------------------------------------------------------------------------------

    def propose(self, partition: int, drafts: tuple[Any, ...], answer: Any, reply: Any) -> None:
        """Answers with ``answer(epoch, first)`` once committed, or ("moved", owner)."""
        if self.core is None:
            reply.resolve(("moved", None))
            return
        outcome = self.core.propose(partition, drafts, self.host.now_ms())
        match outcome:
            case NotOwner(owner):
                reply.resolve(("moved", owner))
            case Accepted(epoch, first, fx):
                record = fx.persist[0]
                assert isinstance(record, AppendRecord)
                for entry in record.entries:
                    if isinstance(entry, Ack):
                        for target_epoch, low, high in entry.targets:
                            for seq in range(low, high + 1):
                                self.ready[partition].pop((target_epoch, seq), None)
                last = first + len(drafts) - 1
                self.waiting.setdefault(partition, []).append(
                    (epoch, last, answer(epoch, first), reply)
                )
                self.run(fx)

    def produce(self, partition: int, bodies: tuple[str, ...], reply: Any) -> None:
        def ids(epoch: int, first: int) -> list[str]:
            return [f"{partition}-{epoch}-{first + i}" for i in range(len(bodies))]

        drafts = tuple(PutDraft(b"", body.encode()) for body in bodies)
        self.propose(partition, drafts, ids, reply)

    def consume(self, partition: int, most: int, reply: Any) -> None:
        now_ms = self.host.now_ms()
        if self.core is None or not self.core.may_serve(partition, now_ms):
            owner = None if self.core is None else self.core.owner(partition)
            reply.resolve(("moved", None if owner == self.position else owner))
            return
        messages = []
        for dot, due_ms in self.ready[partition].items():
            if due_ms <= now_ms and len(messages) < most:
                if (partition, *dot) in self.harness.delivered:
                    self.host.cover("redelivered")
                self.harness.delivered.add((partition, *dot))
                self.ready[partition][dot] = now_ms + VISIBILITY_MS
                body = self.bodies[partition, dot[0], dot[1]][1].decode()
                messages.append({"id": f"{partition}-{dot[0]}-{dot[1]}", "body": body})
        reply.resolve(messages)

    def ack(self, partition: int, dot: tuple[int, int], reply: Any) -> None:
        self.propose(
            partition,
            (AckDraft(((dot[0], dot[1], dot[1]),)),),
            lambda epoch, first: "acknowledged",
            reply,
        )


def twin(state: PartitionState) -> PartitionState:
    """An independent copy."""
    other = PartitionState(state.partition)
    other.apply(state.checkpoint())
    return other


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

    def times(self) -> tuple[float, int]:
        """Now, and the latest cluster time."""
        nodes = [node for node in self.world.nodes.values() if node.core is not None]
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


CALM = Scenario(
    "calm",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=3_000,
    settle_ms=4_000,
    wire=wire,
)

FAULTS = Scenario(
    "faults",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(
        crash=4,
        stop=0,
        pause=2,
        partition=2,
        isolate=2,
        one_way=2,
        power_cut=1,
        sync_failure=1,
        wall_jump=1,
        drift_ppm=2_000,
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)


WIPES = Scenario(
    "wipes",
    nodes=("n1", "n2", "n3"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(
        crash=2, pause=1, isolate=1, wipe=3, power_cut=1, stop=1, max_wipes=1, every_ms=(100, 1_000)
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)


class Rotting(Stopping):
    """Records of one node's log rot while it is down."""

    def begin(self) -> None:
        super().begin()
        victim = self.world.rng.choice(self.world.names)
        for at_ms in (1_200.0, 2_600.0):
            self.world.clock.call_later(at_ms + self.world.rng.uniform(0, 600), self.rot, victim)

    def rot(self, victim: str) -> None:
        self.world.crash(victim)
        for partition, shadow in self.shadows[victim].items():
            self.rotten.setdefault((victim, partition), []).append(shadow)
        disk = self.world.disks[victim]
        for _ in range(self.world.rng.randint(1, 4)):
            records = len(disk.log("log"))
            if records > 1:
                disk.corrupt(self.world.rng.randrange(records - 1), "log")
        self.world.start(victim)


DAMAGE = Scenario(
    "damage",
    nodes=("n1", "n2", "n3"),
    harness=Rotting,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(crash=2, pause=1, isolate=1, one_way=1, power_cut=1, stop=1),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)

FIVE = Scenario(
    "five",
    nodes=("n1", "n2", "n3", "n4", "n5"),
    harness=Stopping,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(crash=4, pause=2, partition=3, one_way=2, wipe=1, power_cut=1, drift_ppm=2_000),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)
