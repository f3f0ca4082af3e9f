"""Which decided records have their line in this node's audit log.

A write's line is told by the record itself (changes.Audited), on the node that took the request, at
the moment the record is decided. So a line cannot be lost: a start looks which records since the
last saved mark (core.audit.Told) have no line, and writes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from secure_store.core.audit import Told
from secure_store.core.changes import Audited, Change, decode_changes
from secure_store.core.records import Record
from secure_store.storage.audit_log import AuditLog


class Ledger:
    """Used on the event loop."""

    def __init__(self, node_id: str, audit: AuditLog) -> None:
        self._node_id = node_id
        self._audit = audit
        # By record: what the last run wrote of records whose decision this run has not seen yet.
        self._found: dict[int, set[tuple[str, str]]] = {}
        # Decided, in order, with the line that must be durable before it may be saved.
        self._due: deque[tuple[Told, int]] = deque()
        self._told = Told()
        self._shown_seq = 0
        self.installs = 0

    def recover(self, told: Told, kept: Iterable[Record], shown_seq: int) -> int:
        """Write the lines that a crash has lost: of records after `told`, decided up to
        `shown_seq`; gives how many. (What is decided later gets its line then, once.)"""
        self._told = told
        self._shown_seq = told.record
        self._found = {}
        for seq, request_id, stamp in self._audit.records_since(told.line):
            if seq > told.record:
                self._found.setdefault(seq, set()).add((request_id, stamp))
        before = self._audit.noted_seq
        for record in kept:
            if record.seq <= shown_seq:
                changes = decode_changes(record.payload)
                self.shown(changes, record.seq, record.epoch, detail="written at start")
        self._shown_seq = max(self._shown_seq, shown_seq)
        return self._audit.noted_seq - before

    def shown(
        self, changes: tuple[Change, ...], seq: int, epoch: int = 0, *, detail: str = ""
    ) -> int:
        """A record was decided: write its line if this node took the request; gives the line's
        number, or 0."""
        if seq <= self._shown_seq:
            return 0
        self._shown_seq = seq
        found = self._found.pop(seq, set())
        line = 0
        if changes and isinstance(audited := changes[-1], Audited):
            line = self._write(audited, seq, epoch, detail, found)
        after = self._audit.noted_seq
        # A start looks behind the saved line only: it must not pass those that were found.
        told = Told(seq, self._told.line if self._found else after)
        if self._due and self._due[-1][1] == after and self._due[-1][0].line == told.line:
            self._due.pop()
        self._due.append((told, after))
        return line

    def _write(
        self, audited: Audited, seq: int, epoch: int, detail: str, found: set[tuple[str, str]]
    ) -> int:
        if audited.node != self._node_id:
            return 0
        if (audited.request_id, self._audit.stamp(audited.at_ms)) in found:
            return 0
        self._audit.note(
            audited.action,
            addr=audited.addr,
            outcome="allowed",
            request_id=audited.request_id,
            status=200,
            who=audited.who,
            key=audited.key,
            detail=detail,
            record=seq,
            epoch=epoch,
            at_ms=audited.at_ms,
        )
        return self._audit.noted_seq

    def settled(self) -> Told:
        """What may be saved now. (Called every tick, so that little waits here.)"""
        while self._due and self._due[0][1] <= self._audit.seq:
            self._told = self._due.popleft()[0]
        return self._told

    def replaced(self, seq: int) -> None:
        """A snapshot that ends at record `seq` has replaced this node's history."""
        self._due.clear()
        self._found.clear()
        self._shown_seq = seq
        self._told = Told(seq, self._told.line)
        self.installs += 1
