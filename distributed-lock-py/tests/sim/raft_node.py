"""A Raft core in the simulator, driven as node.py drives it: step, persist, send, apply, answer.

The replicated machine is a parameter; the disk holds what the real store holds, one transaction a
write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lock_manager.core.invariants import DiskImage, RaftChecker
from lock_manager.core.raft import (
    Accepted,
    Configuration,
    ConfigurationCommitted,
    ElectionStarted,
    Entry,
    EntryKind,
    HardState,
    Message,
    Note,
    Persist,
    RaftConfig,
    RaftCore,
    Refused,
    Restored,
    Snapshot,
    SteppedDown,
    Suspicious,
    TransferEnded,
    WonElection,
)
from testkit.sim import Disk, Host

NOT_LEADER = "not leader"
LOST = "lost"  # definitely: another entry took the index
UNKNOWN = "unknown"


class Machine(Protocol):
    """What is replicated."""

    def apply(self, entry: Entry) -> Any: ...
    def snapshot(self) -> bytes: ...
    def restore(self, data: bytes) -> None: ...


def number(name: str) -> int:
    return int(name.removeprefix("n"))


class RaftNode:
    """One incarnation of a node. `answer` callbacks get the machine's reply or NOT_LEADER, LOST,
    UNKNOWN."""

    def __init__(
        self,
        host: Host,
        config: RaftConfig,
        checker: RaftChecker,
        machine: Machine,
        *,
        snapshot_every: int = 0,
        keep_entries: int = 0,
    ) -> None:
        self.host = host
        self.config = config
        self.checker = checker
        self.machine = machine
        self.core: RaftCore
        self.removed = False
        self._me = config.node_id
        self._snapshot_every = snapshot_every
        self._keep_entries = keep_entries
        self._first_index = 1  # of the log on disk
        self._queued: list[Persist] = []  # as in the store: one transaction at a time
        self._writing: list[Persist] = []
        self._waiting: dict[int, tuple[int, Callable[[Any], None]]] = {}
        self._reads: dict[int, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        self._blocked: list[tuple[int, int]] = []  # (index, read id): confirmed, not applied yet
        self._next_read = 0
        self._applied = 0
        self._deadline: int | None = None

    # ----------------------------------------------------------------------------- simulator's side

    def start(self, disk: Disk) -> None:
        entries = tuple(disk.log("entries"))
        self._first_index = disk.get("first_index", 1)
        restored = Restored(
            hard_state=disk.get("hard_state", HardState()),
            snapshot=disk.get("snapshot", Snapshot()),
            entries=entries,
        )
        assert not entries or entries[0].index == self._first_index
        self._prepare(restored)
        self.checker.started(self._me, DiskImage(restored))
        self.core = RaftCore(self.config, restored, self.host.rng.randrange, self.host.now_ms())
        self._flush()

    def _prepare(self, restored: Restored) -> None:
        """For nodes that do more: the disk was read, the core is about to be made."""

    def on_message(self, source: str, message: Message) -> None:
        assert message.sender == number(source)
        self.core.step(message, self.host.now_ms())
        self._flush()

    def _send(self, message: Message) -> None:
        self.host.send(f"n{message.to}", message)

    def on_timer(self, name: str) -> None:
        self._deadline = None
        self.core.tick(self.host.now_ms())
        self._flush()

    def on_sync_done(self, token: int) -> None:
        for write in self._writing:
            self.checker.stored(self._me, write)
        self._writing = []
        self._write_queued()
        self.core.persisted(token, self.host.now_ms())
        self._flush()

    def on_peer_disconnected(self, peer: str) -> None:
        self.core.peer_disconnected(number(peer), self.host.now_ms())
        self._flush()

    def on_stop(self) -> None:
        """SIGTERM: hand leadership to whoever is furthest."""
        peers = [peer for peer in self.core.progress() if peer.voter]
        if peers:
            best = max(peers, key=lambda peer: peer.match_index)
            self.core.transfer(best.node_id, self.host.now_ms())
            self._flush()

    # --------------------------------------------------------------------------------- requests

    def propose(self, payload: bytes, answer: Callable[[Any], None]) -> None:
        match self.core.propose([payload]):
            case Accepted(term=term, first_index=index):
                self._waiting[index] = (term, answer)
                self._flush()
            case Refused(reason=reason):
                self.host.cover(f"refused: {reason}")
                answer(NOT_LEADER)

    def read(self, view: Callable[[], Any], answer: Callable[[Any], None]) -> None:
        self._next_read += 1
        self._reads[self._next_read] = (view, answer)
        self.checker.asked(self._me, self._next_read)
        self.core.read_index(self._next_read)
        self._flush()

    def flush(self) -> None:
        """After a request that was made to the core itself (membership, transfer)."""
        self._flush()

    # --------------------------------------------------------------------------------- the loop

    def _flush(self) -> None:
        core = self.core
        while core.has_effects and self.host.alive:
            effects = core.drain()
            self.checker.drained(self._me, core, effects)
            for message in effects.messages:
                self._send(message)
            if effects.persist is not None:
                self._queued.append(effects.persist)
                self._write_queued()
            if effects.restore is not None:
                self.machine.restore(effects.restore.data)
                self._applied = effects.restore.index
                self.host.cover("snapshots restored")
            for entry in effects.committed:
                self._apply(entry)
            for ready in effects.reads_ready:
                self._blocked.append((ready.index, ready.read_id))
            self._serve_reads()
            for read_id in effects.reads_refused:
                self._reads.pop(read_id)[1](NOT_LEADER)
            for note in effects.notes:
                self._note(note)
            if effects.committed:
                self._after_commit()
            self._compact()
        if self.host.alive and core.next_deadline_ms != self._deadline:
            self._deadline = core.next_deadline_ms
            self.host.set_timer("raft", max(0, self._deadline - self.host.now_ms()))

    def _after_commit(self) -> None:
        """For nodes that do more: something new was applied."""

    def _write_queued(self) -> None:
        """Group commit: all that waits becomes one transaction, once the one before is synced.
        After a failed sync there is no next one."""
        if self._queued and not self._writing:
            self._writing, self._queued = self._queued, []
            for write in self._writing:
                self._write(write)
            self.host.disk.sync(self._writing[-1].seq)

    def _write(self, write: Persist) -> None:
        disk = self.host.disk
        if write.hard_state is not None:
            disk.put("hard_state", write.hard_state)
        if write.snapshot is not None:
            disk.put("snapshot", write.snapshot)
        if write.truncate_from is not None:
            disk.truncate(max(0, write.truncate_from - self._first_index), "entries")
            self.host.cover("truncations")
        if write.compact_to is not None:
            disk.drop_prefix(max(0, write.compact_to + 1 - self._first_index), "entries")
            self._first_index = max(self._first_index, write.compact_to + 1)
            disk.put("first_index", self._first_index)
        for entry in write.entries:
            disk.append(entry, "entries")

    def _apply(self, entry: Entry) -> None:
        assert entry.index == self._applied + 1, "entries are applied in order, each once"
        self._applied = entry.index
        reply = self.machine.apply(entry) if entry.kind is EntryKind.COMMAND else None
        term, answer = self._waiting.pop(entry.index, (0, None))
        if answer is not None:
            answer(reply if term == entry.term else LOST)

    def _serve_reads(self) -> None:
        ready = [read_id for index, read_id in self._blocked if index <= self._applied]
        self._blocked = [one for one in self._blocked if one[0] > self._applied]
        for read_id in ready:
            view, answer = self._reads.pop(read_id)
            answer(view())
            self.host.cover("reads")

    def _compact(self) -> None:
        behind = self.core.handed_out - self.core.snapshot_index
        if self._snapshot_every and behind >= self._snapshot_every:
            self.core.snapshot_taken(
                self._applied, self.machine.snapshot(), keep_entries=self._keep_entries
            )
            self.host.cover("snapshots taken")

    def _note(self, note: Note) -> None:
        cover = self.host.cover
        match note:
            case WonElection():
                cover("elections")
            case ElectionStarted(pre_vote=True):
                cover("pre-votes")
            case SteppedDown(reason=reason):
                cover("step downs")
                if "majority" in reason:
                    cover("lost quorums")
                waiting, self._waiting = self._waiting, {}
                for _, answer in waiting.values():
                    answer(UNKNOWN)
            case ConfigurationCommitted(included=included):
                cover("configurations")
                self.removed = not included
            case TransferEnded():
                cover("transfers given up")
            case Suspicious(sender=sender, what=what):
                raise AssertionError(f"n{self._me} suspects n{sender}: it {what}")
            case _:
                pass


def small_limits(host: Host, members: Configuration) -> RaftConfig:
    """Limits so small that flow control, chunking and batching are at work all the time."""
    rng = host.rng
    return RaftConfig(
        node_id=number(host.name),
        bootstrap=members,
        max_inflight_messages=rng.choice([1, 2, 8]),
        max_inflight_bytes=rng.choice([100, 100_000]),
        max_message_bytes=rng.choice([40, 200, 100_000]),
        max_message_entries=rng.choice([1, 3, 100]),
        snapshot_chunk_bytes=rng.choice([20, 1000]),
        max_apply_entries=rng.choice([1, 5, 100]),
        max_read_rounds=rng.choice([1, 4]),
        eager_commit=rng.choice([True, False]),
    )
