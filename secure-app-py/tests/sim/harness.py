"""The pair machine in a simulated world: persist, send and answer as engine.py does, on a disk that
loses what was not synced and links that break, with writers, promoters and a judge outside.

`make sim SERVICE=secure SEED=7` replays a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from secure_store.core import machine
from secure_store.core.effects import (
    Append,
    AppendLog,
    Arrive,
    Durable,
    Effects,
    Event,
    Fetched,
    InstallSnapshot,
    Leave,
    LinkDown,
    LinkUp,
    LookedUp,
    Persisted,
    Promote,
    Received,
    SaveState,
    SnapshotSent,
    StageRows,
    Tick,
)
from secure_store.core.invariants import check_chain, check_early_sends, check_node, check_pair
from secure_store.core.messages import (
    Message,
    Mode,
    Role,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotRows,
)
from secure_store.core.pair import PairState
from secure_store.core.records import ORIGIN, Position, Record
from testkit.sim import (
    PERFECT,
    ROUGH,
    TIMED_OUT,
    Disk,
    DiskSettings,
    Faults,
    Harness,
    Host,
    LinkSettings,
    Scenario,
    World,
)

TICK_MS = 50
DIAL_MS = 100
QUIET_MS = 8_000  # writers stop
GAP_MS = 300  # a hole in the stream that lasts is a broken connection
LOG_KEPT = 12
FIFO = LinkSettings(delay_ms=(0.1, 1.0), slow=0.02, slow_ms=40.0, fifo=True)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


@dataclass(frozen=True, slots=True)
class Syn:
    """I dial you on this connection."""

    connection: tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One message of a connection's stream."""

    connection: tuple[str, int, int]
    number: int
    message: Message


@dataclass(frozen=True, slots=True)
class Reset:
    connection: tuple[str, int, int]


def wire(packet: Any) -> Any:
    """Every message crosses the real codec."""
    if isinstance(packet, Part):
        message = _decoder.decode(_encoder.encode(packet.message))
        return Part(packet.connection, packet.number, message)
    return packet


class Stream:
    """One end of a connection: an ordered stream over a network that orders nothing."""

    def __init__(self, link: int, connection: tuple[str, int, int], *, dialed: bool) -> None:
        self.link = link
        self.connection = connection
        self.dialed = dialed
        self.answered = not dialed
        self.sent = 0
        self.taken = 0
        self.early: dict[int, Message] = {}
        self.gap_since_ms: int | None = None


