"""One epoch of one owner: stamping, replicating and committing its records.

```
 propose ─▶ seq ─▶ own log ──────────┐
                └▶ Append to replicas │ Stored(upto)
                        ▼             ▼
                 the majority-th highest of (own, match...) = committed
```

A tenure begins with its seal. It *serves* once a majority has installed the seal; before that a
failure simply leaves the partition to the next candidate. Replicas acknowledge prefixes, so the
cost of an acknowledgement does not depend on how many records it covers.

*Learners* are followers that count in no majority: they copy the partition before they are named as
replicas in the next seal, so that the change itself takes no longer than an election.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import groupby
from typing import assert_never

from message_queue.core.messages import (
    Ack,
    Append,
    AppendRecord,
    Entry,
    Seal,
    Set,
    Settled,
)
from message_queue.core.replication.desk import Desk, OwnStored
from message_queue.core.replication.drafts import AckDraft, Draft, PutDraft, RunDraft, SetDraft
from message_queue.core.replication.effects import Committed, Gained
from message_queue.core.replication.quorum import Quorum
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import last_seq, put_entry

IN_FLIGHT_MAX = 16_384
"""Records sent to a replica and not yet acknowledged by it; beyond that it has to catch up first.
"""


class Follower:
    """How far one replica is, as its owner knows."""

    __slots__ = ("asked_ms", "match", "renewed_ms", "sent")

    def __init__(self, asked_ms: int, renewed_ms: int) -> None:
        self.match = -1
        """Records 1..match are durable there; 0: its seal is; -1: not sealed, or not known."""
        self.sent = 0
        self.asked_ms = asked_ms
        """When something unanswered was sent (again) last."""
        self.renewed_ms = renewed_ms
        """The lease runs from here: when the renewal that it answered was *sent*."""


class Tenure:
    """Invariants: committed <= last; match only grows (but for a replica that lost its disk);
    every seq in (window's first .. last) is in the window.
    """

    __slots__ = (
        "_bytes",
        "_desk",
        "_leases",
        "_settled_at",
        "_state",
        "_window",
        "committed",
        "epoch",
        "followers",
        "last",
        "outbid",
        "own",
        "partition",
        "quorum",
        "serving",
        "soft",
        "target",
        "told",
        "yield_to",
        "yield_until_ms",
    )

    def __init__(
        self, desk: Desk, state: PartitionState, epoch: int, renewed: dict[int, int], now_ms: int
    ) -> None:
        """``renewed``: when the claims were sent that the replicas granted (their first lease)."""
        self._desk = desk
        self._state = state
        self.partition = state.partition
        self.epoch = epoch
        self.last = 0
        self.own = -1
        """Records 1..own are durable here; -1: not even the seal."""
        self.committed = 0
        self.serving = False
        self.quorum = desk.quorum(state)
        self.followers = {
            peer: Follower(now_ms, renewed.get(peer, now_ms - desk.config.lease_ms))
            for peer in self.quorum.others(desk.me)
        }
        self._settled_at = 0
        """The seq of the ``Settled`` stamped by this tenure."""
        self._leases = self._lease_groups()
        self._window: deque[tuple[int, Append, int]] = deque()
        self._bytes = 0
        self.soft = b""
        """The last owner's consumer leases, for ``Gained``; later the present ones, for ``Yield``.
        """
        self.yield_to: int | None = None
        self.yield_until_ms = 0
        self.target: tuple[int, ...] = ()
        """The replicas that the successor shall name; (): the present ones."""
        self.told = False
        """The consumer leases were passed on after deliveries had ended."""
        self.outbid = 0
        """A replica promised this higher epoch to somebody and can't follow any more."""

    # -- the lease -------------------------------------------------------------------------------

    def lease_until_ms(self) -> int:
        """A majority (this node included) will promise nobody else before this time."""
        until_ms = 1 << 62
        config = self._desk.config
        for needed, followers in self._leases:
            if needed:
                renewed = sorted([f.renewed_ms for f in followers], reverse=True)
                until_ms = min(until_ms, renewed[needed - 1] + config.lease_ms - config.drift_ms)
        return until_ms

    def _lease_groups(self) -> tuple[tuple[int, tuple[Follower, ...]], ...]:
        """Per group that must agree: how many of which followers."""
        me = self._desk.me
        return tuple(
            (len(g) // 2 + (me not in g), tuple(self.followers[n] for n in g if n != me))
            for g in self.quorum.groups
        )

    # -- other replicas --------------------------------------------------------------------------

    def learn(self, peers: Collection[int], now_ms: int) -> None:
        """These learners, and no others."""
        voters = self.quorum.nodes
        for peer in tuple(self.followers):
            if peer not in voters and peer not in peers:
                del self.followers[peer]
        for peer in peers:
            if peer not in self.followers and peer != self._desk.me:
                config = self._desk.config
                self.followers[peer] = Follower(now_ms, now_ms - config.lease_ms)
                self.send_seal(peer, now_ms)

    @property
    def in_place(self) -> bool:
        """Serving, and no older replicas are needed any more, whoever owns the partition next."""
        return self.serving and not self.quorum.before and self.committed >= self._settled_at

    def _settle(self) -> None:
        """The seal that names new replicas is on both majorities: nobody can be elected without the
        new ones any more, so they decide alone."""
        self._settled_at = self.last + 1
        self._stamp((Settled(self._settled_at),), 16, self._desk.now_ms)
        self.quorum = Quorum(self.quorum.replicas)
        self._leases = self._lease_groups()
        self.learn((), self._desk.now_ms)
        self._desk.note("settled", self.partition, self.epoch, f"{self.quorum.replicas}")

    # -- records ---------------------------------------------------------------------------------

    def propose(self, drafts: tuple[Draft, ...], now_ms: int) -> int:
        """Stamps the drafts as one atomic batch; returns the first seq. The caller checked that
        this tenure serves.
        """
        entries: list[Entry] = []
        size = 0
        seq = self.last + 1
        for meta, group in groupby(drafts, _meta_of):
            if meta is not None:
                # Neighbours that differ in nothing but their bodies become one entry.
                bodies: list[bytes] = []
                for draft in group:
                    if isinstance(draft, RunDraft):
                        bodies += draft.bodies
                    elif isinstance(draft, PutDraft):
                        bodies.append(draft.body)
                entries.append(put_entry(seq, meta, bodies))
                seq += len(bodies)
                size += len(meta) + sum(map(len, bodies)) + 4 * len(bodies) + 32
                continue
            for draft in group:
                match draft:
                    case AckDraft(targets):
                        entries.append(Ack(seq, targets))
                        size += 16 * len(targets) + 16
                    case SetDraft(key, value):
                        entries.append(Set(seq, key, value))
                        size += len(key) + len(value) + 32
                    case PutDraft() | RunDraft():
                        raise AssertionError("a put without a meta")
                    case _:
                        assert_never(draft)
                seq += 1
        return self._stamp(tuple(entries), size, now_ms)

    def _stamp(self, batch: tuple[Entry, ...], size: int, now_ms: int) -> int:
        first, seq = self.last + 1, last_seq(batch[-1])
        append = Append(self.partition, self.epoch, batch)
        self._desk.persist(AppendRecord(self.partition, self.epoch, batch), self._state)
        self._desk.later(OwnStored(self.partition, self.epoch, seq))
        self.last = seq
        if self.followers:
            self._window.append((first, append, size))
            self._bytes += size
            for peer, follower in self.followers.items():
                if follower.match >= 0 and follower.sent == first - 1:
                    if seq - follower.match > IN_FLIGHT_MAX:
                        continue
                    if follower.sent == follower.match:
                        follower.asked_ms = now_ms
                    follower.sent = seq
                    self._desk.send(peer, append)
            self._trim()
        return first

    def _trim(self) -> None:
        """Drops from the window what every replica has, and the oldest beyond the bound."""
        window = self._window
        settled = min(f.match for f in self.followers.values())
        limit = self._desk.config.window_bytes
        while window:
            _, append, size = window[0]
            if last_seq(append.entries[-1]) > settled and self._bytes <= limit:
                return
            window.popleft()
            self._bytes -= size

    def send_missing(self, peer: int, now_ms: int) -> None:
        """Sends a replica what it was not sent yet; a new seal if the window no longer reaches."""
        follower = self.followers[peer]
        follower.asked_ms = now_ms
        if follower.match < 0:
            self.send_seal(peer, now_ms)
            return
        if follower.sent >= self.last:
            return
        if not self._window or self._window[0][0] > follower.sent + 1:
            self.send_seal(peer, now_ms)
            return
        for _, append, _ in self._window:
            last = last_seq(append.entries[-1])
            # Not by the first: an ack that overtook its put covers it, so that an acknowledged
            # prefix may end within a batch.
            if last > follower.sent:
                if last - follower.match > IN_FLIGHT_MAX:
                    return
                follower.sent = last
                self._desk.send(peer, append)

    def send_seal(self, peer: int, now_ms: int) -> None:
        """The whole state but the bodies. Records after it are sent when it is installed."""
        follower = self.followers[peer]
        follower.asked_ms = now_ms
        follower.sent = self.last
        self._desk.send(
            peer,
            Seal(self.partition, self.epoch, self._desk.ring_of(self._state), self._state.view()),
        )

    def tick(self, alive: frozenset[int], now_ms: int) -> None:
        """Sends again what stayed unanswered, to peers that are there."""
        timeout_ms = self._desk.config.timeout_ms
        for peer, follower in self.followers.items():
            if (
                (follower.match < self.last or follower.match < 0)
                and now_ms - follower.asked_ms >= timeout_ms
                and peer in alive
            ):
                self.resend(peer, now_ms)

    def resend(self, peer: int, now_ms: int) -> None:
        """What was sent and not acknowledged is taken for lost."""
        follower = self.followers[peer]
        follower.sent = max(follower.match, 0)
        self.send_missing(peer, now_ms)

    def stored(self, peer: int, upto: int, gap: bool, now_ms: int) -> None:
        """A replica's acknowledgement. Claims beyond what was sent are ignored."""
        follower = self.followers.get(peer)
        if follower is None or upto > self.last:
            return
        fresh = upto > follower.match
        if fresh:
            follower.match = upto
            follower.asked_ms = now_ms
            follower.sent = max(follower.sent, upto)
            self.advance()
        if gap and fresh:
            follower.sent = follower.match
        if follower.sent < self.last:
            self.send_missing(peer, now_ms)

    def unsealed(self, peer: int, now_ms: int) -> None:
        """The replica says that it has no seal of this epoch: it lost its disk, or never got it."""
        follower = self.followers.get(peer)
        if follower is not None and follower.match >= 0:
            follower.match = -1
            self.send_seal(peer, now_ms)

    def own_stored(self, upto: int) -> None:
        self.own = max(self.own, upto)
        self.advance()

    def advance(self) -> None:
        """Commits what a majority has; begins to serve when a majority has the seal."""
        marks = {peer: follower.match for peer, follower in self.followers.items()}
        marks[self._desk.me] = self.own
        reached = self.quorum.reached(marks)
        if reached < 0:
            return
        fx = self._desk.fx
        if not self.serving:
            self.serving = True
            fx.gained.append(Gained(self.partition, self.epoch, self.soft))
            self._desk.note("owner_elected", self.partition, self.epoch)
            if self.quorum.before:
                self._settle()
        if reached > self.committed:
            self.committed = reached
            fx.committed.append(Committed(self.partition, self.epoch, reached))

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return self.committed == self.last

    def up_to_date(self, peer: int) -> bool:
        follower = self.followers.get(peer)
        return follower is not None and follower.match == self.last


def _meta_of(draft: Draft) -> bytes | None:
    """Of puts."""
    return draft.meta if isinstance(draft, PutDraft | RunDraft) else None
