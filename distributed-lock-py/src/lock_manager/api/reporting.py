"""What happened, told to the log, the metrics and whoever listens to /events."""

from __future__ import annotations

import logging
from time import monotonic

from lock_manager.api.directory import Directory
from lock_manager.api.events import EventHub
from lock_manager.config import Config
from lock_manager.core.locks.commands import Acquire, Batch, Command
from lock_manager.core.locks.replies import (
    Acquired,
    Deadlock,
    Outcomes,
    Queued,
    Released,
    ReleasedMany,
    Reply,
    TimedOut,
)
from lock_manager.core.raft import (
    ElectionStarted,
    Forgetful,
    LeaderChanged,
    Note,
    SteppedDown,
    Suspicious,
    TransferEnded,
    WonElection,
)
from lock_manager.logs import Sparing
from lock_manager.metrics import Metrics

log = logging.getLogger(__name__)


class Reporter:
    def __init__(
        self, config: Config, metrics: Metrics, events: EventHub, directory: Directory
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._events = events
        self._directory = directory
        self._sparing = Sparing()

    def noted(self, note: Note) -> None:
        """Something happened in Raft."""
        match note:
            case ElectionStarted(term, pre_vote):
                log.info("asking for %s in term %d", "pre-votes" if pre_vote else "votes", term)
            case WonElection(term, votes):
                log.info("WON election for term %d with %d votes", term, votes)
                log.info("starting heartbeats every %d ms", self._config.heartbeat_ms)
                self._metrics.elections_won += 1
                self._events.publish("elected", term=term, leader_id=self._config.node_id)
            case SteppedDown(term, reason):
                log.warning("no longer leader of term %d: %s", term, reason)
                self._metrics.leaderships_lost += 1
            case LeaderChanged(term, leader_id):
                name = self._directory.name(leader_id) if leader_id is not None else None
                log.info("term %d: %s", term, f"following {name}" if name else "no leader")
                self._events.publish("leader", term=term, leader_id=name)
            case TransferEnded(target):
                log.warning(
                    "leadership was not handed over to %s in time", self._directory.name(target)
                )
            case Suspicious(sender, what):
                self._complain(f"ignored a message from peer {sender}: it {what}")
            case Forgetful(sender):
                self._complain(
                    f"{self._directory.name(sender) or f'peer {sender}'} lacks entries that it "
                    "acknowledged: its disk lost them. Remove it, and add it again with an empty "
                    "data directory"
                )
            case _:
                pass

    def _complain(self, what: str) -> None:
        if (text := self._sparing.again(what, monotonic())) is not None:
            log.error("%s", text)

    def applied(self, batch: Batch, outcomes: Outcomes) -> None:
        """One log entry took effect on this node. (Counters differ between nodes only in what a
        node was not there for.)"""
        metrics = self._metrics
        metrics.batches += 1
        metrics.commands += len(batch.commands)
        for expired in outcomes.expired:
            if expired.reaped:
                metrics.grants_reaped += 1
            else:
                metrics.leases_expired += 1
            self._events.publish(
                "expired",
                lock_name=expired.lock_name,
                client_id=expired.client_id,
                fencing_token=expired.fencing_token,
                reason="unclaimed" if expired.reaped else "lease",
            )
        if self._events.listened_to:
            for command, answer in zip(batch.commands, outcomes.answers, strict=True):
                self._answered(command, answer)
        else:
            for answer in outcomes.answers:
                self._count(answer)
        for resolution in outcomes.resolutions:
            self._resolved(resolution.reply)

    def _count(self, answer: Reply | Queued) -> None:
        """As _answered while nobody listens: this runs for every command on every node."""
        kind = type(answer)
        if kind is Acquired:
            self._metrics.grants += 1
        elif kind is Released:
            self._metrics.releases += 1
        elif isinstance(answer, Queued):
            self._metrics.waits += 1
        elif isinstance(answer, ReleasedMany):
            self._metrics.releases += answer.count
        else:
            self._resolved(answer)

    def _answered(self, command: Command, answer: Reply | Queued) -> None:
        match answer:
            case Queued():
                self._metrics.waits += 1
                if isinstance(command, Acquire) and self._events.listened_to:
                    names = [ask.lock_name for ask in command.asks]
                    self._events.publish("waiting", client_id=command.client_id, locks=names)
            case Released(lock_name, client_id):
                self._metrics.releases += 1
                if self._events.listened_to:
                    self._events.publish("released", lock_name=lock_name, client_id=client_id)
            case ReleasedMany(count):
                self._metrics.releases += count
                self._events.publish("released_many", count=count)
            case _:
                self._resolved(answer)

    def _resolved(self, reply: Reply) -> None:
        match reply:
            case Acquired(client_id, locks):
                self._metrics.grants += 1
                if self._events.listened_to:
                    for one in locks:
                        self._events.publish(
                            "granted",
                            lock_name=one.lock_name,
                            client_id=client_id,
                            lock_type=one.lock_type,
                            fencing_token=one.fencing_token,
                        )
            case TimedOut(lock_name):
                self._metrics.timeouts += 1
                self._events.publish("timeout", lock_name=lock_name)
            case Deadlock(cycle):
                self._metrics.deadlocks += 1
                self._events.publish("deadlock", cycle=cycle)
            case _:
                pass