class SimNode:
    """Wraps the machine as engine.py does."""

    def __init__(self, host: Host, harness: PairHarness) -> None:
        self.host = host
        self.harness = harness
        self.state: PairState
        self.streams: dict[int, Stream] = {}
        self.links = 0
        self.life = host.rng.getrandbits(40)
        self.events: list[Event] = []
        self.undecided: list[Record] = []
        self.to_apply: list[Record] = []
        self.waiting: dict[int, tuple[bytes, Any]] = {}
        self.requests = 0
        self.promotions: dict[int, Any] = {}
        self.stepping = False
        self.to_commit: list[Any] = []  # persist operations for the next transaction
        self.committing = False

    # --- life ---------------------------------------------------------------------------------

    def start(self, disk: Disk) -> None:
        self.disk = disk
        applied: Position = disk.get("applied", ORIGIN)
        log: list[Record] = [r for r in disk.log() if r.seq > applied.seq]
        durable: Durable = disk.get("durable", Durable())
        check_chain(durable.cluster_id, disk.log())
        settings = self.harness.settings
        self.undecided = list(log)
        self.state, fx = machine.start(
            node_id=self.host.name,
            url=self.host.name,
            durable=durable,
            last=log[-1].position if log else applied,
            shown_seq=applied.seq,
            has_replica_flag=self.host.name == "A",
            may_found=False,
            mode_wanted=settings.mode if self.host.name == "A" else None,
            fresh_cluster_id=f"cluster-{self.life:x}",
            genesis=b"genesis",
            now_ms=self.host.now_ms(),
        )
        self.stepping = True
        self.run(fx)
        self.stepping = False
        self.drain()
        self.harness.note_durable(self)  # what a start finds, it has made durable (Database.claim)
        self.host.set_timer("tick", TICK_MS)
        self.host.set_timer("dial", 1)

    def on_stop(self) -> None:
        self.feed(Leave(0, self.host.now_ms()))

    def on_timer(self, name: str) -> None:
        if name == "tick":
            self.feed(Tick(self.host.now_ms()))
            self.host.set_timer("tick", TICK_MS)
            if self.to_apply:
                self.commit()
            self.break_gaps()
        else:
            self.host.set_timer("dial", DIAL_MS)
            self.dial()

    def on_sync_done(self, token: int) -> None:
        self.committing = False
        if self.to_commit:
            self.commit()
        if token:
            self.feed(Persisted(token, self.host.now_ms()))
            self.harness.note_durable(self)

    def on_sync_failed(self, token: int) -> None:
        self.host.halt("a failed fsync ends the node")

    # --- connections --------------------------------------------------------------------------

    def dial(self) -> None:
        """As transport/link.py: only a primary dials, one connection at a time."""
        mine = self.state.wished
        if mine.role is not Role.PRIMARY or not self.state.wants_replica:
            return
        for stream in list(self.streams.values()):
            if stream.dialed and not stream.answered:
                del self.streams[stream.link]
        if any(s.dialed for s in self.streams.values()):
            return
        self.links += 1
        connection = (self.host.name, self.life, self.links)
        self.streams[self.links] = Stream(self.links, connection, dialed=True)
        self.host.send(self.host.peers[0], Syn(connection))

    def on_message(self, source: str, packet: Any) -> None:
        match packet:
            case Syn(connection) if connection[0] != self.host.name:
                if not any(s.connection == connection for s in self.streams.values()):
                    self.links += 1
                    self.streams[self.links] = Stream(self.links, connection, dialed=False)
                    self.host.send(source, Syn(connection))
                    self.feed(LinkUp(self.links, False, self.host.now_ms()))
            case Syn(connection):
                for stream in list(self.streams.values()):
                    if stream.connection == connection and not stream.answered:
                        stream.answered = True
                        self.feed(LinkUp(stream.link, True, self.host.now_ms()))
            case Part(connection, number, message):
                self.take(source, connection, number, message)
            case Reset(connection):
                for stream in list(self.streams.values()):
                    if stream.connection == connection:
                        self.lose(stream)

    def take(self, source: str, connection: Any, number: int, message: Message) -> None:
        stream = next((s for s in self.streams.values() if s.connection == connection), None)
        if stream is None:
            self.host.send(source, Reset(connection))
            return
        if not stream.answered:  # the Syn's answer was overtaken
            stream.answered = True
            self.feed(LinkUp(stream.link, True, self.host.now_ms()))
        stream.early[number] = message
        while stream.taken + 1 in stream.early and stream.link in self.streams:
            stream.taken += 1
            taken = stream.early.pop(stream.taken)
            self.feed(Received(stream.link, taken, self.host.now_ms()))
        stream.gap_since_ms = self.host.now_ms() if stream.early else None

    def break_gaps(self) -> None:
        for stream in list(self.streams.values()):
            since = stream.gap_since_ms
            if since is not None and self.host.now_ms() - since > GAP_MS:
                self.reset(stream)

    def reset(self, stream: Stream) -> None:
        self.host.send(self.host.peers[0], Reset(stream.connection))
        self.lose(stream)

    def lose(self, stream: Stream) -> None:
        if self.streams.pop(stream.link, None) is not None:
            self.feed(LinkDown(stream.link, self.host.now_ms()))

    def on_peer_disconnected(self, peer: str) -> None:
        for stream in list(self.streams.values()):
            self.lose(stream)

    # --- the machine --------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        self.events.append(event)
        self.drain()

    def drain(self) -> None:
        if self.stepping:
            return
        self.stepping = True
        while self.events:
            self.run(machine.step(self.state, self.events.pop(0)))
        self.stepping = False

    def run(self, fx: Effects) -> None:
        self.persist(fx)
        for link, message in fx.send:
            stream = self.streams.get(link)
            if stream is not None:
                stream.sent += 1
                part = Part(stream.connection, stream.sent, message)
                self.host.send(self.host.peers[0], part)
        for link, _ in fx.close:
            stream = self.streams.get(link)
            if stream is not None:
                self.reset(stream)
        for fetch in fx.fetch:
            records = self.read_log(fetch.after_seq, fetch.up_to_seq)
            now_ms = self.host.now_ms()
            self.events.append(Fetched(fetch.link, fetch.after_seq, records, now_ms))
        for look_up in fx.look_up:
            position = self.position(look_up.seq)
            now_ms = self.host.now_ms()
            self.events.append(LookedUp(look_up.link, look_up.seq, position, now_ms))
        for wanted in fx.snapshot:
            self.send_snapshot(wanted)
        if fx.reset:
            self.harness.forget_shown(self)
        if fx.shown is not None:
            self.show(fx.shown)
        if fx.admit:
            entries = tuple((r, self.waiting[r][0]) for r in fx.admit)
            self.events.insert(0, Append(entries, self.host.now_ms()))
        for done in fx.done:
            payload, reply = self.waiting.pop(done.request)
            self.harness.acknowledged(self, payload, done)
            reply.resolve(("ok", done.degraded))
        for request, _ in fx.unknown:
            self.waiting.pop(request)[1].resolve(("unknown", None))
        for rejected in fx.reject:
            kind = "not_primary" if rejected.not_primary else "rejected"
            self.waiting.pop(rejected.request)[1].resolve((kind, None))
        for promotion in fx.promotions:
            self.promotions.pop(promotion.request).resolve(promotion)
        for note, _ in fx.notes:
            self.host.cover(note)

    def persist(self, fx: Effects) -> None:
        for op in fx.persist:
            if isinstance(op, AppendLog):
                self.undecided.extend(op.records)
            elif isinstance(op, InstallSnapshot):
                self.undecided.clear()
        self.to_commit += fx.persist
        if self.to_commit:
            self.commit()

    def commit(self) -> None:
        """As storage/writer.py: one transaction at a time, applying what is decided first."""
        if self.committing:
            return
        self.committing = True
        ops, self.to_commit = self.to_commit, []
        self.write_fold()
        for op in ops:
            match op:
                case AppendLog(_, records):
                    for record in records:
                        self.disk.append(record)
                case SaveState(_, saved):
                    self.disk.put("durable", saved)
                case StageRows(_, rows, first):
                    staged = () if first else self.disk.get("staged", ())
                    self.disk.put("staged", staged + rows)
                case InstallSnapshot(_, begin, saved):
                    self.install(begin, saved)
        self.disk.sync(ops[-1].number if ops else 0)

    def install(self, begin: SnapshotBegin, saved: Durable) -> None:
        if begin.set_aside:
            aside = (*self.disk.get("fold", ()), *(r.payload for r in self.disk.log()))
            self.disk.put("quarantine", self.disk.get("quarantine", ()) + aside)
            self.host.cover("quarantined")
        self.disk.remove_log("log")
        self.disk.put("fold", self.disk.get("staged", ()))
        self.disk.put("applied", begin.position)
        self.disk.put("durable", saved)
        self.host.cover("installed_snapshot")

    def write_fold(self) -> None:
        """Apply what is decided; keep the log short, so that snapshots are needed."""
        if not self.to_apply:
            return
        fold: tuple[bytes, ...] = self.disk.get("fold", ())
        self.disk.put("fold", fold + tuple(r.payload for r in self.to_apply))
        self.disk.put("applied", self.to_apply[-1].position)
        applied = self.to_apply[-1].seq
        self.to_apply.clear()
        log = self.disk.log()
        extra = sum(1 for r in log[: max(0, len(log) - LOG_KEPT)] if r.seq <= applied)
        if extra > LOG_KEPT:
            self.disk.drop_prefix(extra)

    def show(self, seq: int) -> None:
        while self.undecided and self.undecided[0].seq <= seq:
            record = self.undecided.pop(0)
            self.to_apply.append(record)
            self.harness.shown(self, record)

    def read_log(self, after_seq: int, up_to_seq: int) -> tuple[Record, ...] | None:
        durable = self.state.durable_seq
        log = [r for r in self.disk.log() if after_seq < r.seq <= min(up_to_seq, durable)]
        if not log:
            return () if after_seq >= durable else None
        return tuple(log) if log[0].seq == after_seq + 1 else None

    def position(self, seq: int) -> Position | None:
        if seq == 0:
            return ORIGIN
        applied: Position = self.disk.get("applied", ORIGIN)
        if applied.seq == seq:
            return applied
        return next((r.position for r in self.disk.log() if r.seq == seq), None)

    def send_snapshot(self, wanted: Any) -> None:
        stream = self.streams.get(wanted.link)
        if stream is None:
            return
        position: Position = self.disk.get("applied", ORIGIN)
        rows: tuple[bytes, ...] = self.disk.get("fold", ())
        messages: list[Message] = [
            SnapshotBegin(position, wanted.set_aside),
            *(SnapshotRows(rows[i : i + 10]) for i in range(0, len(rows), 10)),
            SnapshotEnd(len(rows)),
        ]
        for message in messages:
            stream.sent += 1
            part = Part(stream.connection, stream.sent, message)
            self.host.send(self.host.peers[0], part)
        self.host.cover("sent_snapshot")
        self.events.append(SnapshotSent(wanted.link, position, self.host.now_ms()))

    # --- what the harness asks ----------------------------------------------------------------

    def submit(self, payload: bytes, reply: Any) -> None:
        self.requests += 1
        self.waiting[self.requests] = (payload, reply)
        self.feed(Arrive(self.requests, self.host.now_ms()))

    def promote(self, force: bool, reply: Any) -> None:
        self.requests += 1
        self.promotions[self.requests] = reply
        self.feed(Promote(self.requests, force, self.host.now_ms()))

    def contents(self) -> list[bytes]:
        """Everything this node shows, in order."""
        fold: tuple[bytes, ...] = self.disk.get("fold", ())
        return [*fold, *(r.payload for r in self.to_apply)]


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
            assert degraded, f"{payload!r} was on both disks and was lost"
            assert payload in aside, f"{payload!r} was neither kept nor quarantined"
            self.world.coverage.hit("quarantined_ack")
        assert len(kept) == len(primary.contents()), "a write was applied twice"


