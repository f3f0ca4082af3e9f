"""A few nodes of the replication core, their logs and what is in flight between them. Nothing
happens unless a step says so (``scenario_steps.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from message_queue.core.invariants import Ledger, check_node, check_owners, check_state
from message_queue.core.messages import (
    RING_PARTITION,
    AppendRecord,
    ClockRecord,
    Copy,
    CopyRecord,
    Frame,
    LogRecord,
    Membership,
    PeerMessage,
    Put,
    WithdrawRecord,
    frame_decoder,
    owner_of,
)
from message_queue.core.placement.membership import founding
from message_queue.core.replication.config import NEVER_MS
from message_queue.core.replication.contract import (
    ReplicationConfig,
)
from message_queue.core.replication.effects import Effects
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import one_by_one

P = 0
COPIES = 3
QUIET_ROUNDS = 200
STEP_MS = 25


class ScenarioError(Exception):
    """What was expected is not so; the text says what is."""


class Node:
    """One node: its log, what of it is on disk, and (while it runs) its core."""

    def __init__(self) -> None:
        self.log: list[LogRecord | None] = []  # None: unreadable
        self.synced = 0
        self.holding = False
        self.life = 0
        self.core: Replicator | None = None
        self.ring: Membership | None = None
        self.bodies: dict[tuple[int, int], bytes] = {}
        self.batches: list[tuple[int, int]] = []  # (batch, length of the log with it)


class Cluster:
    """Partition 0 on a few nodes; everything happens when a step says so."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.n = int(config.get("nodes", 3))
        self.founders = int(config.get("founders", self.n))
        self.ring = bool(config.get("ring", self.founders < self.n))
        self.copies = int(config.get("copies", COPIES))
        self.rings: dict[int, Membership] = {}
        self.genesis_ms = int(config.get("genesis_ms", NEVER_MS if self.ring else 3_000))
        self.now_ms = 1_000
        self.nodes = [Node() for _ in range(self.n)]
        self.links: dict[tuple[int, int], deque[Frame]] = {
            (a, b): deque() for a in range(self.n) for b in range(self.n) if a != b
        }
        self.cuts: set[tuple[int, int]] = set()
        self.ledger = Ledger()
        self.dots: dict[str, tuple[int, int]] = {}
        self.pending: dict[str, tuple[int, int, int]] = {}  # what -> (node, epoch, seq)
        self.outcome: dict[str, str] = {}
        self.marks: dict[int, int] = {}
        for i in range(self.founders):
            self.restart(i)

    # -- the machinery ---------------------------------------------------------------------------

    def run(self, i: int, fx: Effects) -> None:
        node = self.nodes[i]
        assert node.core is not None
        for record in fx.persist:
            node.log.append(record)
            self._keep(node, record)
            if (
                isinstance(record, AppendRecord)
                and record.partition == P
                and owner_of(record.epoch) == i
            ):
                self.ledger.proposed(P, record.epoch, record.entries)
        if fx.batch:
            node.batches.append((fx.batch, len(node.log)))
        frames: dict[int, list[PeerMessage]] = {}
        for to, message in fx.send:
            frames.setdefault(to, []).append(message)
        for to, messages in frames.items():
            if (i, to) not in self.cuts and self.nodes[to].core is not None:
                frame = Frame(i, node.life, tuple(messages))
                encoded = msgspec.msgpack.encode(frame)
                self.links[i, to].append(frame_decoder.decode(encoded))
        for done in fx.committed:
            if done.partition == P:
                self._committed(i, done.epoch, done.upto)
        for lost in fx.lost:
            if lost.partition != P:
                continue
            for what, (owner, epoch, _) in list(self.pending.items()):
                if owner == i and epoch == lost.epoch:
                    self.outcome[what] = "unknown"
                    del self.pending[what]
        if fx.ring is not None:
            self._adopted(i, fx.ring)
        for gained in fx.gained:
            if gained.partition != P:
                continue
            self.marks[gained.epoch] = 0
            if node.core.may_serve(P, self.now_ms):
                self.ledger.gained(P, node.core.state(P))
        for read in fx.reads:
            found = [
                Copy(e, s, b"", node.bodies[e, s])
                for e, first, last in read.wanted
                for s in range(first, last + 1)
                if (e, s) in node.bodies
            ]
            self.run(i, node.core.bodies_read(read, tuple(found), (), self.now_ms))
        if node.batches and not node.holding:
            self.sync(i)

    def _adopted(self, i: int, ring: Membership) -> None:
        """Node i knows that ring to be committed. A joiner starts when its admission is."""
        known = self.rings.setdefault(ring.version, ring)
        if known != ring:
            raise ScenarioError(f"two rings of version {ring.version}")
        self.nodes[i].ring = ring
        new = ring.joining
        if new is not None and new < self.n and not self.nodes[new].life:
            self.nodes[new].ring = ring
            self.restart(new)

    def _keep(self, node: Node, record: LogRecord) -> None:
        match record:
            case AppendRecord(partition, epoch, entries) if partition == P:
                for entry in one_by_one(entries):
                    if isinstance(entry, Put):
                        node.bodies[epoch, entry.seq] = entry.body
            case CopyRecord(partition, _, copies) if partition == P:
                for copy in copies:
                    node.bodies[copy.epoch, copy.seq] = copy.body
            case _:
                pass

    def _committed(self, i: int, epoch: int, upto: int) -> None:
        first = self.marks[epoch] + 1
        self.marks[epoch] = upto
        durable = {k: [replay(n.log[: n.synced])] for k, n in enumerate(self.nodes)}
        core = self.nodes[i].core
        tenure = core.seats[P].tenure if core is not None else None
        groups = tenure.quorum.groups if self.ring and tenure is not None else (range(self.n),)
        self.ledger.committed(P, epoch, first, upto, durable, groups)
        for what, (owner, of, seq) in list(self.pending.items()):
            if owner == i and of == epoch and seq <= upto:
                self.outcome[what] = "ok"
                del self.pending[what]

    def check(self) -> None:
        """The invariants, after each step."""
        for i, node in enumerate(self.nodes):
            if node.core is not None:
                check_node(node.core)
                state = node.core.state(P)
                check_state(state)
                bare = [dot for dot in state.held.dots() if dot not in node.bodies]
                assert not bare, f"node {i} holds {bare} without their bodies"
                if node.core.may_serve(P, self.now_ms):
                    self.ledger.check_held(P, node.core.state(P))
                assert node.synced <= len(node.log), f"node {i}: synced beyond its log"
        check_owners((n.core, self.now_ms) for n in self.nodes if n.core is not None)

    def sync(self, i: int) -> None:
        """What node i wrote so far is on its disk."""
        node = self.nodes[i]
        if node.core is not None and node.batches:
            batch, node.synced = node.batches[-1]
            node.batches.clear()
            self.run(i, node.core.durable(batch, self.now_ms))

    def restart(self, i: int) -> None:
        node = self.nodes[i]
        node.life += 1
        damaged = None in node.log
        node.bodies.clear()
        for record in node.log:
            if record is not None:
                self._keep(node, record)
        if damaged:
            state = replay(node.log)
            lost = tuple((e, s, s) for e, s in state.bodies().dots() if (e, s) not in node.bodies)
            node.log.append(WithdrawRecord(P, lost))
            node.synced = len(node.log)
        states = {P: replay(node.log)}
        if self.ring:
            states[RING_PARTITION] = replay(node.log, RING_PARTITION)
        clock_ms = max((r.cluster_ms for r in node.log if isinstance(r, ClockRecord)), default=0)
        node.core = Replicator(
            ReplicationConfig(
                node=i,
                nodes=self.n,
                incarnation=node.life,
                preference=() if self.ring else (tuple(range(self.n)),),
                membership=(node.ring or self._founding()) if self.ring else None,
                place=self._place,
                fresh=not node.log,
                seed=1000 + i,
                wall_ms=10**12,
                genesis_ms=self.genesis_ms,
            ),
            states,
            clock_ms,
            self.now_ms,
        )
        for j, other in enumerate(self.nodes):
            if j != i and other.core is not None:  # the links between them
                known = j in node.core.peers, i in other.core.peers
                if known[1]:
                    self.run(j, other.core.peer_connected(i, self.now_ms))
                if known[0]:
                    self.run(i, node.core.peer_connected(j, self.now_ms))

    def _founding(self) -> Membership:
        return founding(tuple(str(i) for i in range(self.founders)), 1, self.copies)

    def _place(self, ring: Membership) -> dict[int, tuple[int, ...]]:
        """The last members: so a fourth one takes the first one's place."""
        members = tuple(position for position, _ in ring.members)
        return {P: members[-self.copies :], RING_PARTITION: members}


def replay(log: Iterable[LogRecord | None], partition: int = P) -> PartitionState:
    """A node's state from its log."""
    state = PartitionState(partition)
    for record in log:
        if record is not None and (
            isinstance(record, ClockRecord) or record.partition == partition
        ):
            state.apply(record)
    return state
