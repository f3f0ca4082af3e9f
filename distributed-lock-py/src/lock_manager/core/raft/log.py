"""The log in memory: entries, what of them is durable, and what the next write must contain.

Terms never decrease along a log, so it keeps where each term starts: the term of an index, and the
conflict hints of §5.3, are a bisection over terms, never a walk over entries.

    base_index            durable_index        last_index
    | snapshot or older   | synced             | in memory, some of it still being written
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from lock_manager.core.raft.effects import Persist
from lock_manager.core.raft.messages import Entry, HardState, Snapshot


class RaftLog:
    """Entries base_index+1 .. last_index. Invariants: base_index <= snapshot.index; durable_index
    <= last_index. Durable may lag behind base: a leader commits what others synced."""

    __slots__ = (
        "_compact_to",
        "_snapshot_unsaved",
        "_starts",
        "_terms",
        "_truncate_from",
        "_unsaved_from",
        "_writes",
        "base_index",
        "base_term",
        "durable_index",
        "durable_seq",
        "entries",
        "seq",
        "snapshot",
    )

    def __init__(self, snapshot: Snapshot, entries: tuple[Entry, ...]) -> None:
        self.snapshot = snapshot
        self.base_index = snapshot.index
        self.base_term = snapshot.term
        self.entries: list[Entry] = []
        # Parallel lists: the log's terms in order, and the first index of each.
        self._terms: list[int] = []
        self._starts: list[int] = []
        self.seq = 0  # of the last write handed out
        self.durable_seq = 0  # of the last write known to be synced
        # Writes under way: (seq, the last index that will be durable after it).
        self._writes: deque[tuple[int, int]] = deque()
        self._unsaved_from = self.base_index + 1
        self._truncate_from: int | None = None
        self._compact_to: int | None = None
        self._snapshot_unsaved = False
        self.append([entry for entry in entries if entry.index > self.base_index])
        self.durable_index = self.last_index
        self._unsaved_from = self.last_index + 1

    # ----------------------------------------------------------------------------------- reading

    @property
    def last_index(self) -> int:
        return self.base_index + len(self.entries)

    @property
    def last_term(self) -> int:
        return self._terms[-1] if self._terms else self.base_term

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None if it is compacted away or not there yet."""
        if index == self.base_index:
            return self.base_term
        if index < self.base_index or index > self.last_index:
            return None
        return self._terms[bisect_right(self._starts, index) - 1]

    def last_index_not_above(self, index: int, term: int) -> int:
        """The largest index <= `index` whose term is <= `term`; never below base_index."""
        index = min(index, self.last_index)
        while index > self.base_index:
            slot = bisect_right(self._starts, index) - 1
            if self._terms[slot] <= term:
                return index
            index = self._starts[slot] - 1
        return self.base_index

    def slice(self, first: int, last: int) -> list[Entry]:
        """Entries first..last, both included and both present."""
        return self.entries[first - self.base_index - 1 : last - self.base_index]

    def batch(self, first: int, max_entries: int, max_bytes: int) -> tuple[tuple[Entry, ...], int]:
        """As many entries from `first` on as fit into one message (at least one), and their
        bytes."""
        entries = self.slice(first, min(self.last_index, first + max_entries - 1))
        size = 0
        for count, entry in enumerate(entries):
            size += len(entry.payload) + 16
            if size > max_bytes and count:
                return tuple(entries[:count]), size - len(entry.payload) - 16
        return tuple(entries), size

    # ----------------------------------------------------------------------------------- changing

    def append(self, entries: list[Entry]) -> None:
        """Adds entries that follow last_index without a gap."""
        last_term = self.last_term
        for entry in entries:
            if entry.term != last_term or not self._terms:
                last_term = entry.term
                self._terms.append(entry.term)
                self._starts.append(entry.index)
        self.entries.extend(entries)

    def truncate_from(self, index: int) -> None:
        """Forgets entries >= `index`. Writes under way still contain them: what those make durable
        is clamped, for a later append may put the very same entries back while the disk lacks
        them."""
        del self.entries[index - self.base_index - 1 :]
        while self._starts and self._starts[-1] >= index:
            self._starts.pop()
            self._terms.pop()
        self._clamp_durable(index - 1)
        if index < self._unsaved_from:
            self._unsaved_from = index
            self._truncate_from = (
                index if self._truncate_from is None else min(index, self._truncate_from)
            )

    def compact(self, snapshot: Snapshot, keep_entries: int) -> None:
        """Takes a snapshot of what was applied; the entries up to it go, except the last few."""
        self.snapshot = snapshot
        self._snapshot_unsaved = True
        self._forget_prefix(max(self.base_index, snapshot.index - keep_entries))

    def install(self, snapshot: Snapshot) -> None:
        """Takes a leader's snapshot (§7): entries after it stay only if the log agrees at its
        index."""
        agrees = self.term_at(snapshot.index) == snapshot.term
        self.snapshot = snapshot
        self._snapshot_unsaved = True
        if agrees:
            self._forget_prefix(snapshot.index)
            return
        self.entries.clear()
        self._terms.clear()
        self._starts.clear()
        self.base_index, self.base_term = snapshot.index, snapshot.term
        self._clamp_durable(0)
        self._unsaved_from = snapshot.index + 1
        self._truncate_from = snapshot.index + 1
        self._compact_to = snapshot.index

    def _forget_prefix(self, index: int) -> None:
        """Forgets entries <= `index`; the term of `index` itself stays known."""
        term = self.term_at(index)
        if term is None:
            raise IndexError(f"no entry {index} to compact to")
        del self.entries[: index - self.base_index]
        self.base_index, self.base_term = index, term
        keep = bisect_right(self._starts, index)
        del self._starts[: max(0, keep - 1)], self._terms[: max(0, keep - 1)]
        if keep and self._starts and self._starts[0] <= index:
            later = self._starts[1] if len(self._starts) > 1 else self.last_index + 1
            if later == index + 1:  # the term's last entry is gone
                del self._starts[0], self._terms[0]
            else:
                self._starts[0] = index + 1
        self._unsaved_from = max(self._unsaved_from, index + 1)
        self._compact_to = index

    # ---------------------------------------------------------------------------------- durability

    @property
    def dirty(self) -> bool:
        return (
            self._unsaved_from <= self.last_index
            or self._snapshot_unsaved
            or self._truncate_from is not None
            or self._compact_to is not None
        )

    def take_write(self, hard_state: HardState | None) -> Persist | None:
        """The next write: everything that no earlier one contains. None if there is nothing."""
        if hard_state is None and not self.dirty:
            return None
        self.seq += 1
        write = Persist(
            seq=self.seq,
            hard_state=hard_state,
            snapshot=self.snapshot if self._snapshot_unsaved else None,
            truncate_from=self._truncate_from,
            compact_to=self._compact_to,
            entries=tuple(self.slice(self._unsaved_from, self.last_index)),
        )
        self._unsaved_from = self.last_index + 1
        self._truncate_from = None
        self._compact_to = None
        self._snapshot_unsaved = False
        self._writes.append((self.seq, self.last_index))
        return write

    def written(self, seq: int) -> None:
        """All writes up to `seq` are synced."""
        while self._writes and self._writes[0][0] <= seq:
            self.durable_seq, last_index = self._writes.popleft()
            self.durable_index = max(self.durable_index, last_index)

    def _clamp_durable(self, index: int) -> None:
        self.durable_index = min(self.durable_index, index)
        if self._writes and self._writes[-1][1] > index:
            self._writes = deque((seq, min(last, index)) for seq, last in self._writes)
