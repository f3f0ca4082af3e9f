"""Operations on their way to another node and back, over the peer links.

One hop: who is asked does it or says that it is not the owner, and never asks a third. The links
may lose messages: an operation whose link broke, or that is not answered in time, has an unknown
outcome; one that never left has none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from message_queue.core.operations import (
    ANEW,
    Answer,
    Direct,
    Forward,
    Forwarded,
    ForwardEnded,
    NodeMessage,
    Operation,
)

log = logging.getLogger(__name__)

MAX_WAITING = 20_000
"""Operations under way to other nodes; beyond it new ones are refused."""


UNDO_WITHIN_S = 5.0
"""How long the leases of an answer can still be given back by the asker."""


class NotSent(Exception):
    """The operation did not leave this node: nothing was done."""


class OutcomeUnknown(Exception):
    """It left, and no answer came."""


class PeerLost(OutcomeUnknown):
    """The link broke meanwhile. Should that node live, it undoes the leases of whoever waited."""


Reply = Answer | None | type[OutcomeUnknown]
"""None: not the owner, nothing was done. OutcomeUnknown: no answer came."""


class Forwards:
    """The asking side. `send` queues a message for a peer; False: its link is down or full."""

    def __init__(self, send: Callable[[int, NodeMessage], bool]) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._waiting: dict[int, tuple[int, Callable[[Reply], None]]] = {}
        self._due: deque[tuple[float, int]] = deque()
        """(loop time, number) of what `begin` sent, in order: they all wait equally long."""

    def begin(
        self,
        position: int,
        operation: Operation,
        within_s: float,
        done: Callable[[Reply], None],
        order: int = 0,
    ) -> bool:
        """Ask the node at `position`; `done` is called once, later. `within_s` is the same in all
        calls; `order`: see `Forward`. False: it was not sent, and `done` is not called."""
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._number += 1
        if not self._send(position, Forward(self._number, operation, order)):
            return False
        self._waiting[self._number] = (position, done)
        self._due.append((self._loop.time() + within_s, self._number))
        return True

    def tick(self, loop_s: float) -> None:
        """What `begin` sent and was not answered in time is of unknown outcome."""
        while self._due and self._due[0][0] <= loop_s:
            waiting = self._waiting.pop(self._due.popleft()[1], None)
            if waiting is not None:
                waiting[1](OutcomeUnknown)

    async def ask(self, position: int, operation: Operation, timeout_s: float) -> Asked:
        """The answer of the node at `position`. Raises NotSent, PeerLost or OutcomeUnknown. When
        the caller is cancelled, the other node is told that nobody waits any more."""
        if len(self._waiting) >= MAX_WAITING:
            raise NotSent
        self._number += 1
        number = self._number
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (position, partial(_resolve, answered))
        done = False
        try:
            if not self._send(position, Forward(number, operation)):
                raise NotSent
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await answered
            except TimeoutError:
                raise OutcomeUnknown from None
            if isinstance(reply, type):
                raise reply
            done = True
            return Asked(self, position, number, reply)
        finally:
            self._waiting.pop(number, None)
            if not done:
                self._send(position, ForwardEnded(number))

    def answered(self, position: int, number: int, answer: Answer | None) -> None:
        """A `Forwarded` came in. One that nobody waits for is dropped."""
        waiting = self._waiting.get(number)
        if waiting is not None and waiting[0] == position:
            del self._waiting[number]
            waiting[1](answer)

    def peer_lost(self, position: int) -> None:
        """The link to a peer broke: what it was asked is in doubt."""
        for number in [n for n, (peer, _) in self._waiting.items() if peer == position]:
            self._waiting.pop(number)[1](PeerLost)

    def withdraw(self, position: int, number: int) -> None:
        """The answer reached nobody: leases that came with it go back."""
        self._send(position, ForwardEnded(number))


def _resolve(answered: asyncio.Future[Reply], reply: Reply) -> None:
    if not answered.done():
        answered.set_result(reply)


class Asked:
    """An answer, and the means to give back what it leased. `answer` None: not the owner."""

    __slots__ = ("_forwards", "_number", "_position", "answer")

    def __init__(
        self, forwards: Forwards, position: int, number: int, answer: Answer | None
    ) -> None:
        self._forwards = forwards
        self._position = position
        self._number = number
        self.answer = answer

    def undo(self) -> None:
        """The client never saw it."""
        self._forwards.withdraw(self._position, self._number)


class Leased(Protocol):
    """What is done for an asker: an answer that may have leased messages."""

    @property
    def answer(self) -> Answer:
        """To be sent."""

    @property
    def leased(self) -> bool:
        """Whether there is something to undo."""

    def undo(self) -> None:
        """The answer reached nobody."""


class Serving:
    """The asked side. `do` gives None when this node is not the owner (and did nothing); so does
    `begin`, which does the operations that need no task."""

    def __init__(
        self,
        send: Callable[[int, NodeMessage], bool],
        do: Callable[[Operation], Awaitable[Leased | None]],
        begin: Callable[[Direct, Callable[[Answer | None], None]], None],
        target_of: Callable[[Operation], int | None],
    ) -> None:
        self._send = send
        self._do = do
        self._begin = begin
        self._target_of = target_of
        self._refused: set[tuple[int, int | None]] = set()
        """(asker, partition) of which something that wants its order was refused."""
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._leased: dict[tuple[int, int], Leased] = {}
        self._until: deque[tuple[float, tuple[int, int]]] = deque()

    def serve(self, position: int, forward: Forward) -> None:
        """Do what a peer asks, and answer it."""
        key = (position, forward.number)
        if isinstance(forward.operation, Direct):
            if not forward.order:
                self._begin(forward.operation, partial(self._answer, position, forward.number))
                return
            target = position, self._target_of(forward.operation)
            if forward.order == ANEW:
                self._refused.discard(target)
            elif target in self._refused:
                self._answer(position, forward.number, None)
                return
            self._begin(forward.operation, partial(self._answer_in_order, target, forward.number))
            return
        task = asyncio.create_task(self._serve(key, forward))
        self._tasks[key] = task
        task.add_done_callback(lambda task: self._done(key, task))

    def _answer_in_order(
        self, target: tuple[int, int | None], number: int, answer: Answer | None
    ) -> None:
        if answer is None:
            self._refused.add(target)
        self._send(target[0], Forwarded(number, answer))

    def _answer(self, position: int, number: int, answer: Answer | None) -> None:
        self._send(position, Forwarded(number, answer))

    def _done(self, key: tuple[int, int], task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("a forwarded operation failed", exc_info=failure)

    async def _serve(self, key: tuple[int, int], forward: Forward) -> None:
        done = await self._do(forward.operation)
        if done is None:
            self._send(key[0], Forwarded(key[1], None))
            return
        if done.leased:
            self._leased[key] = done
            self._until.append((asyncio.get_running_loop().time() + UNDO_WITHIN_S, key))
        if not self._send(key[0], Forwarded(key[1], done.answer)):
            self.ended(*key)

    def ended(self, position: int, number: int) -> None:
        """The asker's client is gone: stop, and take back what was leased for it."""
        task = self._tasks.get((position, number))
        if task is not None:
            task.cancel()
        done = self._leased.pop((position, number), None)
        if done is not None:
            done.undo()

    def peer_lost(self, position: int) -> None:
        """Nobody there waits any more."""
        for key in [key for key in self._tasks if key[0] == position]:
            self.ended(*key)

    def tick(self, loop_s: float) -> None:
        """Forget leases that can no longer be given back."""
        while self._until and self._until[0][0] <= loop_s:
            self._leased.pop(self._until.popleft()[1], None)

    def stop(self) -> None:
        """End everything under way."""
        for task in list(self._tasks.values()):
            task.cancel()
