"""The leader's side of log replication: append, send, count, commit (§5.3, §5.4.2).

Nothing is sent when it is proposed: `flush` runs once a drain and sends each peer what gathered
since, in as few messages as the limits allow. Under load batches grow by themselves; no timer is
involved.
"""

from __future__ import annotations

from collections.abc import Sequence

from lock_manager.core.raft import changes, quorum, read_index, roles, snapshots, transfer
from lock_manager.core.raft.commit import commit_to
from lock_manager.core.raft.effects import Accepted, Forgetful, Refusal, Refused, Suspicious
from lock_manager.core.raft.messages import AppendEntries, AppendReply, Entry, EntryKind
from lock_manager.core.raft.roles import Event
from lock_manager.core.raft.state import Leading, State
from lock_manager.core.raft.tracker import PeerState, Progress


def take_office(state: State) -> int:
    """Starts a leadership with a no-op: committing it tells how far the log is committed (§8).
    Returns the no-op's index."""
    noop_index = state.log.last_index + 1
    leading = Leading(noop_index, state.now_ms + state.config.heartbeat_ms)
    state.leading = leading
    changes.sync_peers(state, leading)
    state.log.append([Entry(noop_index, state.term, EntryKind.NOOP, b"")])
    return noop_index


def propose(state: State, payloads: Sequence[bytes]) -> Accepted | Refused:
    """Appends one command per payload."""
    leading = state.leading
    if leading is None:
        return Refused(Refusal.NOT_LEADER)
    if leading.transfer_target is not None:
        return Refused(Refusal.TRANSFERRING)
    if leading.uncommitted_bytes > state.config.max_uncommitted_bytes:
        return Refused(Refusal.OVERLOADED)
    first = state.log.last_index + 1
    term = state.term
    command = EntryKind.COMMAND
    state.log.append(
        [Entry(index, term, command, payload) for index, payload in enumerate(payloads, first)]
    )
    leading.uncommitted_bytes += sum(map(len, payloads))
    return Accepted(term, first, state.log.last_index)


# --------------------------------------------------------------------------------------- sending


def flush(state: State, leading: Leading) -> None:
    """Sends every peer what it lacks and may be sent: entries, a read round, a new commit index."""
    read_index.start_round(state, leading)
    for peer, progress in leading.peers.items():
        send_entries(state, leading, peer, progress)
        # Who leaves hears of the commit now or never.
        eager = state.config.eager_commit or leading.resigning or peer in leading.leaving
        if progress.sent_round < leading.read_round or _has_news(state, progress, eager=eager):
            send_empty(state, leading, peer, progress)
    if leading.leaving:
        changes.see_off(state, leading)
    if leading.resigning:
        roles.abdicate(state, Event.LEAVE, "removed from the configuration")


def _has_news(state: State, progress: Progress, *, eager: bool) -> bool:
    """Whether an empty append should tell the peer something before the next heartbeat."""
    match progress.state:
        case PeerState.REPLICATE:
            return eager and progress.sent_commit < min(state.commit_index, progress.next_index - 1)
        case PeerState.PROBE:
            # The probe was perhaps lost: when there is anything new, ask again, cheaply.
            return progress.probed_at != (state.log.last_index, state.commit_index)
        case PeerState.SNAPSHOT:
            return False


def heartbeat(state: State, leading: Leading) -> None:
    """An empty append to everybody. It also finds out what was lost: a follower that lacks `prev`
    says so."""
    leading.heartbeat_deadline = state.now_ms + state.config.heartbeat_ms
    for peer, progress in leading.peers.items():
        send_empty(state, leading, peer, progress)
        if progress.state is PeerState.SNAPSHOT:
            progress.chunk_sent = False
            snapshots.send_chunk(state, leading, peer, progress)


def ask_after(state: State, peer: int) -> None:
    """Finds out at once what a peer lacks that is not known to have everything."""
    leading = state.leading
    if leading is None:
        return
    progress = leading.peers[peer]
    if progress.match_index < state.log.last_index:
        send_empty(state, leading, peer, progress)


