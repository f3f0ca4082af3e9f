"""A cluster of Raft cores in one thread whose every delivery and tick is scripted.

Each node is driven as node.py drives it, except that the disk is instant: `settle` drains a node
and syncs what it wants written until it wants nothing more, so a step ends with everything
persisted.
"""

from __future__ import annotations

import random
from collections import deque

import msgspec

from lock_manager.core.invariants import DiskImage, RaftChecker, check_logs_match
from lock_manager.core.raft import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Member,
    Message,
    RaftConfig,
    RaftCore,
    Restored,
    Snapshot,
)

# of one `stabilize`; a cluster that is still busy then will never be quiet
MAX_DELIVERIES = 100_000


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario's "config"."""

    nodes: list[int]
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    pre_vote: bool = True
    check_quorum: bool = True
    seed: int = 0


class InitialState(msgspec.Struct, frozen=True, kw_only=True):
    """A node's entry in a scenario's "init": what is on its disk, and how far it is applied."""

    term: int = 0
    vote: int | None = None
    log_terms: list[int] = []
    commit: int = 0
    snapshot_index: int = 0
    snapshot_term: int = 0


class ScriptedNode:
    """One core, its disk, its clock (one millisecond a tick) and a machine that lists what it
    applied."""

    def __init__(self, node_id: int, disk: DiskImage) -> None:
        self.node_id = node_id
        self.disk = disk
        self.clock = 0
        self.running = False
        self.applied: list[bytes] = []
        self.core: RaftCore


