"""Elections: who asks, who grants, who wins (§5.2, §5.4.1; PreVote is §9.6 of the thesis)."""

from __future__ import annotations

from lock_manager.core.raft import quorum, replication, roles
from lock_manager.core.raft.effects import ElectionStarted, Role, WonElection
from lock_manager.core.raft.messages import RequestVote, TimeoutNow, VoteReply
from lock_manager.core.raft.roles import Event
from lock_manager.core.raft.state import Following, State


def campaign(state: State) -> None:
    """The election timer fires. A leader, and whoever has no vote, has nothing to ask for."""
    if state.leading is not None:
        return
    state.reset_election_timer()
    if not state.is_voter:
        return
    if state.config.pre_vote:
        _ask(state)
    else:
        stand(state, transfer=False)


def _ask(state: State) -> None:
    """Pre-vote: would a majority vote for this node? Neither term nor vote change, so that a node
    which was cut off cannot drive up the term and depose a leader when it returns."""
    roles.move(state, Event.ASK)
    _forget_leader(state)
    state.notes.append(ElectionStarted(state.term + 1, pre_vote=True))
    state.votes = {state.me: True}
    if quorum.wins(state.votes, state.members.voters):
        stand(state, transfer=False)
        return
    _request_votes(state, state.term + 1, pre_vote=True, transfer=False)


def stand(state: State, *, transfer: bool) -> None:
    """A real election: a new term, and the vote for itself. Requests and the own vote wait for the
    disk: a candidate that forgot its vote might give it to another one in the same term."""
    roles.move(state, Event.STAND)
    _forget_leader(state)
    state.set_hard_state(state.term + 1, state.me)
    state.reset_election_timer()
    state.votes = {}
    state.notes.append(ElectionStarted(state.term, pre_vote=False))
    state.send_when_durable(VoteReply(sender=state.me, to=state.me, term=state.term, granted=True))
    _request_votes(state, state.term, pre_vote=False, transfer=transfer)


def _forget_leader(state: State) -> None:
    state.following = Following(state.commit_index)
    roles.set_leader(state, None)


def _request_votes(state: State, term: int, *, pre_vote: bool, transfer: bool) -> None:
    for peer in sorted(state.members.voters - {state.me}):
        request = RequestVote(
            sender=state.me,
            to=peer,
            term=term,
            last_index=state.log.last_index,
            last_term=state.log.last_term,
            pre_vote=pre_vote,
            transfer=transfer,
        )
        if pre_vote:
            state.send(request)
        else:
            state.send_when_durable(request)


def on_request_vote(state: State, request: RequestVote) -> None:
    """Grants at most one vote per term, and only to a log that is at least as up to date (§5.4.1).

    A voter that hears from a leader protects it: it denies pre-votes, and with CheckQuorum (when a
    leader that lost its majority steps down by itself) real requests too, without adopting their
    term (§6).
    """
    guarded = state.config.pre_vote if request.pre_vote else state.config.check_quorum
    if guarded and state.heard_leader_lately and not request.transfer:
        _deny(state, request)
        return
    if request.term > state.term and not request.pre_vote:
        roles.adopt_term(state, request.term, request.sender)
    log = state.log
    up_to_date = (request.last_term, request.last_index) >= (log.last_term, log.last_index)
    if request.pre_vote:
        free = request.term > state.term or (
            request.term == state.term and state.voted_for in (None, request.sender)
        )
        if not (free and up_to_date):
            _deny(state, request)
            return
        state.send(
            VoteReply(
                sender=state.me, to=request.sender, term=request.term, granted=True, pre_vote=True
            )
        )
        _make_way(state, request)
        return
    free = request.term == state.term and state.voted_for in (None, request.sender)
    if not (free and up_to_date):
        _deny(state, request)
        return
    if state.voted_for is None:
        state.set_hard_state(state.term, request.sender)
    state.reset_election_timer()
    state.send_when_durable(
        VoteReply(sender=state.me, to=request.sender, term=state.term, granted=True)
    )


def _make_way(state: State, request: RequestVote) -> None:
    """After a leader's death all followers ask at nearly the same moment, and pre-votes bind
    nobody: two that grant each other one stand both, and split the real vote. So whoever has the
    higher id leaves this round to the other one, and gives it the time of an election. Only once
    between its own attempts: the other may be one that is heard and hears nothing."""
    following = state.following
    if state.config.reset_campaign_ms is None or request.sender > state.me or following.made_way:
        return
    if state.role in (Role.FOLLOWER, Role.PRE_CANDIDATE):
        following.made_way = True
        state.votes = {}
        state.reset_election_timer()


def _deny(state: State, request: RequestVote) -> None:
    """Carries the own term, so that a candidate that lives in the past learns of it (etcd
    #8501)."""
    state.send(
        VoteReply(
            sender=state.me,
            to=request.sender,
            term=state.term,
            granted=False,
            pre_vote=request.pre_vote,
        )
    )


def on_vote_reply(state: State, reply: VoteReply) -> None:
    """Counts votes of this very election; late ones of an earlier term or phase count for
    nothing."""
    if reply.pre_vote:
        if state.role is not Role.PRE_CANDIDATE:
            return
        if reply.granted and reply.term != state.term + 1:
            return
    elif state.role is not Role.CANDIDATE or reply.term != state.term:
        return
    state.votes[reply.sender] = state.votes.get(reply.sender, False) or reply.granted
    if not quorum.wins(state.votes, state.members.voters):
        return
    if reply.pre_vote:
        stand(state, transfer=False)
    else:
        _win(state)


def _win(state: State) -> None:
    votes = sum(state.votes.values())
    roles.move(state, Event.WIN)
    roles.set_leader(state, state.me)
    noop_index = replication.take_office(state)
    state.notes.append(WonElection(state.term, votes, noop_index))


def on_timeout_now(state: State, message: TimeoutNow) -> None:
    """The leader hands over: stand at once, without asking first (§3.10)."""
    if message.term == state.term and message.sender == state.leader_id and state.is_voter:
        stand(state, transfer=True)
