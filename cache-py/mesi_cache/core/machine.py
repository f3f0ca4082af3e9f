"""One node's whole decision: a requester for its clients, a directory for the keys it is home of.

How to drive it (node.py and the simulation do exactly this):

    step = Step(now_ms, wall_ms)
    machine.receive(step, source, incarnation, message)   # any number of inputs
    carry out `step` in the order that its docstring gives

Whatever the machine sends to its own member must come back through `receive`, like any other
message, after the log has been written: home and requester on one node follow the same rules.
"""

from collections.abc import Iterable
from typing import assert_never

from mesi_cache.core.cache.controller import Cache
from mesi_cache.core.counts import Counts
from mesi_cache.core.directory.applied import Applied
from mesi_cache.core.directory.controller import Directory
from mesi_cache.core.directory.retries import Retries, RetryRow
from mesi_cache.core.messages import (
    Backup,
    BackupAck,
    BackupRefused,
    Fetch,
    FetchAck,
    GetM,
    GetS,
    Grant,
    Hello,
    Inv,
    InvAck,
    Message,
    Put,
    PutAck,
    Renew,
    RenewAck,
)
from mesi_cache.core.placement import Placement
from mesi_cache.core.records import Outcome, Record
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Step


class Machine:
    """Pure: no clock, no chance, no input or output of its own."""

    def __init__(
        self,
        settings: Settings,
        members: list[str] | Placement,
        epoch: int,
        *,
        applied: Iterable[tuple[str, int, int, Outcome | None]] = (),
        retries: Iterable[RetryRow] = (),
        grants_from_ms: float = 0.0,
    ) -> None:
        """`epoch` is the durable start counter: it must be above every earlier one of this member.
        `applied`, `retries` and `grants_from_ms` restore a home (see the classes)."""
        self.settings = settings
        self.epoch = epoch
        self.placement = members if isinstance(members, Placement) else Placement(members)
        self.counts = Counts()
        self.incarnations: dict[str, int] = {settings.me: epoch}
        self.names: dict[str, str] = {}  # members' ids, for people; whoever drives it fills it
        self.cache = Cache(settings, self.placement, epoch, self.counts, self.incarnations)
        restored = Applied()
        for row in applied:
            restored.restore(*row)
        self.directory = Directory(
            settings, epoch, self.counts, self.incarnations, self.names, restored, Retries(retries),
            grants_from_ms,
        )  # fmt: skip

    def receive(self, step: Step, source: str, incarnation: int, message: Message) -> None:
        """Take in what `source` (a member, in its life number `incarnation`) has sent."""
        known = self.incarnations.get(source, 0)
        if incarnation < known:
            return  # from before its restart
        if incarnation > known:
            self.incarnations[source] = incarnation
            self.directory.member_restarted(step, source)
            self.cache.home_restarted(step, source, incarnation)
        # In order of frequency: the first that fits is taken.
        match message:
            case Backup():
                self.directory.on_backup(step, source, message)
            case BackupAck():
                self.cache.on_backup_ack(step, source, message)
            case GetS() | GetM():
                self._on_request(step, source, incarnation, message)
            case Grant():
                self.cache.on_grant(step, source, message)
            case Inv():
                self.cache.on_inv(step, source, message)
            case InvAck():
                self.directory.on_inv_ack(step, source, message)
            case Fetch():
                self.cache.on_fetch(step, source, message)
            case FetchAck():
                self.directory.on_fetch_ack(step, source, message)
            case Put():
                self.directory.on_put(step, source, message)
            case PutAck():
                self.cache.on_put_ack(step, source, message)
            case Renew():
                self.directory.on_renew(step, source, message)
            case RenewAck():
                self.cache.on_renew_ack(step, source, incarnation, message)
            case BackupRefused():
                self.cache.on_backup_refused(step, source, message)
            case Hello():
                pass
            case _:
                assert_never(message)

    def _on_request(self, step: Step, source: str, incarnation: int, message: GetS | GetM) -> None:
        if isinstance(message, GetM) and message.epoch != self.epoch:
            step.send.append((source, Hello()))  # it asks again, of this epoch
        elif self.placement.home(message.key) == self.settings.me:
            self.directory.on_request(step, source, incarnation, message)
        else:
            self.counts.ignored += 1

    def loaded(self, step: Step, key: str, record: Record | None) -> None:
        """Main memory's answer to `Step.load`."""
        self.directory.loaded(step, key, record)

    def load_failed(self, step: Step, key: str) -> None:
        """Main memory does not answer to `Step.load` now."""
        self.directory.load_failed(step, key)

    def tick(self, step: Step) -> None:
        """Do what is due at `step.now_ms`."""
        self.cache.tick(step)
        self.directory.tick(step)

    def leave(self, step: Step, most: int) -> None:
        """Give back up to `most` lines: their homes then need not wait for our lease."""
        self.cache.surrender(step, most)

    def next_tick_ms(self) -> float:
        """When `tick` must be called next, at the latest (infinity: not before another input)."""
        return min(self.cache.next_tick_ms(), self.directory.next_tick_ms())
