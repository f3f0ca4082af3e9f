"""Taking a partition over: canvass, claim, merge, fetch. What follows is a ``Tenure``.

```
 CANVASS ── enough would promise ──▶ CLAIM ── promises, durable ──▶ FETCH ── all here ──▶ seal
     ▲                                 │                              │
     └────────── later, again ◀────────┴─── refused, or out of time ◀─┘
```

The promises come with what each promiser has. Among those, only the latest seal counts: it was made
from a majority's promises, so it contains whatever was committed before it, and a record of an
older epoch that it does not contain is void for ever (a refused produce must not come back beside
its retry). Records under that seal are merged by union; read quorum and write quorum overlap, so
every committed put and ack is among them. This is the view change of Viewstamped Replication
(Liskov and Cowling 2012, §4.2) with a union of sets in place of the longest log.

Whose promises are needed is written in the latest seal that anybody shows (``quorum``): a candidate
with an outdated idea of it learns on the way, asks the others too, or finds that it is no replica
any more. With a ``target`` the seal names new replicas, and a majority of those must promise too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from message_queue.core.messages import (
    MAX_NODES,
    Canvass,
    CanvassAnswer,
    Claim,
    Promise,
    PromiseRecord,
    Standing,
    View,
)
from message_queue.core.replication.desk import Desk, OwnPromise
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.fetch import Fetch
from message_queue.core.replication.quorum import Quorum
from message_queue.core.replication.records import RecordSet, merged
from message_queue.core.replication.state import PartitionState

CLAIM_TIMEOUTS = 3
EAGER_MS = 30
"""A canvass that follows a hand-over is repeated: the word of it may come later than the canvass.
So is one that follows a start.
"""
FETCH_PATIENCE_MS = 5_000


class Founding(Enum):
    """What a partition without a seal, as far as can be seen, is taken for."""

    NEVER = "never"  # lost, or out of sight
    ALL = "all"  # new, if all replicas say so
    MAJORITY = "majority"  # new, if a majority says so and nobody else


class Phase(Enum):
    CANVASS = "canvass"
    CLAIM = "claim"
    FETCH = "fetch"
    READY = "ready"
    FAILED = "failed"


class Takeover:
    """One attempt. ``phase`` says what it waits for; the replicator acts on READY and FAILED."""

    __slots__ = (
        "_answers",
        "_asked",
        "_asked_ms",
        "_began_ms",
        "_desk",
        "_eager",
        "_fetch",
        "_genesis",
        "_latest",
        "_moved_ms",
        "_partition",
        "_promises",
        "_refusals",
        "_state",
        "_target",
        "_total",
        "claimed_ms",
        "config",
        "epoch",
        "origin",
        "phase",
        "records",
        "seen",
    )

    def __init__(
        self,
        desk: Desk,
        state: PartitionState,
        seen: int,
        now_ms: int,
        target: tuple[int, ...] = (),
        *,
        eager: bool = False,
    ) -> None:
        """``seen``: the highest promise known of anybody. ``target``: the replicas to hand over
        to; (): those that there are. ``eager``: who refuses may agree in a moment (the last owner
        named this node, or all are just starting)."""
        self._desk = desk
        self._state = state
        self._partition = state.partition
        self.phase = Phase.CANVASS
        self.epoch = 0
        self.seen = max(seen, state.promised)
        self.claimed_ms: dict[int, int] = {}
        """When the claim was sent that a replica granted: its lease runs from there."""
        self.origin = 0
        self.records = RecordSet()
        self._target = target
        self._eager = eager
        self._latest = 0
        self.config = desk.quorum(state)
        """Whose promises are needed, and who replicates the partition from the seal on."""
        self._learn(state.sealed, self.config)
        self._answers: dict[int, CanvassAnswer] = {}
        self._asked: set[int] = set()
        self._promises: dict[int, tuple[Standing, View]] = {}
        self._refusals: set[int] = set()
        self._total = False
        self._genesis = False
        self._fetch: Fetch | None = None
        self._began_ms = now_ms
        self._asked_ms = now_ms
        self._moved_ms = now_ms

    # -- canvass ---------------------------------------------------------------------------------

    def begin(self, now_ms: int, founding: Founding) -> None:
        if self.phase is Phase.CANVASS:
            self._canvass()
            self._weigh(now_ms, founding)

    def _canvass(self) -> None:
        for peer in self.config.others(self._desk.me):
            if peer not in self._asked:
                self._asked.add(peer)
                self._desk.send(peer, Canvass(self._partition, self.seen))

    def reached(self, peer: int) -> None:
        """A connection to that peer stands (again): what it was asked before was lost with the last
        one, or was never sent."""
        if peer not in self.config.others(self._desk.me):
            return
        if self.phase is Phase.CANVASS:
            self._asked.add(peer)
            self._desk.send(peer, Canvass(self._partition, self.seen))
        elif self.phase is Phase.CLAIM and peer not in self._promises:
            self._send_claim(peer)

    def _learn(self, sealed: int, shown: Quorum) -> bool:
        """Somebody's seal: the latest one says who decides. True if that is news."""
        now = self.config
        settled = now.before and not self._target and not shown.before
        if not (sealed > self._latest or self._latest == 0 or (sealed == self._latest and settled)):
            return False
        decides = shown
        self._latest = max(sealed, self._latest)
        if decides.before or set(decides.replicas) == set(self._target):
            self._target = ()
        if self._target:
            decides = Quorum(self._target, decides.replicas)
        self.config = decides
        if self._desk.me not in decides.replicas:
            self.phase = Phase.FAILED  # others decide by now
        return decides != now

    def _shown(self, replicas: tuple[int, ...], before: tuple[int, ...]) -> Quorum:
        if not replicas:
            return self._desk.unnamed(self._partition)
        return Quorum(self._desk.ranked(self._partition, replicas), before)

    def canvassed(self, peer: int, answer: CanvassAnswer, now_ms: int, founding: Founding) -> None:
        if self.phase is Phase.CANVASS:
            self.seen = max(self.seen, answer.promised)
            self._answers[peer] = answer
            shown = self._shown(answer.replicas, answer.before)
            if answer.sealed and self._learn(answer.sealed, shown):
                self._canvass()
            if self._desk.me in self.config.replicas:
                self._weigh(now_ms, founding)

    def _weigh(self, now_ms: int, founding: Founding) -> None:
        """Claims when a majority of members would promise. If too few members exist, all replicas
        must be there; and only a partition that nobody knows may be made by a majority of blanks.
        """
        mine = self._state.standing
        granted = {self._desk.me: mine}
        granted |= {node: a.standing for node, a in self._answers.items() if a.granted}
        if self.config.enough(members_of(granted)):
            if mine is Standing.MEMBER:
                self._claim(now_ms, total=False, genesis=False)
            return
        if self._target or (self._latest == 0 and founding is Founding.NEVER):
            return
        if self.config.everybody(granted):
            self._claim(now_ms, total=True, genesis=False)
            return
        blank = mine is Standing.BLANK and all(
            a.standing is Standing.BLANK for a in self._answers.values()
        )
        if founding is Founding.MAJORITY and blank and self.config.enough(granted):
            self._claim(now_ms, total=True, genesis=True)

    # -- claim -----------------------------------------------------------------------------------

    def _claim(self, now_ms: int, *, total: bool, genesis: bool) -> None:
        desk = self._desk
        self.phase = Phase.CLAIM
        self._total = total
        self._genesis = genesis
        self.epoch = (self.seen // MAX_NODES + 1) * MAX_NODES + desk.config.node
        self._began_ms = now_ms
        desk.note("takeover_started", self._partition, self.epoch)
        promise = PromiseRecord(self._partition, self.epoch, desk.ring_of(self._state))
        desk.persist(promise, self._state)
        desk.later(OwnPromise(self._partition, self.epoch))
        self._send_claims(now_ms)

    def _send_claims(self, now_ms: int) -> None:
        self._asked_ms = now_ms
        desk = self._desk
        for peer in self.config.others(desk.me):
            if peer not in self._promises:
                # The earliest claim: which of several was granted is not known.
                self.claimed_ms.setdefault(peer, now_ms)
                self._send_claim(peer)

    def _send_claim(self, peer: int) -> None:
        desk = self._desk
        ring = desk.ring_of(self._state)
        desk.send(peer, Claim(self._partition, self.epoch, ring, self._total, desk.beat))

    def own_promise(self, epoch: int, now_ms: int) -> None:
        if epoch == self.epoch and self.phase is Phase.CLAIM:
            me = self._desk.config.node
            self._promises[me] = (self._state.standing, self._state.view())
            self._count(now_ms)

    def promised(self, peer: int, message: Promise, now_ms: int) -> None:
        if message.epoch != self.epoch or peer in self._promises:
            return
        self._promises[peer] = (message.standing, message.view)
        view = message.view
        if (
            self.phase is Phase.CLAIM
            and view.sealed
            and self._learn(view.sealed, self._shown(view.replicas, view.before))
        ):
            self._send_claims(now_ms)
        if self.phase is Phase.CLAIM:
            self._count(now_ms)
        elif self.phase is Phase.FETCH and self._fetch is not None:
            self._fetch.add_source(peer, DotSet.of(message.view.held))
            self._fetch.ask(now_ms)

    def refused(self, peer: int, promised: int) -> None:
        """A higher promise ends the attempt; a live lease, or a replica that doesn't count, only
        when too few are left."""
        self.seen = max(self.seen, promised)
        self._refusals.add(peer)
        hopeless = (
            not self._refusals.isdisjoint(self.config.nodes)
            if self._total and not self._genesis
            else self.config.hopeless(self._refusals)
        )
        if promised > self.epoch or (self.phase is Phase.CLAIM and hopeless):
            self.phase = Phase.FAILED

    def _count(self, now_ms: int) -> None:
        """Merges once the promises suffice."""
        standings = {node: standing for node, (standing, _) in self._promises.items()}
        if self._desk.me not in standings:
            return
        if self._genesis:
            if any(standing is not Standing.BLANK for standing in standings.values()):
                self.phase = Phase.FAILED
                return
            enough = self.config.enough(standings)
        elif self._total:
            enough = self.config.everybody(standings)
        else:
            enough = self.config.enough(members_of(standings))
        if enough:
            self._merge(now_ms)

    # -- merge and fetch -------------------------------------------------------------------------

    def _merge(self, now_ms: int) -> None:
        desk = self._desk
        views = [
            view
            for standing, view in self._promises.values()
            if self._total or standing is Standing.MEMBER
        ]
        origins = {view.origin for view in views if view.origin}
        if len(origins) > 1:
            desk.note("origin_conflict", self._partition, self.epoch, f"{sorted(origins)}")
            self.phase = Phase.FAILED
            return
        self.origin = origins.pop() if origins else desk.chance.word() % 2**53 or 1
        latest = max(view.sealed for view in views)
        self.records = merged([RecordSet.of(view) for view in views if view.sealed == latest])
        self.records.tidy()
        self.phase = Phase.FETCH
        self._moved_ms = now_ms
        fetch = Fetch(
            desk, self._partition, self.epoch, self.records.held.minus(self._state.bodies())
        )
        for peer, (_, view) in self._promises.items():
            if peer != desk.config.node:
                fetch.add_source(peer, DotSet.of(view.held))
        self._fetch = fetch
        if fetch.remaining:
            fetch.ask(now_ms)
        self._settle()

    def copied(self, taken: bool, now_ms: int) -> None:
        """A page was taken (by ``fetch``)."""
        if taken:
            self._moved_ms = now_ms
        self._settle()

    @property
    def grantors(self) -> tuple[int, ...]:
        """The other nodes that promised, and gave a lease with it."""
        return tuple(peer for peer in self._promises if peer in self.claimed_ms)

    @property
    def elected(self) -> bool:
        """A majority promised."""
        return self.phase in (Phase.FETCH, Phase.READY)

    @property
    def fetch(self) -> Fetch | None:
        return self._fetch

    def _settle(self) -> None:
        """READY when every body is here. A put that no replica can read any more is given up, but
        only when every replica has been asked; until then the partition is unavailable, not wrong.
        """
        fetch = self._fetch
        if fetch is None or self.phase is not Phase.FETCH:
            return
        lost = fetch.lost()
        if lost and self.config.everybody(self._promises):
            for span in lost.spans():
                self.records.held.remove_range(*span)
                fetch.remaining.remove_range(*span)
            self._desk.note("puts_lost", self._partition, self.epoch, f"{lost.spans()}")
        if fetch.done:
            self.phase = Phase.READY

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        timeout_ms = self._desk.config.timeout_ms
        if self.phase is Phase.CANVASS:
            if now_ms - self._began_ms >= timeout_ms:
                self.phase = Phase.FAILED
            elif self._eager and now_ms - self._asked_ms >= EAGER_MS:
                self._asked_ms = now_ms
                self._asked = {node for node, a in self._answers.items() if a.granted}
                self._canvass()
        elif self.phase is Phase.CLAIM:
            if now_ms - self._began_ms >= CLAIM_TIMEOUTS * timeout_ms:
                self.phase = Phase.FAILED
            elif now_ms - self._asked_ms >= timeout_ms:
                self._send_claims(now_ms)
        elif self.phase is Phase.FETCH and self._fetch is not None:
            if now_ms - self._moved_ms >= FETCH_PATIENCE_MS:
                self.phase = Phase.FAILED
                return
            self._fetch.tick(now_ms)
            if now_ms - self._asked_ms >= timeout_ms:
                self._send_claims(now_ms)
            self._settle()


def members_of(standings: Mapping[int, Standing]) -> set[int]:
    """Those whose word counts."""
    return {node for node, standing in standings.items() if standing is Standing.MEMBER}
