"""One node of the simulated cluster: persists, sends and answers as ``node.py`` does, with a
delivery machine of ten lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from message_queue.core.messages import (
    Ack,
    AppendRecord,
    ClockRecord,
    Copy,
    CopyRecord,
    Frame,
    LogRecord,
    Put,
    WithdrawRecord,
    frame_decoder,
    owner_of,
)
from message_queue.core.replication.contract import (
    Accepted,
    AckDraft,
    NotOwner,
    PutDraft,
)
from message_queue.core.replication.effects import Committed, Effects, Gained, Lost
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import one_by_one
from testkit.sim import (
    Damaged,
    Disk,
    Host,
)

if TYPE_CHECKING:
    from sim_judge import QueueHarness

TICK_MS = 25
VISIBILITY_MS = 400
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
        self.lives: dict[int, int] = {}
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
        for peer in list(self.core.peers):
            self.run(self.core.peer_connected(peer, self.host.now_ms()))

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
            assert all(lost.epoch != gained.epoch for lost in fx.lost), "gained what is lost"
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
            if frame.incarnation > self.lives.get(frame.sender, 0):
                # Its link is here, so it is up, and the one to it is dialled again.
                self.lives[frame.sender] = frame.incarnation
                self.run(self.core.peer_connected(frame.sender, self.host.now_ms()))
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
