"""Writers and promoters around the simulated pair, and the judge: nothing acknowledged is lost, and
there is one history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pair_node import SimNode

from secure_store.core.invariants import check_early_sends, check_node, check_pair
from secure_store.core.messages import Mode, Role
from secure_store.core.pair import PairState
from secure_store.core.records import Record
from testkit.sim import TIMED_OUT, Harness, Host, World

QUIET_MS = 8_000  # writers stop


@dataclass(frozen=True, slots=True)
class Settings:
    mode: Mode
    promotes: bool = False
    force: bool = False
    writers: int = 3


class PairHarness(Harness[SimNode]):
    """The judge: nothing acknowledged is lost, and there is one history."""

    settings = Settings(Mode.AVAILABLE)

    def __init__(self, world: World[SimNode]) -> None:
        super().__init__(world)
        self.acked: list[tuple[bytes, int, int, bool]] = []  # payload, epoch, seq, degraded
        self.durable: dict[str, set[bytes]] = {name: set() for name in world.names}
        self.shown_hash: dict[int, bytes] = {}
        self.last_shown: dict[str, int] = {}
        self.flagged = {"A"}  # who is started with --replica
        self.forced = False
        self.newest_epoch = 0
        self.read_seq = 0

    def build(self, host: Host) -> SimNode:
        return SimNode(host, self)

    # --- what nodes report --------------------------------------------------------------------

    def note_durable(self, node: SimNode) -> None:
        """Remember what a disk has really got."""
        name = node.host.name
        for record in node.disk.log():
            if record.seq <= node.state.durable_seq:
                self.durable[name].add(record.hash)

    def shown(self, node: SimNode, record: Record) -> None:
        """Reads at this node now see the record."""
        known = self.shown_hash.setdefault(record.seq, record.hash)
        if not self.forced:
            assert known == record.hash, f"two histories shown at record {record.seq}"

    def forget_shown(self, node: SimNode) -> None:
        node.host.cover("reset")

    def acknowledged(self, node: SimNode, payload: bytes, done: Any) -> None:
        state = node.state
        self.acked.append((payload, state.wished.epoch, done.seq, done.degraded))
        node.host.cover("degraded_ack" if done.degraded else "ack")
        latest = max(epoch for _, epoch, _, _ in self.acked)
        if not self.forced:
            assert state.wished.epoch == latest, "an old primary acknowledged a write"
        record = next((r for r in node.disk.log() if r.seq == done.seq), None)
        if record is None or not state.wants_replica:
            return
        mine, peer = node.host.name, node.host.peers[0]
        assert record.hash in self.durable[mine] or done.seq <= state.durable_seq
        if done.degraded:
            marked = not state.durable.in_step or done.seq <= state.barrier_seq
            assert marked, "acknowledged alone without the durable mark that says so"
        else:
            assert record.hash in self.durable[peer], "acknowledged before both disks had it"
        if state.durable.mode is Mode.STRICT:
            assert not done.degraded, "strict mode acknowledged alone"

    # --- the run ------------------------------------------------------------------------------

    def begin(self) -> None:
        for number in range(self.settings.writers):
            self.world.spawn(self.writer(f"w{number}"))
        if self.settings.promotes:
            self.world.spawn(self.promoter())

    def check(self, name: str) -> None:
        states = {n: node.state for n, node in self.world.nodes.items() if hasattr(node, "state")}
        if name in states:
            check_node(states[name])
            check_early_sends(states[name])
        check_pair(states)
        if name in states and not self.forced:
            self.check_reads(states[name])

    def check_reads(self, state: PairState) -> None:
        """What the primary of the newest epoch lets reads see never goes back, restarts included
        (while its log's end is open, reads of it wait)."""
        if not state.is_primary or state.ambiguous():
            return
        self.newest_epoch = max(self.newest_epoch, state.durable.epoch)
        if state.durable.epoch == self.newest_epoch:
            assert state.shown_seq >= self.read_seq, "a read went back in time"
            self.read_seq = state.shown_seq

    async def writer(self, me: str) -> None:
        world = self.world
        target = "A"
        for i in range(200):
            if world.clock.now_ms > QUIET_MS:
                return
            payload = f"{me}-{i}".encode()
            reply = world.promise(timeout_ms=4_000)
            world.tell(target, lambda node, p=payload, r=reply: node.submit(p, r))
            answer = await reply
            kind = "lost" if answer is TIMED_OUT else answer[0]
            world.coverage.hit(f"write_{kind}")
            if kind == "not_primary" or (kind == "lost" and world.rng.random() < 0.3):
                target = "B" if target == "A" else "A"
            await world.sleep_ms(world.rng.choice((0, 1, 20, 150)))

    async def promoter(self) -> None:
        world = self.world
        for _ in range(4):
            await world.sleep_ms(world.rng.uniform(300, 2_000))
            if world.clock.now_ms > QUIET_MS:
                return
            target = world.rng.choice(world.names)
            force = self.settings.force and world.rng.random() < 0.8
            node = world.node(target)
            if force and node is not None and node.state.wished.role is Role.REPLICA:
                self.forced = True
            reply = world.promise(timeout_ms=5_000)
            world.tell(target, lambda node, f=force, r=reply: node.promote(f, r))
            answer = await reply
            if answer is not TIMED_OUT:
                world.coverage.hit("promoted" if answer.ok else "promotion_refused")

    def finish(self) -> None:
        nodes = self.world.nodes
        states = {name: node.state for name, node in nodes.items()}
        primaries = [n for n in nodes.values() if n.state.is_primary]
        assert len(primaries) == 1, f"primaries: {[s.wished for s in states.values()]}"
        (primary,) = primaries
        assert not primary.state.refused, primary.state.refused
        replica = next(n for n in nodes.values() if n is not primary)
        assert primary.state.session is not None, "the pair did not find together"
        assert primary.state.session.phase.value == "live", primary.state.session.phase
        assert primary.contents() == replica.contents(), "the nodes hold different data"
        kept = set(primary.contents())
        aside = {p for n in nodes.values() for p in n.disk.get("quarantine", ())}
        for payload, epoch, seq, degraded in self.acked:
            if payload in kept:
                continue
            assert self.forced, f"acknowledged write {payload!r} ({epoch}, {seq}) was lost"
            self.judge_lost(payload, degraded, aside)
        assert len(kept) == len(primary.contents()), "a write was applied twice"

    def judge_lost(self, payload: bytes, degraded: bool, aside: set[bytes]) -> None:
        """An acknowledged write that is not in the common history after a forced promotion."""
        assert degraded, f"{payload!r} was on both disks and was lost"
        assert payload in aside, f"{payload!r} was neither kept nor quarantined"
        self.world.coverage.hit("quarantined_ack")
