"""What a scenario may do, and expect (the table is in README.md)."""

from __future__ import annotations

from typing import Any

from scenario_cluster import QUIET_ROUNDS, STEP_MS, Cluster, P, ScenarioError, replay

from message_queue.core.messages import (
    Frame,
)
from message_queue.core.replication.contract import (
    Accepted,
    AckDraft,
    Changed,
    Join,
    Leave,
    PutDraft,
)
from message_queue.core.replication.state import PartitionState


class Steps(Cluster):
    """A cluster to which things happen."""

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


STEPS = {
    *("sync", "hold_sync", "release_sync", "deliver", "deliver_one", "deliver_last", "duplicate"),
    *("drop", "wait", "sleep", "tick", "settle", "cut", "heal", "isolate", "heal_all", "crash"),
    *("restart", "wipe", "corrupt", "produce", "ack", "stop", "damage", "expect"),
    *("join", "leave", "forget_ring"),
}
