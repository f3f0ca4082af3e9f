"""Replays scenario files against the replication core: ``python tests/scenarios/run.py PATH…``.

The format is in README.md beside this file. Prints ``ID ok`` or ``ID FAILED at step N: why``, then
``N passed, M failed``; exits 0 only if all passed. The invariants run after every step.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402 - the path comes first

from message_queue.core.invariants import Ledger, check_node, check_owners, check_state  # noqa: E402
from message_queue.core.messages import (  # noqa: E402
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
from message_queue.core.placement.membership import founding  # noqa: E402
from message_queue.core.replication.config import NEVER_MS  # noqa: E402
from message_queue.core.replication.contract import (  # noqa: E402
    Accepted,
    AckDraft,
    Changed,
    Join,
    Leave,
    PutDraft,
    ReplicationConfig,
)
from message_queue.core.replication.effects import Effects  # noqa: E402
from message_queue.core.replication.replicator import Replicator  # noqa: E402
from message_queue.core.replication.state import PartitionState  # noqa: E402
from message_queue.core.runs import one_by_one  # noqa: E402

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

    # -- steps -----------------------------------------------------------------------------------

    def sync(self, i: int) -> None:
        """What node i wrote so far is on its disk."""
        node = self.nodes[i]
        if node.core is not None and node.batches:
            batch, node.synced = node.batches[-1]
            node.batches.clear()
            self.run(i, node.core.durable(batch, self.now_ms))

    def hold_sync(self, i: int) -> None:
        """From now on node i syncs only when told."""
        self.nodes[i].holding = True

    def release_sync(self, i: int) -> None:
        self.nodes[i].holding = False
        self.sync(i)

    def deliver(self, a: int, b: int) -> None:
        """All that is in flight from a to b now."""
        for _ in range(len(self.links[a, b])):
            self._arrive(a, b, self.links[a, b].popleft())

    def deliver_one(self, a: int, b: int) -> None:
        if self.links[a, b]:
            self._arrive(a, b, self.links[a, b].popleft())

    def deliver_last(self, a: int, b: int) -> None:
        if self.links[a, b]:
            self._arrive(a, b, self.links[a, b].pop())

    def duplicate(self, a: int, b: int) -> None:
        if self.links[a, b]:
            self.links[a, b].append(self.links[a, b][0])

    def drop(self, a: int, b: int) -> None:
        self.links[a, b].clear()

    def _arrive(self, a: int, b: int, frame: Frame) -> None:
        core = self.nodes[b].core
        if core is not None:
            self.run(b, core.receive_all(a, frame.incarnation, frame.messages, self.now_ms))

    def wait(self, ms: int) -> None:
        """Time passes; nodes tick, and what is in flight arrives (cuts excepted)."""
        until = self.now_ms + ms
        while self.now_ms < until:
            self.now_ms += STEP_MS
            for i, node in enumerate(self.nodes):
                if node.core is not None:
                    self.run(i, node.core.tick(self.now_ms))
            self.settle()
            self.check()

    def sleep(self, ms: int) -> None:
        """Time passes and nobody does anything (everybody is paused)."""
        self.now_ms += ms

    def tick(self, i: int) -> None:
        core = self.nodes[i].core
        if core is not None:
            self.run(i, core.tick(self.now_ms))

    def settle(self) -> None:
        """Delivers until nothing is in flight."""
        for _ in range(QUIET_ROUNDS):
            if not any(self.links.values()):
                return
            for a, b in self.links:
                self.deliver(a, b)
        raise ScenarioError("messages go round without end")

    def cut(self, a: int, b: int) -> None:
        """One way: from a to b; what is in flight is lost."""
        self.cuts.add((a, b))
        self.links[a, b].clear()

    def heal(self, a: int, b: int) -> None:
        self.cuts.discard((a, b))

    def isolate(self, i: int) -> None:
        for j in range(self.n):
            if j != i:
                self.cut(i, j)
                self.cut(j, i)

    def heal_all(self) -> None:
        self.cuts.clear()

    def crash(self, i: int) -> None:
        """kill -9 and a power cut: what was not synced is lost."""
        node = self.nodes[i]
        node.core = None
        del node.log[node.synced :]
        node.batches.clear()
        node.holding = False
        for a, b in self.links:
            if i in (a, b):
                self.links[a, b].clear()
        for what, (owner, _, _) in list(self.pending.items()):
            if owner == i:
                self.outcome[what] = "unknown"
                del self.pending[what]
        for j, other in enumerate(self.nodes):
            if other.core is not None and (i, j) not in self.cuts:
                self.run(j, other.core.peer_disconnected(i, self.now_ms))

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

    def _founding(self) -> Membership:
        return founding(tuple(str(i) for i in range(self.founders)), 1, self.copies)

    def _place(self, ring: Membership) -> dict[int, tuple[int, ...]]:
        """The last members: so a fourth one takes the first one's place."""
        members = tuple(position for position, _ in ring.members)
        return {P: members[-self.copies :], RING_PARTITION: members}

    def join(self, at: int, i: int) -> None:
        """Asks node ``at`` to let node i in."""
        self._change(at, Join(str(i)), f"join {i}")

    def leave(self, at: int, i: int) -> None:
        self._change(at, Leave(str(i)), f"leave {i}")

    def _change(self, at: int, asked: Join | Leave, what: str) -> None:
        core = self.nodes[at].core
        self.outcome[what] = "refused"
        if core is None:
            return
        answer = core.change_ring(asked, self.now_ms)
        if isinstance(answer, Changed):
            self.outcome[what] = "accepted"
            self.run(at, answer.effects)

    def wipe(self, i: int) -> None:
        self.crash(i)
        node = self.nodes[i]
        node.log.clear()
        node.synced = 0

    def forget_ring(self, i: int) -> None:
        """What a node that is down kept of the ring is lost, so it starts from its command line."""
        self.nodes[i].ring = None

    def corrupt(self, i: int, kind: str) -> None:
        """The first record of that kind in node i's log can't be read any more."""
        log = self.nodes[i].log
        for at, record in enumerate(log):
            if type(record).__name__ == kind:
                log[at] = None
                return
        raise ScenarioError(f"node {i} has no {kind}")

    def produce(self, i: int, *names: str) -> None:
        """Asks node i to store messages, as one batch."""
        drafts = tuple(PutDraft(b"", name.encode()) for name in names)
        first = self._propose(i, drafts, names[0])
        if first is not None:
            epoch = self.pending[names[0]][1] if names[0] in self.pending else self._epoch(i)
            for k, name in enumerate(names):
                self.dots[name] = (epoch, first + k)

    def ack(self, i: int, name: str) -> None:
        epoch, seq = self.dots[name]
        self._propose(i, (AckDraft(((epoch, seq, seq),)),), f"ack {name}")

    def _epoch(self, i: int) -> int:
        core = self.nodes[i].core
        return 0 if core is None else core.epoch(P)

    def _propose(self, i: int, drafts: tuple[Any, ...], what: str) -> int | None:
        core = self.nodes[i].core
        self.outcome[what] = "refused"
        if core is None:
            return None
        accepted = core.propose(P, drafts, self.now_ms)
        if not isinstance(accepted, Accepted):
            return None
        del self.outcome[what]
        self.pending[what] = (i, accepted.epoch, accepted.first + len(drafts) - 1)
        self.run(i, accepted.effects)
        return accepted.first

    def stop(self, i: int) -> None:
        """SIGTERM: hand over."""
        core = self.nodes[i].core
        if core is not None:
            self.run(i, core.yield_all(self.now_ms))

    def damage(self, i: int, name: str) -> None:
        """Node i finds a message's body unreadable while it runs."""
        core = self.nodes[i].core
        epoch, seq = self.dots[name]
        if core is not None:
            self.run(i, core.damaged(P, ((epoch, seq, seq),), self.now_ms))

    # -- expectations ----------------------------------------------------------------------------

    def expect(self, wanted: dict[str, Any]) -> None:
        serving = [
            i
            for i, node in enumerate(self.nodes)
            if node.core is not None and node.core.may_serve(P, self.now_ms)
        ]
        for key, value in wanted.items():
            if key == "owner":
                found: Any = serving[0] if serving else None
            elif key == "outcome":
                found = {
                    what: "pending" if what in self.pending else self.outcome.get(what)
                    for what in value
                }
            elif key == "held":
                found = {name: self._held(int(name)) for name in value}
                value = {name: sorted(names) for name, names in value.items()}
            elif key == "standing":
                found = {name: self._state(int(name)).standing.name.lower() for name in value}
            elif key == "replicas":
                found = {name: sorted(self._state(int(name)).replicas) for name in value}
            elif key == "ring":
                found = {name: self._ring(int(name)) for name in value}
            elif key == "in_flight":
                found = {
                    pair: len(self.links[int(pair.split(">")[0]), int(pair.split(">")[1])])
                    for pair in value
                }
            else:
                raise ScenarioError(f"unknown expectation {key!r}")
            if found != value:
                raise ScenarioError(f"{key} is {found}, expected {value}")

    def _ring(self, i: int) -> int:
        core = self.nodes[i].core
        return 0 if core is None else core.ring.version

    def _state(self, i: int) -> PartitionState:
        core = self.nodes[i].core
        return replay(self.nodes[i].log) if core is None else core.state(P)

    def _held(self, i: int) -> list[str]:
        names = {dot: name for name, dot in self.dots.items()}
        return sorted(names.get(dot, str(dot)) for dot in self._state(i).held.dots())


