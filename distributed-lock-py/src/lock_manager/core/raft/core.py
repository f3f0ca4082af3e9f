"""The Raft core's front door: inputs in, one `Effects` out. The contract is in this package's
docstring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from lock_manager.core.raft import (
    changes,
    election,
    following,
    installing,
    quorum,
    read_index,
    replication,
    roles,
    snapshots,
    transfer,
)
from lock_manager.core.raft.effects import Accepted, Effects, Refused, Role, Suspicious
from lock_manager.core.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    InstallSnapshot,
    Member,
    Message,
    RequestVote,
    Snapshot,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from lock_manager.core.raft.roles import Event
from lock_manager.core.raft.settings import RaftConfig, Restored
from lock_manager.core.raft.state import Leading, State
from lock_manager.core.raft.tracker import PeerProgress, PeerState


class RaftCore:
    """One node's Raft. Not thread-safe; all calls come from one event loop."""

    def __init__(
        self, config: RaftConfig, restored: Restored, chance: Callable[[int], int], now_ms: int
    ) -> None:
        self.state = State(config, restored, chance, now_ms)
        self.has_effects = self.state.restore is not None

    # -------------------------------------------------------------------------------------- inputs

    def step(self, message: Message, now_ms: int) -> None:
        """Takes a message from a peer. Whatever it says, this does not raise."""
        state = self.state
        self._advance(now_ms)
        if message.to != state.me or message.sender == state.me:
            state.notes.append(Suspicious(message.sender, f"sent a message for {message.to}"))
            return
        match message:
            case RequestVote():
                election.on_request_vote(state, message)
                return
            case VoteReply(pre_vote=True, granted=True):
                pass  # its term is only a proposal
            case _:
                if message.term > state.term:
                    roles.adopt_term(state, message.term, message.sender)
        match message:
            case AppendEntries():
                following.on_append(state, message)
            case AppendReply():
                replication.on_append_reply(state, message)
            case VoteReply():
                election.on_vote_reply(state, message)
            case InstallSnapshot():
                installing.on_install_snapshot(state, message)
            case SnapshotReply():
                snapshots.on_snapshot_reply(state, message)
            case TimeoutNow():
                election.on_timeout_now(state, message)
            case _:
                assert_never(message)

    def tick(self, now_ms: int) -> None:
        """Time passed: elections, heartbeats, CheckQuorum, the end of a transfer that did not
        work."""
        state = self.state
        self._advance(now_ms)
        leading = state.leading
        if leading is None:
            if state.now_ms >= state.election_deadline:
                election.campaign(state)
            return
        if state.config.check_quorum and self._lost_its_majority(leading):
            roles.abdicate(state, Event.LOSE_QUORUM, "no majority answers")
            return
        if leading.transfer_target is not None and state.now_ms >= leading.transfer_deadline:
            transfer.end(state, leading)
        if state.now_ms >= leading.heartbeat_deadline:
            replication.heartbeat(state, leading)

    def _lost_its_majority(self, leading: Leading) -> bool:
        """CheckQuorum (thesis §6.2). A silent peer may follow for up to two timeouts before it asks
        for votes, so a leader that gave up sooner would only cost a busy cluster its service; of
        one whose connection broke nothing is to be expected."""
        state = self.state
        timeout = state.config.election_timeout_ms
        since_ms = quorum.agreed(
            state.now_ms
            if voter == state.me
            else leading.peers[voter].heard_ms + (0 if leading.peers[voter].broken else timeout)
            for voter in state.members.voters
        )
        return state.now_ms - since_ms >= timeout

    def campaign(self, now_ms: int) -> None:
        """The election timer fires now. Does nothing on a leader or a node without a vote."""
        self._advance(now_ms)
        election.campaign(self.state)

    def propose(self, payloads: Sequence[bytes]) -> Accepted | Refused:
        """Appends one command per payload (at least one) if this node leads."""
        self.has_effects = True
        return replication.propose(self.state, payloads)

    def read_index(self, read_id: int) -> None:
        """Asks for a linearizable read; the answer is in a later drain's reads_ready or
        reads_refused."""
        self.has_effects = True
        read_index.ask(self.state, read_id)

    def persisted(self, seq: int, now_ms: int) -> None:
        """Every write up to `seq` is synced: votes and acknowledgements that waited for it may go,
        and the leader counts itself."""
        state = self.state
        self._advance(now_ms)
        state.log.written(seq)
        while state.deferred and state.deferred[0][0] <= seq:
            message = state.deferred.popleft()[1]
            if message.term != state.term:
                continue  # spoke for a term that is over
            if isinstance(message, VoteReply) and message.to == state.me:
                election.on_vote_reply(state, message)
            else:
                state.messages.append(message)
        if state.leading is not None:
            replication.advance_commit(state)
        else:
            following.acknowledge(state, force=False)

    def peer_disconnected(self, peer: int, now_ms: int) -> None:
        """A connection with the peer broke. What was in flight to it is probably lost; and a
        leader whose connections break is probably dead: it is no longer protected, and an election
        is tried soon."""
        state = self.state
        self._advance(now_ms)
        if state.leading is not None:
            progress = state.leading.peers.get(peer)
            if progress is not None:
                progress.broken = True
            if progress is not None and progress.state is PeerState.REPLICATE:
                progress.probe(progress.match_index + 1)
                progress.probe_sent = True  # the next heartbeat probes
        elif peer == state.leader_id:
            roles.lose_sight_of_leader(state)

    def transfer(self, target: int, now_ms: int) -> Refused | None:
        """Hands leadership to `target` if it catches up within an election timeout; meanwhile no
        proposal is taken. None: under way."""
        self._advance(now_ms)
        refused = transfer.start(self.state, target)
        if refused is None:
            replication.ask_after(self.state, target)
        return refused

    def add(self, member: Member) -> Accepted | Refused:
        self.has_effects = True
        return changes.add(self.state, member)

    def update(self, member: Member) -> Accepted | Refused:
        self.has_effects = True
        return changes.update(self.state, member)

    def remove(self, node_id: int) -> Accepted | Refused:
        self.has_effects = True
        return changes.remove(self.state, node_id)

    def advance_stamp(self, stamp_ms: int) -> None:
        """The leader's cluster time, for the following messages; it never goes back."""
        self.state.hear_time(max(self.state.stamp_ms, stamp_ms))

    def snapshot_taken(self, index: int, data: bytes, keep_entries: int = 0) -> None:
        """`data` is the machine's state after applying `index`. Ignored if a later snapshot came
        first."""
        state = self.state
        if index <= state.log.snapshot.index or index > state.handed_out:
            return
        term = state.log.term_at(index)
        if term is None:
            raise IndexError(f"no entry {index}, though it was applied")
        snapshot = Snapshot(index, term, state.members.as_of(index), data)
        state.log.compact(snapshot, keep_entries)
        state.members.compact(state.log.base_index)
        self.has_effects = True

    # ------------------------------------------------------------------------------------- outputs

    def drain(self) -> Effects:
        """Everything that the inputs since the last drain ask for."""
        state = self.state
        if state.leading is not None:
            replication.flush(state, state.leading)
        persist = state.log.take_write(state.take_hard_state())
        committed = []
        if state.handed_out < state.commit_index:
            last = min(state.commit_index, state.handed_out + state.config.max_apply_entries)
            committed = state.log.slice(state.handed_out + 1, last)
            state.handed_out = last
        effects = Effects(
            messages=state.messages,
            persist=persist,
            restore=state.restore,
            committed=committed,
            reads_ready=state.reads_ready,
            reads_refused=state.reads_refused,
            notes=state.notes,
        )
        state.messages = []
        state.restore = None
        state.reads_ready = []
        state.reads_refused = []
        state.notes = []
        self.has_effects = state.handed_out < state.commit_index
        return effects

    def _advance(self, now_ms: int) -> None:
        """Moves the clock. A gap of a whole election timeout means that this process stood still;
        that is no evidence against the peers, so a leader gives them the time it missed."""
        state = self.state
        self.has_effects = True
        gap = now_ms - state.now_ms
        if gap <= 0:
            return
        if gap >= state.config.election_timeout_ms and state.leading is not None:
            for progress in state.leading.peers.values():
                progress.heard_ms += gap
        state.now_ms = now_ms

    # ------------------------------------------------------------------------------------- queries

    @property
    def next_deadline_ms(self) -> int:
        """When `tick` has something to do, on the clock of `now_ms`."""
        state = self.state
        if state.leading is None:
            return state.election_deadline
        if state.leading.transfer_target is not None:
            return min(state.leading.heartbeat_deadline, state.leading.transfer_deadline)
        return state.leading.heartbeat_deadline

    @property
    def role(self) -> Role:
        return self.state.role

    @property
    def term(self) -> int:
        return self.state.term

    @property
    def voted_for(self) -> int | None:
        return self.state.voted_for

    @property
    def leader_id(self) -> int | None:
        return self.state.leader_id

    @property
    def commit_index(self) -> int:
        return self.state.commit_index

    @property
    def handed_out(self) -> int:
        return self.state.handed_out

    @property
    def last_index(self) -> int:
        return self.state.log.last_index

    @property
    def snapshot_index(self) -> int:
        return self.state.log.snapshot.index

    @property
    def configuration(self) -> Configuration:
        return self.state.members.configuration

    @property
    def configuration_index(self) -> int:
        return self.state.members.index

    @property
    def stamp_ms(self) -> int:
        return self.state.stamp_ms

    @property
    def transferring(self) -> bool:
        return self.state.leading is not None and self.state.leading.transfer_target is not None

    def entry_term(self, index: int) -> int | None:
        """The term of an entry in the log; None if it is compacted away or not there."""
        return self.state.log.term_at(index)

    def progress(self) -> list[PeerProgress]:
        """On the leader, what it knows of each peer; empty elsewhere."""
        leading = self.state.leading
        if leading is None:
            return []
        return [
            PeerProgress(
                node_id=peer,
                voter=peer in self.state.members.voters,
                state=progress.state,
                match_index=progress.match_index,
                next_index=progress.next_index,
                inflight_messages=len(progress.inflight),
                silent_ms=max(0, self.state.now_ms - progress.heard_ms),
            )
            for peer, progress in leading.peers.items()
        ]
