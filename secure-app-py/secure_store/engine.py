"""Runs the pair machine: event -> core.step -> persist -> send -> tell the clients, in that order.

The machine decides, this file does. Everything here happens on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path

from secure_store.core import machine, plan
from secure_store.core.audit import Told
from secure_store.core.changes import Change, decode_changes, encode_changes
from secure_store.core.effects import (
    Append,
    AppendLog,
    Arrive,
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
    Promotion,
    Received,
    SendSnapshot,
    SnapshotSent,
    Tick,
)
from secure_store.core.messages import (
    Message,
    Role,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotRows,
)
from secure_store.core.pair import BATCH_BYTES, BATCH_RECORDS, PairState
from secure_store.core.records import Position, Record
from secure_store.gathering import Gathering
from secure_store.storage.database import Database
from secure_store.storage.fold import Decided
from secure_store.storage.view import View
from secure_store.storage.writer import Writer
from secure_store.transport.link import AuditHead, Links
from secure_store.waiting import Waiting

log = logging.getLogger(__name__)

TICK_S = 0.05


def clock_ms() -> int:
    """Monotonic milliseconds, for the machine."""
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    """UTC milliseconds, for what is stored and shown."""
    return time.time_ns() // 1_000_000


class Engine:
    """`open_reader` gives another connection to the same database (for snapshots)."""

    def __init__(
        self,
        state: PairState,
        *,
        view: View,
        reader: Database,
        open_reader: Callable[[], Database],
        replica_flag: str | None,
        on_shown: Callable[[tuple[Change, ...], Position], int],
        on_told: Callable[[], None],
        on_reset: Callable[[int], None],
        on_note: Callable[[str, str], None],
        on_head: Callable[[AuditHead], None],
        next_head: Callable[[int], AuditHead | None],
        next_told: Callable[[], tuple[Told, int]],
        on_failed: Callable[[str], None],
    ) -> None:
        self.state = state
        self.view = view
        self._reader = reader
        self._open_reader = open_reader
        self._replica_flag = replica_flag
        self._on_shown = on_shown
        self._on_told = on_told
        self._on_reset = on_reset
        self._on_note = on_note
        self._on_head = on_head
        self._next_head = next_head
        self._next_told = next_told
        self._on_failed = on_failed
        self.writer: Writer | None = None
        self.links: Links | None = None
        self._events: deque[Event] = deque()
        self._arriving: list[int] = []
        self._stepping = False
        self.waiting = Waiting()
        self._undecided: deque[tuple[Record, tuple[Change, ...]]] = deque()
        self._planned: deque[tuple[int, tuple[Change, ...]]] = deque()
        self._viewed_seq = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._gathering = Gathering(self._loop, lambda: len(self._arriving), self._arrive)
        self.last_head_s = 0.0

    def start(self, writer: Writer, links: Links, recovered: Iterable[Record], fx: Effects) -> None:
        """Go on where the disk left off: `recovered` is the log beyond what is applied."""
        self.writer = writer
        self.links = links
        applied = self._reader.applied().seq
        self._viewed_seq = applied
        self._keep(tuple(recovered))
        writer.start()
        self._stepping = True
        self._run(fx)
        self._stepping = False
        self._drain()
        self._spawn(self._ticking())

    # --- the clients' side --------------------------------------------------------------------

    async def write(self, write: plan.Write) -> plan.Written:
        """Decide one write. Raises plan's errors: Rejected, OutcomeUnknown, OpFailed, KeyReused,
        Full."""
        request, future = self.waiting.write(write)
        if not self._arriving:  # those that gather are planned and appended together
            self._gathering.begin()
        self._arriving.append(request)
        return await future

    def _arrive(self) -> None:
        arrived, self._arriving = tuple(self._arriving), []
        self.feed(Arrive(arrived, clock_ms()))

    async def promote(self, *, force: bool) -> Promotion:
        request, future = self.waiting.promotion()
        self.feed(Promote(request, force, clock_ms()))
        return await future

    async def leave(self) -> None:
        """Seal, if there is an in-step replica to seal for."""
        request, future = self.waiting.leave()
        self.feed(Leave(request, clock_ms()))
        await future

    async def stop(self) -> None:
        """Write everything down and let go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.links is not None:
            await self.links.stop()
        if self.writer is not None:
            await self.writer.stop()

    # --- the links' and the writer's side -----------------------------------------------------

    def on_frame(self, link: int, messages: Sequence[Message | AuditHead]) -> None:
        for message in messages:
            if isinstance(message, AuditHead):
                self._on_head(message)
            else:
                self._events.append(Received(link, message, clock_ms()))
        self._drain()

    def on_up(self, link: int, dialed: bool) -> None:
        self.feed(LinkUp(link, dialed, clock_ms()))

    def on_down(self, link: int) -> None:
        self.feed(LinkDown(link, clock_ms()))

    def on_durable(self, number: int, applied_seq: int) -> None:
        """The writer has committed; `number` 0: only what was decided went to the tables."""
        self.view.applied(applied_seq)
        if number:
            self.feed(Persisted(number, clock_ms()))

    def on_disk_failed(self, reason: str) -> None:
        """Nothing can be promised any more: the node ends."""
        self._on_failed(reason)

    def on_quarantine(self, copy: Path) -> None:
        """What this node had beyond the common history was set aside."""
        details = f"this node's own history was replaced; a copy is kept in {copy}"
        self._on_note("quarantined", details)

    async def _ticking(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.feed(Tick(clock_ms()))
            self.waiting.tick()
            if self.writer is not None:
                self.writer.note_told(*self._next_told())
            session = self.state.session
            if session is not None and time.monotonic() - self.last_head_s >= 1.0:
                self._send_head(session.link)

    # --- the machine --------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Give the machine an event and do what it wants done."""
        self._events.append(event)
        self._drain()

    def _drain(self) -> None:
        if self._stepping:
            return  # an effect led to an event: it is taken up when this one is done
        self._stepping = True
        try:
            while self._events:
                self._run(machine.step(self.state, self._events.popleft()))
        finally:
            self._stepping = False
        if self.links is not None:
            self.links.flush()
        self._follow_role()

    def _run(self, fx: Effects) -> None:
        """Carry out effects, in the order that effects.py lays down."""
        if fx.persist:
            self._persist(fx)
        if fx.send:
            self._send(fx.send)
        for link, why in fx.close:
            log.debug("closing the link to the other node: %s", why)
            if self.links is not None:
                self.links.close(link)
        for fetch in fx.fetch:
            records = self._reader.read_log(fetch.after_seq, BATCH_RECORDS, BATCH_BYTES)
            if records is not None:
                records = tuple(r for r in records if r.seq <= fetch.up_to_seq)
            self._events.append(Fetched(fetch.link, fetch.after_seq, records, clock_ms()))
        for look_up in fx.look_up:
            position = self._reader.position(look_up.seq)
            self._events.append(LookedUp(look_up.link, look_up.seq, position, clock_ms()))
        for wanted in fx.snapshot:
            self._spawn(self._send_snapshot(wanted))
        if fx.reset:
            self._reset()
        lines = self._show(fx.shown) if fx.shown is not None else {}
        if fx.admit:
            self._admit(fx.admit)
        self.waiting.answer(fx, lines)
        for event, details in fx.notes:
            self._on_note(event, details)

    def _persist(self, fx: Effects) -> None:
        for op in fx.persist:
            if isinstance(op, AppendLog):
                self._keep(op.records)
            elif isinstance(op, InstallSnapshot):
                self._undecided.clear()
                self._viewed_seq = op.begin.position.seq
        if self.writer is not None:
            self.writer.persist(fx.persist, is_primary=self.state.is_primary)

    def _keep(self, records: tuple[Record, ...]) -> None:
        """Appended records wait here for their decision. The head view is brought up to the log's
        end at once, also by a replica and by a primary that takes over its replica's tail: a record
        may be decided in this very step, and who plans next plans on the head."""
        for record in records:
            if self._planned and self._planned[0][0] == record.seq:
                changes = self._planned.popleft()[1]
            else:
                changes = decode_changes(record.payload)
            self._undecided.append((record, changes))
            self._view_head(record, changes)

    def _view_head(self, record: Record, changes: tuple[Change, ...]) -> None:
        if record.seq > self._viewed_seq:
            self.view.append(changes, record.seq)
            self._viewed_seq = record.seq

    def _send(self, messages: list[tuple[int, Message]]) -> None:
        if self.links is None:
            return
        for link, message in messages:
            self.links.send(link, message)
        self._send_head(messages[-1][0])

    def _send_head(self, link: int) -> None:
        """The end of our audit chain goes with every message to the other node."""
        session = self.state.session
        if session is None or session.link != link or self.links is None:
            return
        head = self._next_head(link)
        self.last_head_s = time.monotonic()
        if head is not None:
            self.links.send(link, head)

    def _show(self, seq: int) -> dict[int, int]:
        """Decided: reads see it, the tables get it, whoever waited behind it goes on. Gives the
        audit line's number of each record that has one."""
        decided: list[Decided] = []
        lines: dict[int, int] = {}
        has_lines = False
        while self._undecided and self._undecided[0][0].seq <= seq:
            record, changes = self._undecided.popleft()
            decided.append(Decided(changes, record.position))
            self.view.show(changes, record.seq)
            lines[record.seq] = line = self._on_shown(changes, record.position)
            has_lines = has_lines or line > 0
        if decided and self.writer is not None:
            self.writer.apply(decided)
        if has_lines:
            self._on_told()
        self.waiting.shown(seq)
        return lines

    def _reset(self) -> None:
        """A snapshot has replaced the tables."""
        self.view.reset()
        self._on_reset(self.state.shown_seq)
        self._viewed_seq = self.state.shown_seq
        for record, changes in self._undecided:
            self._view_head(record, changes)

    def _admit(self, requests: list[int]) -> None:
        """Plan admitted writes, each on top of the ones before it, and append what they change."""
        entries: list[tuple[int, bytes]] = []
        seq = self.state.last.seq
        now_ms = wall_ms()
        for request in requests:
            try:
                planned = plan.plan(self.waiting.asked(request), self.view, now_ms)
            except Exception as e:  # noqa: BLE001 - a refusal, damaged data, or a bug: this one's
                self.waiting.after(seq, self.state.shown_seq, request, e)
                continue
            self.waiting.planned(request, planned)
            if not planned.changes:
                self.waiting.after(seq, self.state.shown_seq, request, None)
                continue
            seq += 1
            self.view.append(planned.changes, seq)
            self._viewed_seq = seq
            self._planned.append((seq, planned.changes))
            entries.append((request, encode_changes(planned.changes)))
        self._events.appendleft(Append(tuple(entries), clock_ms()))

    # --- following the role -------------------------------------------------------------------

    def _follow_role(self) -> None:
        """Only a primary dials, and only if it has somebody to dial."""
        if self.links is None:
            return
        mine = self.state.wished
        target = None
        if mine.role is Role.PRIMARY and self.state.wants_replica:
            target = self._replica_flag or mine.peer_url
        self.links.dial(target or None)

    async def _send_snapshot(self, wanted: SendSnapshot) -> None:
        """Stream the tables as they are at one moment; the log's rest follows from there."""
        assert self.links is not None  # noqa: S101 - set by start
        link = self.links.get(wanted.link)
        if link is None:
            return
        database = await self._loop.run_in_executor(None, self._open_reader)
        try:
            position = await self._loop.run_in_executor(None, _begin_snapshot, database)
            self.links.send(wanted.link, SnapshotBegin(position, wanted.set_aside))
            rows = database.snapshot_rows()
            count = 0
            while page := await self._loop.run_in_executor(None, _page, rows):
                count += len(page)
                self.links.send(wanted.link, SnapshotRows(page))
                await link.drained()
            self.links.send(wanted.link, SnapshotEnd(count))
        finally:
            database.close()
        self.feed(SnapshotSent(wanted.link, position, clock_ms()))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)
            self._on_failed(f"a background task failed: {error}")


def _begin_snapshot(database: Database) -> Position:
    database.begin_read()
    return database.applied()


def _page(rows: Iterable[bytes]) -> tuple[bytes, ...]:
    """The next rows of a snapshot, about 1 MiB; empty at the end."""
    page: list[bytes] = []
    size = 0
    for row in rows:
        page.append(row)
        size += len(row)
        if size >= BATCH_BYTES:
            break
    return tuple(page)
