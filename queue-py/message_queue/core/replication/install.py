"""A replica takes over an owner's seal: fetches the bodies it lacks, then installs the view.

A replica that lost its disk (or part of it) has forgotten its promises too. Before it counts again,
enough of the *other* replicas must attest that they promised nobody a higher epoch: had the lost
disk helped to elect a later owner, one of those would know. (With its own earlier consent to
this very epoch, given in this life, it needs no attestation: its promise is on its new disk.)
"""

from __future__ import annotations

from message_queue.core.messages import (
    Attest,
    Inquire,
    Seal,
    SealRecord,
    Spans,
    Standing,
    owner_of,
)
from message_queue.core.replication.desk import Desk
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.fetch import Fetch
from message_queue.core.replication.intervals import Intervals
from message_queue.core.replication.quorum import Quorum
from message_queue.core.replication.state import PartitionState


class Install:
    """Invariant: the record is written only when every held put of the view is in this log."""

    __slots__ = (
        "_asked_ms",
        "_attested",
        "_consented",
        "_desk",
        "_nonce",
        "_seal",
        "_state",
        "fetch",
    )

    def __init__(
        self, desk: Desk, state: PartitionState, seal: Seal, consented: bool, now_ms: int
    ) -> None:
        self._desk = desk
        self._state = state
        self._seal = seal
        self._consented = consented
        self._attested: set[int] = set()
        self._nonce = desk.chance.word() % 2**53
        self._asked_ms = now_ms
        self.fetch = self._fetch(now_ms)
        self._inquire()

    @property
    def epoch(self) -> int:
        return self._seal.epoch

    def renew(self, seal: Seal, now_ms: int) -> None:
        """A later view of the same epoch: what was copied stays copied."""
        self._seal = seal
        self.fetch = self._fetch(now_ms)

    def _fetch(self, now_ms: int) -> Fetch:
        state, view = self._state, self._seal.view
        wanted = DotSet.of(view.held).minus(state.bodies())
        if self._seal.epoch == state.sealed:
            # What this node has seen acked under the same seal after the view was taken.
            covered = Intervals(state.records.context.spans())
            for span in wanted.spans():
                for known in covered.within(span):
                    wanted.remove_range(*known)
        fetch = Fetch(self._desk, state.partition, self._seal.epoch, wanted)
        fetch.add_source(owner_of(self._seal.epoch), DotSet.of(view.held))
        if wanted:
            fetch.ask(now_ms)
        return fetch

    def _inquire(self) -> None:
        if self._trusted:
            return
        for peer in self._deciders().others(self._desk.me):
            if peer not in self._attested:
                self._desk.send(peer, Inquire(self._state.partition, self._nonce))

    def _deciders(self) -> Quorum:
        """The replicas that the seal names. An election by others than these needs a majority of
        them first, so the same witnesses know of it."""
        view = self._seal.view
        if view.replicas:
            return Quorum(view.replicas)
        return self._desk.unnamed(self._state.partition)

    @property
    def _trusted(self) -> bool:
        if self._consented or self._state.standing is Standing.MEMBER:
            return True
        deciders = self._deciders()
        known = sum(node in self._attested for node in deciders.others(self._desk.me))
        return known >= deciders.witnesses

    def attested(self, peer: int, message: Attest) -> bool:
        """False: a higher promise exists, this seal is not the last word."""
        if message.nonce != self._nonce:
            return True
        if message.promised > self._seal.epoch:
            return False
        self._attested.add(peer)
        return True

    def tick(self, now_ms: int) -> None:
        self.fetch.tick(now_ms)
        if now_ms - self._asked_ms >= self._desk.config.timeout_ms:
            self._asked_ms = now_ms
            self._inquire()

    def finish(self) -> bool:
        """Installs the view if everything is here; true if it did."""
        seal = self._seal
        if not self.fetch.done or not self._trusted:
            return False
        if seal.epoch < self._state.promised:
            return False  # overtaken while the bodies came
        if self._state.standing is not Standing.MEMBER:
            self._desk.note("copied", self._state.partition, seal.epoch)
        void = self._void()
        if void:
            self._desk.note("void_dropped", self._state.partition, seal.epoch, f"{void}")
        self._desk.persist(
            SealRecord(self._state.partition, seal.epoch, seal.ring, seal.view), self._state
        )
        return True

    def _void(self) -> Spans:
        """Puts of closed epochs that this node holds and the sealed union does not know: their
        producers were refused or left in doubt, and may have retried since."""
        if self._seal.epoch == self._state.sealed:
            return ()
        known = Intervals(self._seal.view.context)
        mine = self._state.held.minus(DotSet.of(self._seal.view.held))
        return tuple(span for span in mine.runs() if known.within(span) != (span,))
