"""What one node durably knows of one partition: the fold of its log records.

Storage replays the log through ``apply`` at start-up; the running core applies each record when it
hands it to the log. So what is in memory is always what a replay would give, plus what is still
being written.
"""

from __future__ import annotations

from typing import assert_never

from message_queue.core.messages import (
    AppendRecord,
    CheckpointRecord,
    ClockRecord,
    CopyRecord,
    DismissRecord,
    LogRecord,
    PromiseRecord,
    SealRecord,
    Settled,
    Span,
    Spans,
    Standing,
    View,
    WithdrawRecord,
)
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.records import RecordSet, merged


class PartitionState:
    """Read it freely; only ``apply`` changes it.

    Invariant: sealed <= promised.
    """

    __slots__ = (
        "before",
        "copied",
        "origin",
        "partition",
        "promised",
        "records",
        "replicas",
        "ring",
        "sealed",
        "standing",
    )

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.promised = 0
        """No record, seal or claim of an epoch below this one is accepted. Never falls."""
        self.ring = 0
        self.standing = Standing.BLANK
        self.sealed = 0
        """The epoch of the last seal installed here: older epochs are closed."""
        self.origin = 0
        self.replicas: tuple[int, ...] = ()
        """Who decides, as that seal says (``quorum``); (): whom the founding ring names."""
        self.before: tuple[int, ...] = ()
        self.records = RecordSet()
        self.copied = DotSet()
        """Bodies fetched for a seal that is still to come. A copy is the same whoever asked for it:
        what was fetched for a failed takeover serves the next one."""

    @property
    def held(self) -> DotSet:
        """The messages (and other puts) that are stored and not acked."""
        return self.records.held

    def view(self) -> View:
        return self.records.view(self.sealed, self.origin, self.replicas, self.before)

    def has_body(self, epoch: int, seq: int) -> bool:
        """The put is somewhere in this node's log, in force or copied: its body must be kept."""
        return self.records.held.has(epoch, seq) or self.copied.has(epoch, seq)

    def bodies(self) -> DotSet:
        """All dots for which ``has_body`` is true."""
        bodies = self.records.held.copy()
        bodies.update(self.copied)
        return bodies

    def apply(self, record: LogRecord) -> Spans:
        """Takes a record of this partition. Returns the dots whose bodies are needed no more."""
        match record:
            case AppendRecord(_, epoch, entries):
                gone: list[Span] = []
                if epoch == self.sealed:
                    for entry in entries:
                        gone.extend(self.records.apply(epoch, entry))
                        if isinstance(entry, Settled):
                            self.before = ()
                return tuple(gone)
            case CopyRecord(_, _, copies):
                for copy in copies:
                    self.copied.add(copy.epoch, copy.seq)
                return ()
            case PromiseRecord(_, epoch, ring, elected):
                self.promised = max(self.promised, epoch)
                self.ring = max(self.ring, ring)
                if elected and self.standing is Standing.BLANK:
                    self.standing = Standing.DAMAGED
                return ()
            case SealRecord():
                return self._seal(record)
            case WithdrawRecord(_, lost):
                self.records.withdraw(lost)
                for span in lost:
                    self.copied.remove_range(*span)
                self.standing = Standing.DAMAGED
                return lost
            case CheckpointRecord():
                before = self.bodies()
                self.promised = record.promised
                self.ring = record.ring
                self.standing = record.standing
                self.sealed = record.view.sealed
                self.origin = record.view.origin
                self.replicas = record.view.replicas
                self.before = record.view.before
                self.records = RecordSet.of(record.view)
                self.copied = DotSet.of(record.copied)
                return before.minus(self.bodies()).spans()
            case DismissRecord():
                before = self.bodies()
                self.promised = max(self.promised, record.epoch)
                self.ring = max(self.ring, record.ring)
                self.sealed = max(self.sealed, record.epoch)
                self.replicas, self.before = record.replicas, ()
                self.records = RecordSet()
                self.copied = DotSet()
                self.standing = Standing.DAMAGED
                return before.spans()
            case ClockRecord():
                return ()
            case _:
                assert_never(record)

    def _seal(self, record: SealRecord) -> Spans:
        before = self.bodies()
        parts = [RecordSet.of(record.view)]
        settled = record.epoch == self.sealed and self.replicas and not self.before
        self.replicas = record.view.replicas
        self.before = () if settled else record.view.before
        if record.epoch == self.sealed:
            parts.append(self.records)
        self.records = merged(parts)
        self.sealed = record.epoch
        self.origin = record.view.origin
        self.promised = max(self.promised, record.epoch)
        self.ring = max(self.ring, record.ring)
        self.standing = Standing.MEMBER
        self.copied = DotSet()
        return before.minus(self.bodies()).spans()

    def checkpoint(self) -> CheckpointRecord:
        """The whole state as one record. Handed to the log after all records so far, it makes those
        before it redundant, except the puts whose bodies are still needed."""
        return CheckpointRecord(
            partition=self.partition,
            promised=self.promised,
            ring=self.ring,
            standing=self.standing,
            view=self.view(),
            copied=self.copied.chunks(),
        )
