"""The only file where the rooms meet: event -> core -> send, persist, apply, answer.

Every event (a request, a peer's message, a finished write, a timer) changes the Raft core at once
and schedules one `_flush` for this turn of the loop. The flush proposes what gathered, then does
what the core's Effects ask for, in the order of their fields. Requests that arrive while a batch
is on its way gather for the next one: that is group commit, without a timer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from time import perf_counter

from lock_manager.api.directory import Directory
from lock_manager.api.errors import ApiError, NotLeader
from lock_manager.api.events import EventHub
from lock_manager.api.gathering import Gathering
from lock_manager.api.operators import Operators
from lock_manager.api.pending import Desk, Listener, Pending, Proposed
from lock_manager.api.reads import Reads
from lock_manager.api.reporting import Reporter
from lock_manager.api.standing import peers, standing
from lock_manager.config import Config
from lock_manager.core.cluster_clock import ClusterClock
from lock_manager.core.locks import views
from lock_manager.core.locks.commands import (
    Batch,
    Command,
    ForceRelease,
    LeaderStarted,
    decode_batch,
    encode_batch,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import Reply
from lock_manager.core.peer_book import PROTOCOL, Hello, PeerBook
from lock_manager.core.raft import (
    Accepted,
    Configuration,
    ConfigurationChanged,
    ConfigurationCommitted,
    Entry,
    EntryKind,
    Member,
    Message,
    Note,
    RaftConfig,
    Role,
    SteppedDown,
    WonElection,
)
from lock_manager.core.raft.core import RaftCore
from lock_manager.metrics import Metrics
from lock_manager.storage import Store, StoreFailed
from lock_manager.storage.snapshots import Snapshots
from lock_manager.transport import Links

log = logging.getLogger(__name__)

# Batches proposed and not applied: while one is on the disks, the next is taken in.
BATCHES_UNDER_WAY = 4
# An idle leader of a cluster that waits for anything logs the time this often (guarantee 8).
STAMP_EVERY_MS = 1_000
CATCH_UP_S = 0.005  # of a turn of the loop, for applying and for reading a snapshot
KEEP_ONE_IN = 10  # of the entries before a snapshot: for followers that are a little late


class Node:
    """One member of the cluster. Everything runs on one event loop."""

    def __init__(self, config: Config, store: Store, metrics: Metrics, events: EventHub) -> None:
        self._config = config
        self._store = store
        self._metrics = metrics
        # Ends the process: (exit code, why).
        self.halted: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        bootstrap = Configuration(
            () if config.join else tuple(Member(node_id=i + 1) for i in range(len(config.peers)))
        )
        raft = RaftConfig(
            node_id=config.position,
            bootstrap=bootstrap,
            election_timeout_ms=config.election_timeout_ms,
            heartbeat_ms=config.heartbeat_ms,
            # Nobody waits for a follower to apply: the commit travels with the next entries or the
            # next heartbeat, and saves half of all messages.
            eager_commit=False,
        )
        self._core = RaftCore(raft, store.restored, random.SystemRandom().randrange, self._now_ms())
        self._machine = LockMachine()
        self._applied = 0
        self._behind: deque[Entry] = deque()  # committed, and not applied yet
        self._clock = ClusterClock()
        self._desk = Desk()
        self._gathering = Gathering(self._loop, lambda: self._desk.mail, self._wake)
        self._reads = Reads()
        self._begun_term = 0  # the last one that this node led
        self._logged_ms = 0  # cluster time of the last stamp that this leader proposed
        self._snapshots = Snapshots(self._loop, self._take_snapshot)
        self._flush_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._stopping = False
        self.me = Hello(
            protocol=PROTOCOL,
            position=config.position,
            node_id=config.node_id,
            store_id=store.store_id,
        )
        self.book = PeerBook(self.me, store.peers, store.bind_peer)
        self._directory = Directory(config, self.book)
        self._reporter = Reporter(config, metrics, events, self._directory)
        self.operators = Operators(self._core, self._directory, self._now_ms, self._wake)
        self.links: Links | None = None

    @property
    def _leads(self) -> bool:
        return self._core.role is Role.LEADER

    def start(self, links: Links) -> None:
        """Begin to take part."""
        self.links = links
        self._store.start(self._on_persisted, self._on_store_failed)
        self._follow_configuration(self._core.configuration)
        self._wake()

    # -------------------------------------------------------------------------------------- events

    def on_messages(self, position: int, messages: list[Message]) -> None:
        now = self._now_ms()
        for message in messages:
            self._core.step(message, now)
        self._flush()

    def on_broken(self, position: int) -> None:
        self._core.peer_disconnected(position, self._now_ms())
        self._wake()

    def _on_persisted(self, seq: int) -> None:
        self._core.persisted(seq, self._now_ms())
        self._flush()

    def _on_store_failed(self, error: StoreFailed) -> None:
        self.halt(f"the store failed, nothing can be promised any more: {error}")

    def _on_timer(self) -> None:
        self._timer = None
        now = self._now_ms()
        if now >= self._core.next_deadline_ms:
            self._core.tick(now)
            self._record_members()
        self._wake()

    def halt(self, reason: str, code: int = 1) -> None:
        """Take no further part; `server` ends the process with this exit code."""
        if not self.halted.done():
            self._stopping = True
            self._snapshots.stop_writing()
            self._give_up_leadership()
            self._desk.refuse_mail(self.operators.elsewhere())
            self.halted.set_result((code, reason))

    # --------------------------------------------------------------------------------------- flush

    def _wake(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._on_wake)

    def _on_wake(self) -> None:
        self._flush_scheduled = False
        self._flush()

    def _flush(self) -> None:
        """What a scheduled flush does; peers and the disk need not wait for it: each of their
        events brings a batch of news already."""
        if self.halted.done() or self.links is None:
            return
        try:
            self._do_what_is_due(self.links)
        except Exception as error:
            # A node that could not apply an entry would differ from the others from now on.
            log.exception("a bug, or a log that this version cannot read")
            self.halt(f"cannot go on after {type(error).__name__}: {error}")

    def _do_what_is_due(self, links: Links) -> None:
        core = self._core
        until_s = perf_counter() + CATCH_UP_S
        if self._behind or self._snapshots.reading:
            self._catch_up(until_s)
            self._reads.serve(self._applied)
            self._compact()
        self._propose()
        self._reads.ask(core.read_index)
        while core.has_effects:
            effects = core.drain()
            links.send(effects.messages)
            if effects.persist is not None:
                self._store.submit(effects.persist, leading=self._leads)
            if effects.restore is not None:
                self._restore(effects.restore.index, effects.restore.data)
            for note in effects.notes:
                self._note(note)
            self._behind.extend(effects.committed)
            self._catch_up(until_s)
            for ready in effects.reads_ready:
                self._reads.confirm(ready.read_id, ready.index)
            self._reads.serve(self._applied)
            for read_id in effects.reads_refused:
                self._reads.refuse(read_id, self.operators.elsewhere())
            if effects.committed:
                self._propose()
                self._compact()
        self._set_timer()

    def _propose(self) -> None:
        """Put what gathered into the log, or the time, if something ends by it."""
        if not self._leads:
            if self._desk.has_mail:
                self._desk.refuse_mail(self.operators.elsewhere())
            return
        if self._begun_term != self._core.term:
            self._begin_term()
        cluster_ms = self._clock.observe(self._now_ms())
        self._core.advance_stamp(cluster_ms)
        while self._desk.has_mail and self._may_propose():
            mail = self._desk.take_mail()
            if mail and not self._propose_batch(mail, cluster_ms):
                return
        due = self._stamp_due_ms()
        if due is not None and cluster_ms >= due:
            self._propose_batch([], cluster_ms)

    def _may_propose(self) -> bool:
        return self._desk.batches_under_way < BATCHES_UNDER_WAY and self._gathering.is_over()

    def _begin_term(self) -> None:
        """Go on with cluster time; and before any other command of this term, also of requests
        that came in the turn of the election, tell the machine that there is a new leader."""
        self._begun_term = self._core.term
        self._clock.lead(max(self._core.stamp_ms, self._machine.now_ms), self._now_ms())
        self._logged_ms = self._clock.now_ms
        self._desk.put_back([Pending(LeaderStarted(), None)])

    def _stamp_due_ms(self) -> int | None:
        """When the log needs the time though nobody asks for anything; None: it does not, or a
        batch that is on its way brings it."""
        due = self._machine.next_due_ms()
        if due is None or self._desk.batches_under_way or self._core.transferring:
            return None
        return max(min(due, self._logged_ms + STAMP_EVERY_MS), self._machine.now_ms + 1)

    def _propose_batch(self, mail: list[Pending], cluster_ms: int) -> bool:
        commands = [pending.command for pending in mail]
        batch = Batch(cluster_ms, commands, self._config.lock_delay_ms)
        result = self._core.propose([encode_batch(batch)])
        if isinstance(result, Accepted):
            self._logged_ms = cluster_ms
            self._gathering.proposed(len(mail))
            self._desk.proposed(
                result.first_index, Proposed(result.term, batch, mail, perf_counter())
            )
            return True
        # Too much under way, or leadership is being handed over: soon it is taken, or redirected.
        self._desk.put_back(mail)
        return False

    # --------------------------------------------------------------------------------------- apply

    def _apply(self, entry: Entry) -> None:
        self._applied = entry.index
        own = self._desk.take_proposed(entry.index, entry.term)
        self.operators.applied(entry)
        if entry.kind is not EntryKind.COMMAND:
            self._machine.applied_index = entry.index
            return
        batch = own.batch if own is not None else decode_batch(entry.payload)
        outcomes = self._machine.apply(entry.index, batch)
        self._clock.hear(self._machine.now_ms)  # after a restart the log knows the time best
        follow_up: list[Command] = []
        if own is not None:
            self._metrics.commit_ms.observe((perf_counter() - own.since_s) * 1000)
            follow_up += self._desk.answer(own.pendings, outcomes)
        if outcomes.resolutions:
            follow_up += self._desk.resolve(outcomes.resolutions)
        if self._leads:
            for command in follow_up:
                self._desk.submit(command, None)
        self._reporter.applied(batch, outcomes)

    # ----------------------------------------------------------------------------------- snapshots

    def _restore(self, index: int, data: bytes) -> None:
        """A snapshot takes the place of what is applied; until it is read, that stays as it is."""
        self._snapshots.read(index, data)
        self._behind.clear()

    def _catch_up(self, until_s: float) -> None:
        """Bring the machine up to what is committed, as far as this turn of the loop allows: peers
        and clients must not wait for a long log or a large snapshot.

        Raises SnapshotError for a snapshot that this version cannot read: the node halts."""
        while self._behind or self._snapshots.reading:
            if not self._snapshots.reading:
                self._apply(self._behind.popleft())
            elif (read := self._snapshots.read_some()) is not None:
                self._snapshots.scrap(self._machine)
                self._applied, self._machine = read
                self._clock.hear(self._machine.now_ms)
            if perf_counter() > until_s:
                self._wake()
                return

    def _compact(self) -> None:
        """Begin a snapshot when the log has grown long."""
        grown = self._applied - self._core.snapshot_index
        if grown >= self._config.snapshot_entries and not self._snapshots.writing:
            self._snapshots.write(self._machine)

    def _take_snapshot(self, index: int, data: bytes) -> None:
        keep = self._config.snapshot_entries // KEEP_ONE_IN
        self._core.snapshot_taken(index, data, keep)
        self._metrics.snapshots += 1
        log.info("snapshot at index %d, %d bytes", index, len(data))
        self._wake()

    # --------------------------------------------------------------------------------------- notes

    def _note(self, note: Note) -> None:
        self._reporter.noted(note)
        match note:
            case WonElection():
                self._record_members()
            case SteppedDown():
                if not self._leads:
                    self._clock.follow()
                self._give_up_leadership()
            case ConfigurationChanged(_, configuration):
                self._follow_configuration(configuration)
            case ConfigurationCommitted(_, _, included):
                if not included:
                    self.halt("this node was removed from the cluster", code=0)
            case _:
                pass

    def _give_up_leadership(self) -> None:
        self._desk.leadership_lost()
        self._reads.refuse_all(self.operators.elsewhere())
        self.operators.leadership_lost()

    def _follow_configuration(self, configuration: Configuration) -> None:
        self.book.follow(configuration)
        if self.links is not None:
            self.links.connect(self._directory.dialled(configuration))

    def _record_members(self) -> None:
        """Write into the configuration who was met at first contact (guarantee 10)."""
        if self._leads:
            member = self.book.unrecorded()
            if member is not None:
                self._core.update(member)

    # --------------------------------------------------------------------------------------- timer

    def _set_timer(self) -> None:
        at = self._core.next_deadline_ms / 1000
        if self._leads:
            due = self._stamp_due_ms()
            if due is not None:
                at = min(at, self._loop.time() + max(0, due - self._clock.now_ms) / 1000)
        if self._timer is not None:
            if self._timer_at <= at:
                return  # it will find out that it was too early, and be set again
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at + 0.0005, self._on_timer)

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    # ------------------------------------------------------------------------- what the api asks

    def begin(self, command: Command, listener: Listener) -> Pending:
        if self._stopping or not self._leads:
            raise self.operators.elsewhere()
        if isinstance(command, ForceRelease):
            log.warning(
                "operator releases lock %r (client %r): %s",
                command.lock_name,
                command.client_id or "*",
                command.reason,
            )
        pending = self._desk.submit(command, listener)
        self._wake()
        return pending

    def abandon(self, pending: Pending) -> None:
        for command_to_follow in self._desk.abandon(pending):
            self._desk.submit(command_to_follow, None)
        self._wake()

    async def execute(self, command: Command) -> Reply:
        future: asyncio.Future[Reply] = self._loop.create_future()
        pending = self.begin(command, future)
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(pending)
            raise

    def confirmation(self) -> asyncio.Future[None]:
        if not self._leads:
            raise self.operators.elsewhere()
        self._wake()
        return self._reads.confirmation(self._loop)

    async def confirm_leadership(self) -> None:
        await self.confirmation()

    def lock(self, lock_name: str) -> views.LockView:
        return views.lock(self._machine, lock_name, self._cluster_ms())

    def locks(self, most: int) -> tuple[list[views.LockView], bool]:
        return views.locks(self._machine, self._cluster_ms(), most)

    def wait_graph(self, most: int) -> tuple[list[views.Edge], bool]:
        return views.wait_graph(self._machine, most)

    def validate(self, lock_name: str, fencing_token: int) -> bool:
        return views.validate(self._machine, lock_name, fencing_token)

    def status(self) -> dict[str, object]:
        leader_id, leader = self._leader()
        reached = self.links.connected if self.links is not None else frozenset()
        return {
            **standing(self._core),
            "id": self._config.node_id,
            "leader_id": leader_id,
            "leader": leader,
            "applied_index": self._applied,
            "cluster_time_ms": self._cluster_ms(),
            "locks": len(self._machine.table.locks),
            "waiters": len(self._machine.table.waiters),
            "peers": peers(self._core, self._directory, reached | {self._config.position}),
        }

    def measure(self) -> Metrics:
        metrics = self._metrics
        metrics.is_leader = int(self._leads)
        metrics.term = self._core.term
        metrics.applied_index = self._applied
        metrics.locks = len(self._machine.table.locks)
        metrics.waiters = len(self._machine.table.waiters)
        if self.links is not None:
            self.links.measure(metrics)
        return metrics

    def not_ready_because(self) -> str | None:
        if self._stopping:
            return "The node is stopping"
        if self._snapshots.reading:
            return "The node is reading a snapshot"
        return "No leader" if self._core.leader_id is None else None

    async def stop(self) -> None:
        """Hand leadership over, then answer whoever still waits. The store's owner closes it."""
        if self._leads and len(self._core.configuration.voters) > 1:
            try:
                name = await self.operators.transfer(None)
                log.info("leadership handed over to %s", name)
            except (ApiError, NotLeader) as error:
                log.warning("leadership could not be handed over: %s", error)
        self._stopping = True
        self._give_up_leadership()
        self._desk.refuse_mail(self.operators.elsewhere())
        if self._timer is not None:
            self._timer.cancel()

    def _cluster_ms(self) -> int:
        if self._leads:
            return self._clock.observe(self._now_ms())
        return max(self._core.stamp_ms, self._machine.now_ms)

    def _leader(self) -> tuple[str | None, str | None]:
        return self._directory.leader(self._core.configuration, self._core.leader_id)