class StrictHarness(PairHarness):
    settings = Settings(Mode.STRICT)


class PromotingHarness(PairHarness):
    settings = Settings(Mode.AVAILABLE, promotes=True)


class StrictPromotingHarness(PairHarness):
    settings = Settings(Mode.STRICT, promotes=True)


class ForcedHarness(PairHarness):
    settings = Settings(Mode.AVAILABLE, promotes=True, force=True)


FAULTS = Faults(
    crash=4, stop=2, pause=2, partition=2, one_way=1, power_cut=2, sync_failure=1, max_down=1,
    every_ms=(100, 900), drift_ppm=200,
)  # fmt: skip


def _scenario(name: str, harness: Any, faults: Faults = FAULTS) -> Scenario[SimNode]:
    return Scenario(
        name,
        nodes=("A", "B"),
        harness=harness,
        duration_ms=5_000,
        settle_ms=6_000,
        faults=faults,
        links=(PERFECT, FIFO, LinkSettings(), ROUGH),
        disk=DiskSettings(atomic=True),
        wire=wire,
    )


AVAILABLE = _scenario("available", PairHarness)
STRICT = _scenario("strict", StrictHarness)
PROMOTING = _scenario("promoting", PromotingHarness)
STRICT_PROMOTING = _scenario("strict_promoting", StrictPromotingHarness)
FORCED = _scenario(
    "forced",
    ForcedHarness,
    Faults(crash=2, pause=1, partition=5, power_cut=1, max_down=1, cut_ms=(500, 3_000)),
)
