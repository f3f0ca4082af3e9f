"""Requests that wait for the log: from the inbox into a batch, from the batch to an answer.

One `Pending` is one HTTP request. A request whose client hung up is *abandoned*: if it was never
proposed nothing happened; if it waits in a queue the wait is cancelled; if it was granted meanwhile
nobody was told, and the machine must know (guarantee 9). `Desk` says which command that takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import msgspec

from lock_manager.api.errors import ApiError
from lock_manager.core.locks.commands import Batch, Cancel, Command, Undelivered
from lock_manager.core.locks.replies import Acquired, Outcomes, Queued, Reply, Resolution

MAX_BATCH_COMMANDS = 1024
MAX_INBOX = 50_000  # beyond that requests are refused


class Telling:
    """One answer of the machine that grants something, and who is to be told."""

    __slots__ = ("grant", "listeners")

    def __init__(self, grant: Acquired, listeners: int) -> None:
        self.grant = grant
        self.listeners = listeners


class Listener(Protocol):
    """Who is told the reply or the error, once, and not within the call that submitted the command.
    An asyncio.Future is one."""

    def done(self) -> bool:
        """Nobody listens any more."""

    def set_result(self, reply: Reply, /) -> None: ...

    def set_exception(self, error: Exception, /) -> None: ...


class Pending:
    __slots__ = ("abandoned", "command", "listener", "telling", "ticket")

    def __init__(self, command: Command, listener: Listener | None) -> None:
        self.command = command
        self.listener = listener  # None: nobody waits for this one
        self.abandoned = False
        self.ticket = 0
        self.telling: Telling | None = None

    def fail(self, error: Exception) -> None:
        if self.listener is not None and not self.listener.done():
            self.listener.set_exception(error)


class Proposed(msgspec.Struct, frozen=True):
    """One batch of this leader that is on its way."""

    term: int
    batch: Batch
    pendings: list[Pending]  # in the order of the commands
    since_s: float  # by perf_counter: uvloop's own clock has whole milliseconds


class Desk:
    """All requests of this node that are not answered yet."""

    def __init__(self) -> None:
        self._inbox: deque[Pending] = deque()
        self._proposed: dict[int, Proposed] = {}  # not applied yet, by log index
        self._queued: dict[int, list[Pending]] = {}  # by ticket

    @property
    def has_mail(self) -> bool:
        return bool(self._inbox)

    @property
    def mail(self) -> int:
        """How many requests wait to be proposed."""
        return len(self._inbox)

    @property
    def batches_under_way(self) -> int:
        return len(self._proposed)

    @property
    def unanswered(self) -> int:
        return (
            len(self._inbox)
            + len(self._queued)
            + sum(len(proposed.pendings) for proposed in self._proposed.values())
        )

    # ------------------------------------------------------------------------------------ going in

    def submit(self, command: Command, listener: Listener | None) -> Pending:
        """Raises ApiError 503 if too much waits already."""
        if len(self._inbox) >= MAX_INBOX and listener is not None:
            raise ApiError(503, "Too many requests are waiting", headers={"Retry-After": "1"})
        pending = Pending(command, listener)
        self._inbox.append(pending)
        return pending

    def take_mail(self) -> list[Pending]:
        """What goes into the next batch, oldest first."""
        inbox = self._inbox
        taken: list[Pending] = []
        while inbox and len(taken) < MAX_BATCH_COMMANDS:
            pending = inbox.popleft()
            if not pending.abandoned:
                taken.append(pending)
        return taken

    def put_back(self, pendings: list[Pending]) -> None:
        """They could not be proposed yet."""
        self._inbox.extendleft(reversed(pendings))

    def proposed(self, index: int, proposed: Proposed) -> None:
        self._proposed[index] = proposed

    # ----------------------------------------------------------------------------------- coming out

    def take_proposed(self, index: int, term: int) -> Proposed | None:
        """What was committed at `index` in `term`, if this node proposed it. A batch of this node
        that another term's entry displaced is definitely lost."""
        found = self._proposed.pop(index, None)
        if found is None or found.term == term:
            return found
        self._fail(found.pendings, not_leader_any_more(definite=True))
        return None

    def answer(self, pendings: Iterable[Pending], outcomes: Outcomes) -> list[Command]:
        """Hand out what one applied batch brought; returns commands that must follow it."""
        follow_up: list[Command] = []
        for pending, answer in zip(pendings, outcomes.answers, strict=True):
            if isinstance(pending.command, Cancel):
                # A retry that came just before its ticket went asks anew.
                for other in self._queued.pop(pending.command.ticket, ()):
                    if not other.abandoned:
                        other.ticket = 0
                        self._inbox.append(other)
            elif isinstance(answer, Queued):
                pending.ticket = answer.ticket
                self._queued.setdefault(answer.ticket, []).append(pending)
                if pending.abandoned:
                    follow_up.extend(self._withdraw(pending))
            else:
                follow_up.extend(self._tell([pending], answer))
        return follow_up

    def resolve(self, resolutions: Iterable[Resolution]) -> list[Command]:
        """Answer everybody who waited in a queue until now; returns commands that must follow."""
        follow_up: list[Command] = []
        for resolution in resolutions:
            waiting = [
                pending for ticket in resolution.tickets for pending in self._queued.pop(ticket, ())
            ]
            follow_up.extend(self._tell(waiting, resolution.reply))
        return follow_up

    def _tell(self, pendings: list[Pending], reply: Reply) -> list[Command]:
        listening = [
            p
            for p in pendings
            if not p.abandoned and p.listener is not None and not p.listener.done()
        ]
        telling = Telling(reply, len(listening)) if isinstance(reply, Acquired) else None
        for pending in listening:
            pending.telling = telling
            if pending.listener is not None:
                pending.listener.set_result(reply)
        if telling is not None and not listening and pendings:
            return [_undelivered(telling.grant)]
        return []

    # -------------------------------------------------------------------------------- ending early

    def abandon(self, pending: Pending) -> list[Command]:
        """Its client hung up; returns commands that must follow."""
        if pending.abandoned:
            return []
        pending.abandoned = True
        if pending.telling is not None:
            pending.telling.listeners -= 1
            return [] if pending.telling.listeners else [_undelivered(pending.telling.grant)]
        return self._withdraw(pending) if pending.ticket else []

    def _withdraw(self, pending: Pending) -> list[Command]:
        """Cancel the wait, unless a retry of the same request listens on the same ticket."""
        waiting = self._queued.get(pending.ticket, [])
        if all(other.abandoned for other in waiting) and waiting:
            return [Cancel(pending.ticket)]
        return []

    def leadership_lost(self) -> None:
        """Nobody whose command is in the log will be answered by this node any more."""
        for proposed in self._proposed.values():
            self._fail(proposed.pendings, not_leader_any_more(definite=False))
        for pendings in self._queued.values():
            self._fail(pendings, not_leader_any_more(definite=False))
        self._proposed.clear()
        self._queued.clear()

    def refuse_mail(self, error: Exception) -> None:
        """What was not proposed is refused: it had no effect."""
        self._fail(self._inbox, error)
        self._inbox.clear()

    @staticmethod
    def _fail(pendings: Iterable[Pending], error: Exception) -> None:
        for pending in pendings:
            pending.fail(error)


def not_leader_any_more(*, definite: bool) -> ApiError:
    """`definite`: the request certainly had no effect. Otherwise it may still take effect; with
    the same request id a retry is safe either way."""
    return ApiError(503, "Leadership lost", headers={"Retry-After": "1"}, definite=definite)


def _undelivered(grant: Acquired) -> Undelivered:
    tokens = {granted.lock_name: granted.fencing_token for granted in grant.locks}
    return Undelivered(grant.client_id, tokens)