def replay(log: Iterable[LogRecord | None], partition: int = P) -> PartitionState:
    """A node's state from its log."""
    state = PartitionState(partition)
    for record in log:
        if record is not None and (
            isinstance(record, ClockRecord) or record.partition == partition
        ):
            state.apply(record)
    return state


STEPS = {
    *("sync", "hold_sync", "release_sync", "deliver", "deliver_one", "deliver_last", "duplicate"),
    *("drop", "wait", "sleep", "tick", "settle", "cut", "heal", "isolate", "heal_all", "crash"),
    *("restart", "wipe", "corrupt", "produce", "ack", "stop", "damage", "expect"),
    *("join", "leave", "forget_ring"),
}


def play(scenario: dict[str, Any]) -> str | None:
    """None if it passed, else ``at step N: why`` (steps count from 1)."""
    cluster = Cluster(scenario.get("config", {}))
    for number, step in enumerate(scenario["steps"], 1):
        name, *arguments = step
        if name not in STEPS:
            return f"at step {number}: unknown step {name!r}"
        try:
            getattr(cluster, name)(*arguments)
            cluster.check()
        except (ScenarioError, AssertionError) as error:
            return f"at step {number} {json.dumps(step)}: {error}"
    return None


def files(paths: Sequence[str]) -> list[Path]:
    """The scenario files under these paths, in order of name."""
    found: list[Path] = []
    for path in map(Path, paths):
        found.extend(sorted(path.rglob("*.json")) if path.is_dir() else [path])
    return found


def main(argv: Sequence[str]) -> int:
    passed = failed = 0
    for path in files(argv or [str(Path(__file__).parent)]):
        document = json.loads(path.read_text("utf-8"))
        for scenario in document if isinstance(document, list) else [document]:
            problem = play(scenario)
            print(f"{scenario['id']} " + ("ok" if problem is None else f"FAILED {problem}"))
            passed += problem is None
            failed += problem is not None
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
