"""Roles and the only ways between them (figure 4, with PreVote and CheckQuorum)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from lock_manager.core.raft.effects import LeaderChanged, Role, SteppedDown
from lock_manager.core.raft.state import Following, State


class Event(StrEnum):
    ASK = "asks whether it would win"  # the election timer fired, PreVote is on
    STAND = "stands for election"  # the pre-vote is won, PreVote is off, or TimeoutNow
    WIN = "has a majority of votes"
    SEE_LEADER = "hears this term's leader"
    SEE_TERM = "hears a higher term"
    LOSE_QUORUM = "hears no majority"
    LEAVE = "its own removal is committed"


TRANSITIONS: Mapping[Role, Mapping[Event, Role]] = {
    Role.FOLLOWER: {
        Event.ASK: Role.PRE_CANDIDATE,
        Event.STAND: Role.CANDIDATE,
        Event.SEE_LEADER: Role.FOLLOWER,
        Event.SEE_TERM: Role.FOLLOWER,
    },
    Role.PRE_CANDIDATE: {
        Event.ASK: Role.PRE_CANDIDATE,
        Event.STAND: Role.CANDIDATE,
        Event.SEE_LEADER: Role.FOLLOWER,
        Event.SEE_TERM: Role.FOLLOWER,
    },
    Role.CANDIDATE: {
        Event.ASK: Role.PRE_CANDIDATE,
        Event.STAND: Role.CANDIDATE,
        Event.WIN: Role.LEADER,
        Event.SEE_LEADER: Role.FOLLOWER,
        Event.SEE_TERM: Role.FOLLOWER,
    },
    # A leader never hears another leader of its own term: election safety.
    Role.LEADER: {
        Event.SEE_TERM: Role.FOLLOWER,
        Event.LOSE_QUORUM: Role.FOLLOWER,
        Event.LEAVE: Role.FOLLOWER,
    },
}


def move(state: State, event: Event) -> None:
    """Takes the transition; a KeyError is a bug here, never something that a peer can cause."""
    state.role = TRANSITIONS[state.role][event]


def set_leader(state: State, leader_id: int | None) -> None:
    if state.leader_id != leader_id:
        state.leader_id = leader_id
        state.notes.append(LeaderChanged(state.term, leader_id))


def adopt_term(state: State, term: int, sender: int) -> None:
    """A message of a higher term: become its follower with the vote free (§5.1). The only place,
    besides standing for election, where the vote is cleared, and the term has just grown."""
    _lay_down(state, f"node {sender} is in term {term}")
    move(state, Event.SEE_TERM)
    state.set_hard_state(term, None)
    state.following = Following(state.commit_index)
    set_leader(state, None)
    state.reset_election_timer()


def follow(state: State, leader_id: int) -> None:
    """A message of this term's leader arrived."""
    if state.leader_id != leader_id or state.role is not Role.FOLLOWER:
        move(state, Event.SEE_LEADER)
        state.following = Following(state.commit_index)
        set_leader(state, leader_id)
    state.following.heard_ms = state.now_ms
    state.reset_election_timer()


def lose_sight_of_leader(state: State) -> None:
    """The leader is probably gone (its connection broke, or it left the configuration): it is no
    longer protected, and an election is tried soon instead of after a whole timeout. All followers
    see this at the same moment; taking turns by id keeps them from splitting the vote."""
    state.following.heard_ms = None
    spacing = state.config.reset_campaign_ms
    if spacing is not None:
        turn = sum(1 for voter in state.members.voters - {state.leader_id} if voter < state.me)
        delay = 1 + turn * spacing + state.chance(spacing // 4 + 1)
        state.election_deadline = min(state.election_deadline, state.now_ms + delay)


def abdicate(state: State, event: Event, reason: str) -> None:
    """A leader steps down within its term (no quorum, or removed)."""
    _lay_down(state, reason)
    move(state, event)
    state.following = Following(state.commit_index)
    set_leader(state, None)
    state.reset_election_timer()


def _lay_down(state: State, reason: str) -> None:
    """Ends a leadership: reads it can no longer answer are refused."""
    leading = state.leading
    if leading is None:
        return
    state.reads_refused.extend(leading.reads_waiting)
    for read_round in leading.rounds:
        state.reads_refused.extend(read_round.read_ids)
    state.leading = None
    state.notes.append(SteppedDown(state.term, reason))