class ScriptedCluster:
    """The nodes and what is in flight between them."""

    def __init__(self, settings: ClusterSettings, init: dict[int, InitialState]) -> None:
        self.settings = settings
        self.members = Configuration(tuple(Member(node_id=node) for node in settings.nodes))
        self.checker = RaftChecker(contents=False)
        self.links: dict[tuple[int, int], deque[Message]] = {}
        self.cuts: set[frozenset[int]] = set()
        self.isolated: set[int] = set()
        self.reads: dict[int, int | None] = {}
        self.nodes: dict[int, ScriptedNode] = {}
        for node_id in (*settings.nodes, *sorted(set(init) - set(settings.nodes))):
            state = init.get(node_id, InitialState())
            self.nodes[node_id] = ScriptedNode(node_id, self._initial_disk(state))
            self._boot(node_id, self._bootstrap(node_id), commit=state.commit)

    def _bootstrap(self, node_id: int) -> Configuration:
        """What a node's flags name: the members, or nobody for one that is to be added."""
        return self.members if node_id in self.settings.nodes else Configuration()

    def _initial_disk(self, state: InitialState) -> DiskImage:
        snapshot = Snapshot()
        if state.snapshot_index:
            snapshot = Snapshot(state.snapshot_index, state.snapshot_term, self.members, b"\x90")
        entries = tuple(
            Entry(index, term, EntryKind.COMMAND, b"")
            for index, term in enumerate(state.log_terms, state.snapshot_index + 1)
        )
        # Nobody has an entry of a term that it has not reached.
        term = max(state.term, state.snapshot_term, *state.log_terms, 0)
        hard_state = HardState(term, state.vote if term == state.term else None)
        return DiskImage(Restored(hard_state=hard_state, snapshot=snapshot, entries=entries))

    def _boot(self, node_id: int, bootstrap: Configuration, commit: int = 0) -> None:
        node = self.nodes[node_id]
        settings = self.settings
        config = RaftConfig(
            node_id=node_id,
            bootstrap=bootstrap,
            election_timeout_ms=settings.election_ticks,
            heartbeat_ms=settings.heartbeat_ticks,
            pre_vote=settings.pre_vote,
            check_quorum=settings.check_quorum,
            # A broken connection shows that the leader is not there, but only time starts
            # elections.
            reset_campaign_ms=None,
            eager_commit=True,  # `stabilize` is quiet only when everybody knows
            max_read_rounds=1_000,
        )
        chance = random.Random(f"{settings.seed}/{node_id}/{node.clock}")
        node.core = RaftCore(config, node.disk.restored, chance.randrange, node.clock)
        if commit > node.core.commit_index:
            if commit > node.core.last_index:
                raise ValueError(f"node {node_id}: commit {commit} lies beyond its log")
            node.core.state.commit_index = node.core.state.handed_out = commit
            node.core.state.following.matched_index = commit
        node.applied = []
        node.running = True
        self.checker.started(node_id, node.disk)
        self.settle(node_id)

    # ------------------------------------------------------------------------------------- driving

    def settle(self, node_id: int) -> None:
        """Carries out a node's effects, in the order that effects.py prescribes, until there are
        none."""
        node = self.nodes[node_id]
        core = node.core
        while core.has_effects:
            effects = core.drain()
            self.checker.drained(node_id, core, effects)
            for message in effects.messages:
                self._post(message)
            if effects.restore is not None:
                node.applied = msgspec.msgpack.decode(effects.restore.data, type=list[bytes])
            node.applied.extend(
                entry.payload for entry in effects.committed if entry.kind is EntryKind.COMMAND
            )
            for ready in effects.reads_ready:
                self.reads[ready.read_id] = ready.index
            if effects.persist is not None:
                self.checker.stored(node_id, effects.persist)
                core.persisted(effects.persist.seq, node.clock)

    def check(self) -> None:
        """The invariants that are about the cluster as it stands."""
        self.checker.check_durable()
        check_logs_match({node_id: node.core for node_id, node in self.nodes.items()})

    def _connected(self, one: int, other: int) -> bool:
        return frozenset((one, other)) not in self.cuts

    def _post(self, message: Message) -> None:
        receiver = self.nodes.get(message.to)
        if receiver is None or not receiver.running:
            return
        if self._connected(message.sender, message.to):
            self.links.setdefault((message.sender, message.to), deque()).append(message)

    def link(self, source: int, target: int) -> deque[Message]:
        return self.links.setdefault((source, target), deque())

    def hand_over(self, message: Message) -> None:
        """Delivers a message now, whatever the network looks like."""
        receiver = self.nodes.get(message.to)
        if receiver is None or not receiver.running:
            return
        receiver.core.step(message, receiver.clock)
        self.settle(message.to)

    def deliver(self, source: int, target: int) -> None:
        """Everything that is in flight on the link now, oldest first."""
        for _ in range(len(self.link(source, target))):
            if self.link(source, target):
                self.hand_over(self.link(source, target).popleft())

    def stabilize(self) -> None:
        """Delivers everything, and what that causes, until nothing is in flight."""
        deliveries = 0
        while busy := sorted(link for link, queue in self.links.items() if queue):
            for link in busy:
                deliveries += len(self.links[link])
                self.deliver(*link)
            if deliveries > MAX_DELIVERIES:
                raise ValueError(f"not quiet after {MAX_DELIVERIES} deliveries")

    def tick(self, node_id: int, ticks: int) -> None:
        node = self.nodes[node_id]
        for _ in range(ticks):
            node.clock += 1
            if node.running:
                node.core.tick(node.clock)
                self.settle(node_id)

    # -------------------------------------------------------------------------------------- faults

    def disconnect(self, one: int, other: int) -> None:
        """What is in flight is lost. A follower sees its connection break, as it would with TCP."""
        for source, target in ((one, other), (other, one)):
            self.link(source, target).clear()
            self._notice(source, target)

    def _notice(self, node_id: int, gone: int) -> None:
        """A connection broke: a follower no longer protects its leader, a leader counts no longer
        on its follower. (What it sent may have arrived all the same.)"""
        node = self.nodes.get(node_id)
        if node is None or not node.running or node_id == gone:
            return
        leading = node.core.state.leading
        if leading is not None and gone in leading.peers:
            leading.peers[gone].broken = True
        elif node.core.leader_id == gone:
            node.core.peer_disconnected(gone, node.clock)
            self.settle(node_id)

    def cut(self, one: int, other: int) -> None:
        self.cuts.add(frozenset((one, other)))
        self.disconnect(one, other)

    def heal(self, one: int, other: int) -> None:
        self.cuts.discard(frozenset((one, other)))

    def isolate(self, node_id: int) -> None:
        self.isolated.add(node_id)  # also from nodes that are yet to come
        for other in sorted(self.nodes):
            if other != node_id:
                self.cut(node_id, other)

    def heal_all(self) -> None:
        self.cuts.clear()
        self.isolated.clear()

    def crash(self, node_id: int) -> None:
        """The process dies: its memory goes, its disk stays, what is on the way to it vanishes.
        What it sent before is still on its way."""
        node = self.nodes[node_id]
        node.running = False
        for source, target in list(self.links):
            if target == node_id:
                self.links[source, target].clear()
        for other in sorted(self.nodes):
            self._notice(other, node_id)

    def restart(self, node_id: int) -> None:
        node = self.nodes[node_id]
        if node.running:
            return
        self._boot(node_id, self._bootstrap(node_id))

    def compact(self, node_id: int) -> None:
        """A snapshot at the applied index; the log up to it goes."""
        node = self.nodes[node_id]
        data = msgspec.msgpack.encode(node.applied)
        node.core.snapshot_taken(node.core.handed_out, data)
        self.settle(node_id)

    def add(self, leader: int, member: int) -> None:
        """Starts the new node with an empty disk, if there is none yet, and asks the leader to add
        it."""
        if member not in self.nodes:
            self.nodes[member] = ScriptedNode(member, DiskImage())
            self.cuts |= {frozenset((member, other)) for other in self.isolated}
            self._boot(member, Configuration())
        node = self.nodes[leader]
        if node.running:
            node.core.add(Member(node_id=member))
            self.settle(leader)
