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
    LogRecord,
    PromiseRecord,
    SealRecord,
    Spans,
    Standing,
    View,
    WithdrawRecord,
)
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.records import RecordSet, merged


class PartitionState:
    """Read it freely; only ``apply`` changes it.

    Invariants: sealed <= promised; staged_for is 0 or > sealed or (a re-seal) == sealed.
    """

    __slots__ = (
        "copied",
        "origin",
        "partition",
        "promised",
        "records",
        "ring",
        "sealed",
        "staged",
        "staged_for",
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
        self.records = RecordSet()
        self.staged_for = 0
        """The epoch whose seal is on its way here."""
        self.staged = RecordSet()
        """What came under ``staged_for`` before its seal: void if that seal never comes."""
        self.copied = DotSet()
        """Bodies fetched for that seal."""

    @property
    def held(self) -> DotSet:
        """The messages (and other puts) that are stored and not acked."""
        return self.records.held

    def view(self) -> View:
        return self.records.view(self.sealed, self.origin)

    def has_body(self, epoch: int, seq: int) -> bool:
        """The put is somewhere in this node's log, in force or staged: its body must be kept."""
        return (
            self.records.held.has(epoch, seq)
            or self.copied.has(epoch, seq)
            or self.staged.held.has(epoch, seq)
        )

    def bodies(self) -> DotSet:
        """All dots for which ``has_body`` is true."""
        bodies = self.records.held.copy()
        bodies.update(self.copied)
        bodies.update(self.staged.held)
        return bodies

    def apply(self, record: LogRecord) -> Spans:
        """Takes a record of this partition. Returns the dots whose bodies are needed no more."""
        match record:
            case AppendRecord(_, epoch, entries):
                if epoch == self.sealed:
                    gone: list[tuple[int, int, int]] = []
                    for entry in entries:
                        gone.extend(self.records.apply(epoch, entry))
                    return tuple(gone)
                if epoch > self.sealed:
                    self._stage(epoch)
                    for entry in entries:
                        self.staged.apply(epoch, entry)
                return ()
            case CopyRecord(_, for_epoch, copies):
                gone_copies = self._stage(for_epoch)
                for copy in copies:
                    self.copied.add(copy.epoch, copy.seq)
                return gone_copies
            case PromiseRecord(_, epoch, ring):
                self.promised = max(self.promised, epoch)
                self.ring = max(self.ring, ring)
                return ()
            case SealRecord():
                return self._seal(record)
            case WithdrawRecord(_, lost):
                self.records.withdraw(lost)
                self.staged.withdraw(lost)
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
                self.records = RecordSet.of(record.view)
                self.staged_for = record.staged_for
                self.staged = RecordSet.of(record.staged)
                self.copied = DotSet(record.copied)
                return before.minus(self.bodies()).spans()
            case ClockRecord():
                return ()
            case _:
                assert_never(record)

    def _stage(self, epoch: int) -> Spans:
        """Makes ``epoch`` the one that is staged; what was staged for an older one is void."""
        if epoch <= self.staged_for:
            return ()
        before = self.bodies()
        self.staged_for = epoch
        self.staged = RecordSet()
        # A copy is the same whoever asked for it: what was fetched for a failed takeover
        # serves the next one.
        return before.minus(self.bodies()).spans()

    def _seal(self, record: SealRecord) -> Spans:
        before = self.bodies()
        parts = [RecordSet.of(record.view)]
        if record.epoch == self.sealed:
            parts.append(self.records)
        if record.epoch == self.staged_for:
            parts.append(self.staged)
        self.records = merged(parts)
        self.sealed = record.epoch
        self.origin = record.view.origin
        self.promised = max(self.promised, record.epoch)
        self.ring = max(self.ring, record.ring)
        self.standing = Standing.MEMBER
        if self.staged_for <= record.epoch:
            self.staged_for = 0
            self.staged = RecordSet()
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
            staged_for=self.staged_for,
            staged=self.staged.view(0, 0),
            copied=self.copied.spans(),
        )