def send_entries(state: State, leading: Leading, peer: int, progress: Progress) -> None:
    """Entries from next_index on, while the window is open."""
    config, log = state.config, state.log
    while progress.next_index <= log.last_index and progress.may_send(
        config.max_inflight_messages, config.max_inflight_bytes
    ):
        prev_index = progress.next_index - 1
        prev_term = log.term_at(prev_index)
        if prev_term is None:
            break
        entries, size = log.batch(
            progress.next_index, config.max_message_entries, config.max_message_bytes
        )
        last_index = prev_index + len(entries)
        state.messages.append(
            AppendEntries(
                sender=state.me,
                to=peer,
                term=state.term,
                prev_index=prev_index,
                prev_term=prev_term,
                entries=entries,
                commit=state.commit_index,
                read_round=leading.read_round,
                stamp_ms=state.stamp_ms,
            )
        )
        progress.sent(last_index, size)
        progress.sent_round = leading.read_round
        progress.sent_commit = min(state.commit_index, last_index)
        progress.probed_at = (log.last_index, state.commit_index)
    if progress.state is not PeerState.SNAPSHOT and log.term_at(progress.next_index - 1) is None:
        progress.start_snapshot(log.snapshot)
    if progress.state is PeerState.SNAPSHOT:
        snapshots.send_chunk(state, leading, peer, progress)


def send_empty(state: State, leading: Leading, peer: int, progress: Progress) -> None:
    """An append without entries, at the place where the next entries would go. To a peer that
    needs a snapshot: at 0, where all logs agree."""
    prev_index = progress.next_index - 1
    prev_term = None if progress.state is PeerState.SNAPSHOT else state.log.term_at(prev_index)
    if prev_term is None:
        prev_index = prev_term = 0
    state.messages.append(
        AppendEntries(
            sender=state.me,
            to=peer,
            term=state.term,
            prev_index=prev_index,
            prev_term=prev_term,
            commit=state.commit_index,
            read_round=leading.read_round,
            stamp_ms=state.stamp_ms,
        )
    )
    progress.sent_round = leading.read_round
    progress.sent_commit = min(state.commit_index, prev_index)
    progress.probed_at = (state.log.last_index, state.commit_index)


# --------------------------------------------------------------------------------------- answers


def on_append_reply(state: State, reply: AppendReply) -> None:
    leading = state.leading
    if leading is None or reply.term < state.term:
        return
    progress = leading.peers.get(reply.sender)
    if progress is None:
        return
    if reply.match_index > state.log.last_index or reply.read_round > leading.read_round:
        state.notes.append(Suspicious(reply.sender, "acknowledged what was never sent to it"))
        return
    progress.heard(state.now_ms)
    read_index.on_round(state, leading, progress, reply.read_round)
    if reply.success:
        if progress.matched(reply.match_index):
            advance_commit(state)
            _help_along(state, leading, reply.sender, progress)
        return
    if progress.is_stale_refusal(reply.prev_index):
        return
    # The two logs agree at most up to the largest index that is not above the hint and whose term
    # is not above the hint's: one round trip per term, not per entry.
    hint_index = min(reply.hint_index, reply.prev_index - 1)
    if hint_index >= state.log.base_index:
        hint_index = state.log.last_index_not_above(hint_index, reply.hint_term)
    progress.probe(hint_index + 1)
    if hint_index < progress.match_index:
        # To ask again at once would get the same answer, again and again: at the next heartbeat.
        progress.probe_sent = True
        progress.probed_at = (state.log.last_index, state.commit_index)
        state.notes.append(Forgetful(reply.sender, progress.match_index, hint_index))


def advance_commit(state: State) -> None:
    """Commits what a majority of voters has on disk; the leader counts itself from its own fsync
    on. Entries of earlier terms are committed only along with one of the own term (figure 8)."""
    leading, log = state.leading, state.log
    if leading is None:
        return
    peers = leading.peers
    index = quorum.agreed(
        log.durable_index if voter == state.me else peers[voter].match_index
        for voter in state.members.voters
    )
    if index > state.commit_index and log.term_at(index) == state.term:
        commit_to(state, index)
        leading.resigning = not state.is_voter and state.members.index <= index
        changes.promote_caught_up(state, leading)


def _help_along(state: State, leading: Leading, peer: int, progress: Progress) -> None:
    """What a peer's progress may trigger: its promotion, or its turn to lead."""
    changes.promote_caught_up(state, leading)
    if leading.transfer_target == peer:
        transfer.hand_over(state, peer, progress)
