"""What must hold at every step, as code: figure 3 of the Raft paper and what durability adds to it.

Whoever drives several cores (the simulation, the scenario runner) feeds a `RaftChecker` with each
drain and each finished write; it raises `InvariantBroken` at the first step that breaks a promise,
not when a client notices. Checks of one node's state and checks over the whole cluster's history
are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lock_manager.core.raft import (
    AppendReply,
    Configuration,
    Effects,
    Entry,
    HardState,
    Message,
    Persist,
    RaftCore,
    RequestVote,
    Restored,
    Role,
    Snapshot,
    VoteReply,
)
from lock_manager.core.raft.quorum import majority


class InvariantBroken(AssertionError):
    """A promise of the protocol does not hold: a bug, never an operational error."""


def _demand(holds: bool, promise: str) -> None:
    if not holds:
        raise InvariantBroken(promise)


class DiskImage:
    """What a store holds after the writes applied so far: the model that stores are compared
    with."""

    def __init__(self, restored: Restored | None = None) -> None:
        restored = restored or Restored()
        self.hard_state: HardState = restored.hard_state
        self.snapshot: Snapshot = restored.snapshot
        self.entries: list[Entry] = list(restored.entries)

    def apply(self, write: Persist) -> None:
        """Carries out one write; a gap or an overlap in the entries is a bug of whoever asked for
        it."""
        if write.hard_state is not None:
            self.hard_state = write.hard_state
        if write.snapshot is not None:
            self.snapshot = write.snapshot
        if write.truncate_from is not None:
            while self.entries and self.entries[-1].index >= write.truncate_from:
                self.entries.pop()
        if write.compact_to is not None:
            _demand(write.compact_to <= self.snapshot.index, "compacted above the snapshot")
            first = self.entries[0].index if self.entries else 1
            del self.entries[: max(0, write.compact_to - first + 1)]
        if write.entries:
            after = self.entries[-1].index if self.entries else write.entries[0].index - 1
            _demand(write.entries[0].index == after + 1, "the store's log has a gap or an overlap")
            if not self.entries:
                _demand(
                    write.entries[0].index <= self.snapshot.index + 1,
                    "the store's log does not join its snapshot",
                )
            self.entries.extend(write.entries)

    @property
    def restored(self) -> Restored:
        return Restored(
            hard_state=self.hard_state, snapshot=self.snapshot, entries=tuple(self.entries)
        )

    @property
    def last_index(self) -> int:
        return self.entries[-1].index if self.entries else self.snapshot.index

    def holds(self, index: int, term: int) -> bool:
        """Whether the entry (index, term) survives a power cut here, as itself or in the
        snapshot."""
        if index <= self.snapshot.index:
            return True
        if not self.entries:
            return False
        at = index - self.entries[0].index
        return 0 <= at < len(self.entries) and self.entries[at].term == term


# -------------------------------------------------------------------------------- one node's state


def check_node(core: RaftCore) -> None:
    """Relations inside one node; constant time, for every step."""
    state, log = core.state, core.state.log
    _demand(state.handed_out <= state.commit_index, "applied beyond the commit index")
    _demand(state.commit_index <= log.last_index, "the commit index lies beyond the log")
    _demand(log.snapshot.index <= state.handed_out, "the snapshot holds what was not applied")
    _demand(log.base_index <= log.snapshot.index, "compacted beyond the snapshot")
    _demand(log.durable_index <= log.last_index, "durable beyond the log")
    _demand(log.last_term <= state.term, "an entry of a term that this node has not reached")
    _demand((state.leading is not None) == (state.role is Role.LEADER), "leads without the role")
    _demand((state.leader_id == state.me) == (state.role is Role.LEADER), "a leader knows itself")
    if state.role is Role.CANDIDATE:
        _demand(state.voted_for == state.me, "a candidate votes for itself")
    if state.leading is not None:
        noop_term = log.term_at(state.leading.noop_index)
        _demand(noop_term in (None, state.term), "a leader overwrote its own log")
        _demand(log.last_index >= state.leading.noop_index, "a leader cut its own log")
        for progress in state.leading.peers.values():
            _demand(progress.match_index < progress.next_index, "next_index is beyond match_index")
            _demand(progress.match_index <= log.last_index, "a peer has more than the leader")


# --------------------------------------------------------------------------- the cluster's history


class RaftChecker:
    """Follows all nodes of one cluster. `contents` off: entries are compared by index and term
    alone."""

    def __init__(self, *, contents: bool = True) -> None:
        self.contents = contents
        self.disks: dict[int, DiskImage] = {}
        self.leaders: dict[int, int] = {}  # term -> node
        self.votes: dict[tuple[int, int], int] = {}  # (node, term) -> whom it durably voted for
        # (index, term) -> (the term before it, its content)
        self.entries: dict[tuple[int, int], tuple[int, object]] = {}
        self.final: dict[int, tuple[int, object]] = {}  # index -> (term, content), once applied
        # The highest commit: index, the entry's term, the term of who committed it, its
        # configuration.
        self.committed_index = 0
        self.committed_term = 0
        self.committed_by_term = 0
        self.committed_in = Configuration()
        self._lost: dict[int, DiskImage] = {}  # the last disk of a node that lost it
        self._seen: dict[int, tuple[int, int]] = {}  # node -> (term, commit index) of this life
        self._asked: dict[tuple[int, int], int] = {}  # (node, read id) -> commit index when asked

    # -------------------------------------------------------------------------------------- inputs

    def started(self, node: int, disk: DiskImage) -> None:
        """A node starts (again) from `disk`, the image of what is surely durable there."""
        self.disks[node] = disk
        self._seen.pop(node, None)
        self.check_durable()

    def wiped(self, node: int) -> None:
        """The node lost its disk: it may vote as if for the first time, for nobody counts its
        votes. What it had stored counts as durable where it was counted: others may not count on
        it now."""
        self.votes = {key: vote for key, vote in self.votes.items() if key[0] != node}
        self._lost[node] = self.disks[node]

    def asked(self, node: int, read_id: int) -> None:
        """A linearizable read begins: it must see all that is committed by now."""
        self._asked[node, read_id] = self.committed_index

    def stored(self, node: int, write: Persist) -> None:
        """A write is synced (called in order, before the core is told)."""
        disk = self.disks[node]
        before = disk.hard_state
        disk.apply(write)
        after = disk.hard_state
        _demand(after.term >= before.term, "the stored term decreased")
        if after.voted_for is not None:
            vote = self.votes.setdefault((node, after.term), after.voted_for)
            _demand(vote == after.voted_for, f"node {node} voted twice in term {after.term}")
        elif after.term == before.term:
            _demand(before.voted_for is None, "the stored vote was cleared within its term")
        if write.truncate_from is not None or write.snapshot is not None:
            self.check_durable()  # nothing else takes anything from a disk

    def drained(self, node: int, core: RaftCore, effects: Effects) -> None:
        """One drain of a node, before anything of it is carried out."""
        check_node(core)
        self._check_monotonic(node, core)
        if effects.persist is not None:
            self._check_matching(core, effects.persist.entries)
        self._check_sent(node, core, effects.messages)
        if core.role is Role.LEADER:
            leader = self.leaders.setdefault(core.term, node)
            _demand(leader == node, f"two leaders in term {core.term}: {leader} and {node}")
        self._check_commit(node, core)
        for entry in effects.committed:
            known = self.final.setdefault(entry.index, (entry.term, self._content(entry)))
            _demand(
                known == (entry.term, self._content(entry)),
                f"index {entry.index} was applied as two different entries",
            )
        for ready in effects.reads_ready:
            asked = self._asked.pop((node, ready.read_id), 0)
            _demand(ready.index >= asked, "a read would miss what was committed before it began")

    # -------------------------------------------------------------------------------------- checks

    def _content(self, entry: Entry) -> object:
        return (entry.kind, entry.payload) if self.contents else None

    def _check_monotonic(self, node: int, core: RaftCore) -> None:
        term, commit_index = self._seen.get(node, (self.disks[node].hard_state.term, 0))
        _demand(core.term >= term, "the term decreased")
        _demand(core.commit_index >= commit_index, "the commit index decreased")
        self._seen[node] = (core.term, core.commit_index)

    def _check_matching(self, core: RaftCore, entries: Iterable[Entry]) -> None:
        """Log matching, by induction: an (index, term) has one content and one predecessor for
        ever."""
        before: int | None = None
        for entry in entries:
            if before is None:
                before = core.entry_term(entry.index - 1) or 0
            known = self.entries.setdefault(
                (entry.index, entry.term), (before, self._content(entry))
            )
            _demand(
                known == (before, self._content(entry)),
                f"two different logs share index {entry.index}, term {entry.term}",
            )
            before = entry.term

    def _check_sent(self, node: int, core: RaftCore, messages: Iterable[Message]) -> None:
        """Nothing is promised that the disk does not hold already."""
        disk = self.disks[node]
        for message in messages:
            match message:
                case VoteReply(granted=True, pre_vote=False):
                    vote = HardState(message.term, message.to)
                    _demand(disk.hard_state == vote, "a vote left before it was durable")
                case RequestVote(pre_vote=False):
                    vote = HardState(message.term, node)
                    _demand(disk.hard_state == vote, "a candidacy left before it was durable")
                case AppendReply(success=True) if message.match_index and message.term == core.term:
                    # Without a term it is compacted here, hence committed: there is no other one.
                    term = core.entry_term(message.match_index)
                    _demand(
                        message.match_index <= disk.last_index
                        if term is None
                        else disk.holds(message.match_index, term),
                        "entries were acknowledged before they were durable",
                    )
                case _:
                    pass

    def _check_commit(self, node: int, core: RaftCore) -> None:
        """Committed entries are durable on a majority, and every later leader has them."""
        index = core.commit_index
        if index > self.committed_index and core.role is Role.LEADER:
            self.committed_index = index
            self.committed_term = core.entry_term(index) or 0
            self.committed_by_term = core.term
            self.committed_in = core.configuration
            self.check_durable()
        if core.role is Role.LEADER and core.term >= self.committed_by_term:
            _demand(
                core.snapshot_index >= self.committed_index
                or core.entry_term(self.committed_index) == self.committed_term,
                f"leader {node} of term {core.term} lacks the committed {self.committed_index}",
            )

    def check_durable(self) -> None:
        """The newest committed entry (and so every older one) is on the disks of a majority."""
        voters = self.committed_in.voters
        if not voters:
            return
        holding = sum(
            1
            for voter in voters
            if any(
                disk.holds(self.committed_index, self.committed_term)
                for disk in (self.disks.get(voter), self._lost.get(voter))
                if disk is not None
            )
        )
        _demand(
            holding >= majority(len(voters)),
            f"committed entry {self.committed_index} is durable on {holding} of {len(voters)}",
        )


def check_logs_match(cores: Mapping[int, RaftCore]) -> None:
    """Log matching by comparing whole logs (slow; for ends of runs and small scenarios): where two
    logs have the same term at an index, they are equal up to there."""
    nodes = sorted(cores)
    for position, first in enumerate(nodes):
        for second in nodes[position + 1 :]:
            one, other = cores[first], cores[second]
            low = max(one.state.log.base_index, other.state.log.base_index) + 1
            agree = False
            for index in range(min(one.last_index, other.last_index), low - 1, -1):
                same = one.entry_term(index) == other.entry_term(index)
                _demand(same or not agree, f"logs of {first} and {second} differ below {index + 1}")
                agree = agree or same
