"""One node of the simulated pair: the machine, with persisting, sending and answering around it as
in engine.py, storage/writer.py and transport/link.py, on a disk that loses what was not synced."""

from __future__ import annotations

from typing import Any

from pair_streams import Part, Reset, Stream, Syn

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
from secure_store.core.invariants import check_chain
from secure_store.core.messages import Message, Role, SnapshotBegin, SnapshotEnd, SnapshotRows
from secure_store.core.pair import PairState
from secure_store.core.records import ORIGIN, Position, Record
from testkit.sim import Disk, Host

TICK_MS = 50
DIAL_MS = 100
GAP_MS = 300  # a hole in the stream that lasts is a broken connection
LOG_KEPT = 12


class SimNode:
    """Wraps the machine as engine.py does."""

    def __init__(self, host: Host, harness: Any) -> None:
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
            has_replica_flag=self.host.name in self.harness.flagged,
            may_found=False,
            mode_wanted=settings.mode if self.host.name in self.harness.flagged else None,
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
        self.feed(Arrive((self.requests,), self.host.now_ms()))

    def promote(self, force: bool, reply: Any) -> None:
        self.requests += 1
        self.promotions[self.requests] = reply
        self.feed(Promote(self.requests, force, self.host.now_ms()))

    def contents(self) -> list[bytes]:
        """Everything this node shows, in order."""
        fold: tuple[bytes, ...] = self.disk.get("fold", ())
        return [*fold, *(r.payload for r in self.to_apply)]
