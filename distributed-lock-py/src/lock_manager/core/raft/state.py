"""A node's Raft state as data. The rooms beside this one are functions that move it.

What a role alone needs lives in that role's object, so that a follower has no match indices to
look at and a leader no leader to wait for: `leading` is set exactly while the role is LEADER.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lock_manager.core.raft.effects import Note, ReadReady, Role
from lock_manager.core.raft.log import RaftLog
from lock_manager.core.raft.membership import ConfigurationHistory
from lock_manager.core.raft.messages import HardState, InstallSnapshot, Message, Snapshot
from lock_manager.core.raft.settings import RaftConfig, Restored
from lock_manager.core.raft.tracker import Progress


class ReadRound:
    """Reads that one quorum round confirms, and the commit index they must see."""

    __slots__ = ("index", "number", "read_ids")

    def __init__(self, number: int, index: int, read_ids: list[int]) -> None:
        self.number = number
        self.index = index
        self.read_ids = read_ids


class Leading:
    """Volatile state on leaders (figure 2), made anew at each election won."""

    __slots__ = (
        "heartbeat_deadline",
        "leaving",
        "noop_index",
        "peers",
        "read_round",
        "reads_waiting",
        "resigning",
        "rounds",
        "transfer_deadline",
        "transfer_target",
        "uncommitted_bytes",
    )

    def __init__(self, noop_index: int, heartbeat_deadline: int) -> None:
        self.noop_index = noop_index
        self.peers: dict[int, Progress] = {}
        self.heartbeat_deadline = heartbeat_deadline
        self.read_round = 0  # number of the newest round; rounds are counted per leadership
        self.reads_waiting: list[int] = []
        self.rounds: deque[ReadRound] = deque()
        self.transfer_target: int | None = None
        self.transfer_deadline = 0
        self.uncommitted_bytes = 0
        # Removed, but not told yet that the removal is committed: until when to try.
        self.leaving: dict[int, int] = {}
        self.resigning = False  # this node's own removal is committed


class Incoming:
    """The part of a leader's snapshot that arrived so far."""

    __slots__ = ("chunks", "first", "received")

    def __init__(self, first: InstallSnapshot) -> None:
        self.first = first
        self.chunks: list[bytes] = []
        self.received = 0


class Following:
    """What a node that does not lead knows of its term's leader, made anew with each leader."""

    __slots__ = ("ack_due", "heard_ms", "incoming", "made_way", "matched_index", "round_echoed")

    def __init__(self, matched_index: int) -> None:
        self.heard_ms: int | None = None  # None: not in this term, or its connection broke since
        # The log is known to equal the leader's up to here (committed entries always do, §5.4).
        self.matched_index = matched_index
        self.ack_due = False  # entries were taken and wait for the disk to be acknowledged
        self.round_echoed = 0
        self.incoming: Incoming | None = None
        self.made_way = False  # for another one's candidacy


class State:
    """Everything a node's Raft knows. Invariants: handed_out <= commit_index <= last_index;
    commit_index and term never decrease; voted_for changes only from None or with the term."""

    __slots__ = (
        "chance",
        "commit_index",
        "config",
        "deferred",
        "election_deadline",
        "following",
        "handed_out",
        "hard_state_seq",
        "hard_state_unsaved",
        "leader_id",
        "leading",
        "log",
        "me",
        "members",
        "messages",
        "notes",
        "now_ms",
        "reads_ready",
        "reads_refused",
        "restore",
        "role",
        "stamp_ms",
        "stamp_term",
        "term",
        "voted_for",
        "votes",
    )

    def __init__(
        self, config: RaftConfig, restored: Restored, chance: Callable[[int], int], now_ms: int
    ) -> None:
        self.config = config
        self.me = config.node_id
        self.chance = chance
        self.now_ms = now_ms
        self.log = RaftLog(restored.snapshot, restored.entries)
        self.members = ConfigurationHistory(config.bootstrap, restored.snapshot, self.log.entries)

        self.term = restored.hard_state.term
        self.voted_for = restored.hard_state.voted_for
        self.hard_state_unsaved = False
        self.hard_state_seq = 0  # of the write that holds the present term and vote

        self.role = Role.FOLLOWER
        self.leader_id: int | None = None
        self.commit_index = restored.snapshot.index
        self.handed_out = restored.snapshot.index
        self.stamp_ms = 0
        self.stamp_term = 0  # whose leader said so, last of all
        self.votes: dict[int, bool] = {}
        self.leading: Leading | None = None
        self.following = Following(self.commit_index)
        self.election_deadline = 0
        self.reset_election_timer()

        # Gathered for the next drain.
        self.messages: list[Message] = []
        self.notes: list[Note] = []
        self.reads_ready: list[ReadReady] = []
        self.reads_refused: list[int] = []
        self.restore: Snapshot | None = restored.snapshot if restored.snapshot.index else None
        # Messages that speak for the present term and vote, and the write that must precede them.
        self.deferred: deque[tuple[int, Message]] = deque()

    # ------------------------------------------------------------------------- elementary changes

    def hear_time(self, stamp_ms: int) -> None:
        """Cluster time of this term's leader, which alone lets it pass.

        What an earlier leader told, be it this node itself, may be more: it let time pass that its
        successor never heard of, while nobody could be granted anything. To go on from there would
        end the leases that the successor granted too soon."""
        known_ms = self.stamp_ms if self.stamp_term == self.term else 0
        self.stamp_ms, self.stamp_term = max(known_ms, stamp_ms), self.term

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def send_when_durable(self, message: Message) -> None:
        """The message leaves only after the present term and vote are on disk (figure 2: "updated
        on stable storage before responding")."""
        seq = self.log.seq + 1 if self.hard_state_unsaved else self.hard_state_seq
        if seq <= self.log.durable_seq and message.to != self.me:
            self.messages.append(message)
        else:
            self.deferred.append((seq, message))

    def set_hard_state(self, term: int, voted_for: int | None) -> None:
        self.term = term
        self.voted_for = voted_for
        self.hard_state_unsaved = True

    def take_hard_state(self) -> HardState | None:
        """The hard state, if the next write must contain it."""
        if not self.hard_state_unsaved:
            return None
        self.hard_state_unsaved = False
        self.hard_state_seq = self.log.seq + 1
        return HardState(term=self.term, voted_for=self.voted_for)

    def reset_election_timer(self) -> None:
        """Draws a timeout from [election_timeout, 2 * election_timeout) (§5.2)."""
        timeout = self.config.election_timeout_ms
        self.election_deadline = self.now_ms + timeout + self.chance(timeout)

    # ------------------------------------------------------------------------------------ queries

    @property
    def is_voter(self) -> bool:
        return self.me in self.members.voters

    @property
    def committed_in_term(self) -> bool:
        """Whether an entry of the own term is committed: only then does a leader know how far the
        log is committed (§8), and only then may it change the configuration (Ongaro 2015)."""
        return self.leading is not None and self.commit_index >= self.leading.noop_index

    @property
    def heard_leader_lately(self) -> bool:
        """Whether there is, as far as this node can tell, a live leader that an election would only
        disturb (§6, last paragraph; §9.6 of the thesis)."""
        if self.leading is not None:
            return True
        heard = self.following.heard_ms
        return heard is not None and self.now_ms - heard < self.config.election_timeout_ms
