"""The only file where the rooms meet: event -> core step -> persist -> send -> reply.

```
links ──▶ replicator ──▶ effects ──▶ 1 store.persist    (durable later: replicator.durable)
clients ─▶ hosts ──▶ drafts ───┘     2 links.send       (in parallel with 1)
                                     3 lost, gained, committed ──▶ hosts ──▶ answers
```

Each partition that this node owns has a `Host`. What clients ask gathers there while the batches
before it are on their way, and leaves together, without a timer (`proposing`, `gathering`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from message_queue.admission import Place
from message_queue.api.events import EventHub
from message_queue.clocks import monotonic_ms, wall_ms
from message_queue.config import Config
from message_queue.copying import read_page
from message_queue.core.delivery.owner import NOTE_KEY, SETTINGS_KEY, PartitionOwner
from message_queue.core.ids import unpack_dot
from message_queue.core.messages import RING_PARTITION, PeerMessage, Spans
from message_queue.core.operations import (
    Answer,
    Forward,
    Forwarded,
    ForwardEnded,
    NodeMessage,
    Operation,
)
from message_queue.core.placement.membership import nodes
from message_queue.core.replication.config import NEVER_MS, ReplicationConfig
from message_queue.core.replication.dots import joined, runs_in
from message_queue.core.replication.effects import Effects, Gained, Lost, Read
from message_queue.core.replication.replicator import Replicator
from message_queue.hosting import Host
from message_queue.memory import MessageMemory
from message_queue.metrics import Metrics
from message_queue.notes import Notes
from message_queue.proposing import Proposer
from message_queue.ring_keeper import RingKeeper
from message_queue.routing import Router, target_of
from message_queue.storage.data_dir import DataDir
from message_queue.storage.log import Fsync, Trouble
from message_queue.storage.store import Store
from message_queue.transport.forwards import Serving
from message_queue.transport.links import Hello, Links
from message_queue.turn import Turn

log = logging.getLogger(__name__)

AnyMessage = PeerMessage | NodeMessage
TICK_S = 0.01
CORE_TICK_MS = 50
BUSY_TICK_MS = 100
"""While every partition has an owner, and no link or owner has changed for `RESTLESS_MS`;"""
IDLE_TICK_MS = 200
"""and nothing waits for a moment here: as often as heartbeats leave. A hang is noticed this much
later."""
RESTLESS_MS = 2_000
WATCH_MS = 200
CALM_WATCH_MS = 1_000
GENESIS_MS = 3_000


class Node:
    """Made by `open`; then `attach` the links, `start`, and at the end `stop`."""

    def __init__(
        self, config: Config, place: Place, metrics: Metrics, events: EventHub, data_dir: DataDir
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.events = events
        self.incarnation = data_dir.next_incarnation(wall_ms())
        self.hosts: dict[int, Host] = {}
        self.turn = Turn()
        self.router = Router(self)
        self.halted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = False
        self.keeper = RingKeeper(self, place, data_dir.path)
        members = nodes(place.ring)
        self.ids = {n: member.id for n, member in members.items()} | {
            config.position: config.node_id
        }
        self.addresses = {n: member.addr for n, member in members.items()} | {
            config.position: str(config.addr)
        }
        """As each node announces itself; `--peers` may name a proxy."""
        self.changed = asyncio.Event()
        """Set (and renewed) whenever an owner changed: who waits for one looks again."""
        self.store: Store
        self.replicator: Replicator
        self.links: Links[AnyMessage]
        self._proposer = Proposer(self)
        self._time_matters = asyncio.Event()
        self._timed: set[Host] = set()
        """Hosts in which something waits for a moment: an idle node looks at none."""
        self._notes = Notes(metrics, events)
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = Serving(self.send, self.router.here, self.router.begin_here, target_of)
        self.memory = MessageMemory(config.memory_bytes)
        self._stirred = True
        """Something was stored since the memory was looked at."""
        self._core_due_ms = self._restless_until_ms = 0
        self._leases_due: dict[int, int] = {}
        self._serves: dict[int, bool] = {}
        self._serves_ms = 0
        self._ticker: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, config: Config, place: Place, metrics: Metrics, events: EventHub, data_dir: DataDir
    ) -> Node:
        """Recover what the data directory holds. Raises OSError."""
        node = cls(config, place, metrics, events, data_dir)
        node.store = await Store.open(
            data_dir.path / "log",
            segment_bytes=config.segment_bytes,
            fsync=Fsync(config.fsync),
            on_durable=node._durable,
            on_halt=node._halt,
            on_trouble=node._trouble,
        )
        recovered = node.store.recovered
        now_ms = monotonic_ms()
        node.replicator = Replicator(
            ReplicationConfig(
                node=config.position,
                nodes=len(place.ring.members),
                incarnation=node.incarnation,
                membership=place.ring,
                pauses=True,
                genesis_ms=GENESIS_MS if config.found_with_majority else NEVER_MS,
                fresh=not node.store.states,
                seed=node.incarnation,
                wall_ms=wall_ms(),
            ),
            node.store.states,
            recovered.clock_ms,
            now_ms,
        )
        node.store.on_damage = node.report_damage
        node.store.position = config.position
        for warning in recovered.warnings:
            log.warning("%s", warning)
            events.publish("storage_warning", detail=warning)
        for segment, spans in recovered.damaged.items():
            log.error("segment %d has damaged records at bytes %s", segment, spans)
            events.publish("storage_damaged", segment=segment)
        if recovered.cut_bytes:
            log.warning("cut a torn write of %d bytes off the log's end", recovered.cut_bytes)
        log.info(
            "recovered %d puts from the snapshot and %d records behind it, incarnation %d",
            recovered.from_snapshot, recovered.frames, node.incarnation,
        )  # fmt: skip
        return node

    def attach(self, links: Links[AnyMessage]) -> None:
        """The links exist."""
        self.links = links

    def start(self) -> None:
        """Begin to take part."""
        self.store.start()
        self._ticker = asyncio.create_task(self._tick_loop(), name="ticker")

    async def stop(self) -> None:
        """Hand every partition over, flush, close. Within 3 s."""
        self.stopping = True
        self.wake()
        self._leases_due.clear()
        self._pass_leases_on(monotonic_ms())
        self.apply(self.replicator.yield_all(monotonic_ms()))
        until_s = asyncio.get_running_loop().time() + 2
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                while self.replicator.owned():
                    await self.changed.wait()
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        self._serving.stop()
        for host in list(self.hosts.values()):
            host.end(clean=False)
        await self.store.close()

    # ── the core's effects ──────────────────────────────────────────────────────────────────────

    def apply(self, fx: Effects) -> None:
        """Do what a step asks, in the order that `Effects` prescribes."""
        self._serves.clear()
        if fx.jumped_ms:
            for each in self.hosts.values():
                each.owner.postpone(fx.jumped_ms)
        if fx.batch:
            self._stirred = True
            self.store.persist(fx.batch, fx.persist)
        if fx.send:
            self.links.send_all(fx.send)
        for read in fx.reads:
            self.spawn(self._read(read))
        if fx.lost or fx.gained or fx.ring is not None:
            self._stir()
        for lost in fx.lost:
            self._lost(lost)
        for gained in fx.gained:
            if gained.partition == RING_PARTITION:
                continue  # no queue lives there
            self.spawn(self._gained(gained))
        now_ms = self.cluster_ms() if fx.committed else 0
        for committed in fx.committed:
            host = self.hosts.get(committed.partition)
            if host is not None and host.owner.epoch == committed.epoch:
                host.committed(committed.upto, now_ms)
        for partition, spans in fx.forget:
            self.store.forget(partition, spans)
        for partition in fx.pausing:
            self._pause(partition)
        if fx.ring is not None:
            self.keeper.adopted(fx.ring)
        for note in fx.notes:
            self._notes.tell(note)
            self.keeper.told(note)

    def _durable(self, batch: int) -> None:
        self.turn.step(self.apply, self.replicator.durable(batch, monotonic_ms()))

    def _lost(self, lost: Lost) -> None:
        host = self.hosts.get(lost.partition)
        if host is not None and host.owner.epoch == lost.epoch:
            del self.hosts[lost.partition]
            host.end(lost.clean)
        self.wake()

    async def _gained(self, gained: Gained) -> None:
        """Build the delivery machine. What the node's own disk does not have yet is on its way."""
        partition, epoch = gained.partition, gained.epoch
        state = self.replicator.state(partition)
        context = state.records.context
        shelf = self.store.shelf(partition)
        owner = PartitionOwner(partition, epoch, lambda dot: context.has(*unpack_dot(dot)), shelf)
        settings = {
            key: setting.value
            for key, setting in state.records.settings.items()
            if key.startswith(SETTINGS_KEY)
        }
        unreadable = owner.restore_settings(settings, self.cluster_ms())
        # In parts: a long pause of this loop would cost the very lease that was just won.
        missing: list[tuple[int, int, int]] = []
        flushed = False
        for chunk in list(state.held.numbered()):
            await asyncio.sleep(0)
            part = shelf.part(*chunk)
            if part.missing and not flushed:
                await self.store.flushed()
                flushed = True
                part = shelf.part(*chunk)
            if state.sealed != epoch or not self.owns(partition):
                return
            missing += runs_in(*unpack_dot(part.base), part.missing)
            unreadable += owner.restore_part(part, self.cluster_ms())
        if missing:
            log.error("partition %d: bodies are not on this disk: %s", partition, missing[:9])
            self.report_damage(partition, joined(missing))
            return
        if state.sealed != epoch or not self.owns(partition):
            return  # lost before it began, and nothing was there to look at on the way
        owner.restore_leases(gained.soft, self.cluster_ms())
        for sentence in unreadable:
            log.error("partition %d: unreadable %s", partition, sentence)
        host = Host(owner, self.store, self, self.metrics)
        self.hosts[partition] = host
        self.time_matters(host)
        notes = {k: s.value for k, s in state.records.settings.items() if k.startswith(NOTE_KEY)}
        host.mover.resume(notes)
        host.after()
        self.wake()

    def owns(self, partition: int) -> bool:
        """This node is the owner as far as it knows."""
        return self.replicator.owner(partition) == self.config.position

    async def _read(self, read: Read) -> None:
        try:
            found, lost = await read_page(self.store, read)
        except OSError as e:
            log.error("cannot read the log: %s", e)
            return  # the peer asks again
        self.apply(self.replicator.bodies_read(read, found, lost, monotonic_ms()))

    # ── what hosts ask (see hosting.Surroundings) ───────────────────────────────────────────────

    def cluster_ms(self) -> int:
        """Cluster time."""
        return self.replicator.cluster_ms(monotonic_ms())

    def wall_ms(self) -> int:
        """For people."""
        return wall_ms()

    def may_serve(self, partition: int) -> bool:
        """This node holds the partition's lease now. Asked for every request: what the core said
        holds within one millisecond, unless it took a step since (see `apply`)."""
        now_ms = monotonic_ms()
        if now_ms != self._serves_ms:
            self._serves.clear()
            self._serves_ms = now_ms
        serves = self._serves.get(partition)
        if serves is None:
            serves = self._serves[partition] = self.replicator.may_serve(partition, now_ms)
        return serves

    def flush_soon(self, host: Host) -> None:
        """Propose what it has gathered, when it is its turn."""
        self._proposer.flush_soon(host)

    def time_matters(self, host: Host) -> None:
        """Something waits for a moment there: tick it."""
        self._timed.add(host)
        self._time_matters.set()

    def report_damage(self, partition: int, lost: Spans) -> None:
        """Records are unreadable here: fetch them again."""
        self.metrics.damaged_records += len(lost)
        self.events.publish("storage_damaged", partition=partition, records=len(lost))
        self.apply(self.replicator.damaged(partition, lost, monotonic_ms()))

    async def ask(self, operation: Operation) -> Answer:
        """Have the owner of another partition do something."""
        return await self.router.ask(operation)

    # ── links ───────────────────────────────────────────────────────────────────────────────────

    def send(self, position: int, message: NodeMessage) -> bool:
        """Queue a message for a peer."""
        return self.links.send(position, message)

    def on_batch(self, position: int, incarnation: int, batch: Sequence[AnyMessage]) -> None:
        """A frame came in."""
        self.turn.step(self._take, position, incarnation, batch)

    def _take(self, position: int, incarnation: int, batch: Sequence[AnyMessage]) -> None:
        for_core: list[PeerMessage] = []
        for message in batch:
            match message:
                case Forward():
                    self._serving.serve(position, message)
                case Forwarded(number, answer):
                    self.router.forwards.answered(position, number, answer)
                case ForwardEnded(number):
                    self._serving.ended(position, number)
                case _:
                    for_core.append(message)
        if for_core:
            now_ms = monotonic_ms()
            self.apply(self.replicator.receive_all(position, incarnation, tuple(for_core), now_ms))

    def on_up(self, hello: Hello) -> None:
        """This node's link to a peer stands."""
        self._stir()
        self.metrics.peers_connected += 1
        self.ids[hello.position] = hello.node_id
        self.addresses[hello.position] = hello.addr
        self.keeper.heard(hello.position, hello.addr, hello.node_id)
        self.events.publish("peer_up", position=hello.position, id=hello.node_id)
        log.info("link to %s is up", hello.node_id)
        self.apply(self.replicator.peer_connected(hello.position, monotonic_ms()))

    def on_down(self, position: int) -> None:
        """It broke: nobody there waits for answers any more, and what was asked is in doubt."""
        self._stir()
        self.metrics.peers_connected -= 1
        self.events.publish("peer_down", position=position)
        log.info("link to %s is down", self.ids.get(position, position))
        self.router.forwards.peer_lost(position)
        self._serving.peer_lost(position)
        self.apply(self.replicator.peer_disconnected(position, monotonic_ms()))
        self.wake()

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    async def _tick_loop(self) -> None:
        loop = asyncio.get_running_loop()
        watch_due_ms = 0
        while True:
            now_ms = monotonic_ms()
            if self._timed:
                self._core_due_ms = min(self._core_due_ms, now_ms + BUSY_TICK_MS)
            if now_ms >= self._core_due_ms:
                calm = self.router.every_partition_is_served and now_ms > self._restless_until_ms
                every_ms = BUSY_TICK_MS if self._timed else IDLE_TICK_MS
                self._core_due_ms = now_ms + (every_ms if calm else CORE_TICK_MS)
                # First: a tick may hand a partition over, with the leases that were told last.
                self._pass_leases_on(now_ms)
                if self._stirred:
                    self._stirred = False
                    in_play = sum(host.owner.memory_bytes for host in self.hosts.values())
                    self.memory.look(in_play, self.store.index_bytes)
                self.apply(self.replicator.tick(now_ms))
            loop_s = loop.time()
            if now_ms >= watch_due_ms:
                calm = self.router.every_partition_is_served
                watch_due_ms = now_ms + (CALM_WATCH_MS if calm else WATCH_MS)
                self.router.watch_owners(loop_s)
            cluster_ms = self.cluster_ms()
            pause_s = (self._core_due_ms - now_ms) / 1000
            for host in list(self._timed):
                due_s = None if host.ended else host.tick(loop_s, cluster_ms)
                if due_s is None:
                    self._timed.discard(host)
                else:
                    pause_s = min(pause_s, due_s)
            self._serving.tick(loop_s)
            self.router.forwards.tick(loop_s)
            # Until something is due, or somebody says that time matters; at most 100 times a
            # second, however often it is said.
            self._time_matters.clear()
            if pause_s > TICK_S:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._time_matters.wait(), pause_s)
            await asyncio.sleep(max(0.0, loop_s + TICK_S - loop.time()))

    def _stir(self) -> None:
        """Something may have to be done before long: an election, a hand-over."""
        now_ms = monotonic_ms()
        self._restless_until_ms = now_ms + RESTLESS_MS
        if self._core_due_ms > now_ms + CORE_TICK_MS:
            self._core_due_ms = now_ms + CORE_TICK_MS
            self._time_matters.set()

    def _pause(self, partition: int) -> None:
        """A partition is about to be handed over and hands nothing out any more: its leases as they
        stand now go along, so that the successor delivers nothing twice."""
        host = self.hosts.get(partition)
        leases = host.owner.leases() if host is not None else None
        self.apply(self.replicator.paused(partition, leases, monotonic_ms()))

    def _pass_leases_on(self, now_ms: int) -> None:
        for partition, host in self.hosts.items():
            if self._leases_due.get(partition, 0) > now_ms:
                continue
            leases = host.owner.leases()
            if leases is not None:
                # Many are told less often: about 1 MB/s a partition at most.
                self._leases_due[partition] = now_ms + len(leases) // 1000
                self.apply(self.replicator.soft(partition, leases))

    # ── the process ─────────────────────────────────────────────────────────────────────────────

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; a failure halts the node rather than going unseen."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("a background task failed", exc_info=failure)
            self._halt(f"a background task failed: {failure}")

    async def changes(self, timeout_s: float) -> None:
        """Until an owner or the ring changes, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()

    def wake(self) -> None:
        """Something changed that others may wait for."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _halt(self, reason: str) -> None:
        if not self.halted.done():
            log.critical("halting: %s", reason)
            self.halted.set_result(reason)

    def _trouble(self, trouble: Trouble | None) -> None:
        if trouble is None:
            log.warning("the disk takes messages again")
        else:
            log.error("%s: new messages are refused, acks are still taken", trouble.value)
        self.events.publish("disk", trouble=trouble.value if trouble else None)
